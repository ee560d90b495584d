"""Everything that can go wrong between a receiver and its remote sharer: each ends in an error that says so, or in the
receiver's own answer with a note; never in an answer that was silently not fused, and never in a dead server."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest
import torch

import c2c.remote.server as server_module
from c2c import C2CModel
from c2c.errors import C2CError, MismatchError, PromptError
from c2c.remote import RemoteError, RemoteSharer, SharerLost
from c2c.remote.config import ShareConfig
from c2c.remote.protocol import HANDSHAKE_PATH, PREFILL_PATH, PrefillRequest, Record, WireError, read_records
from c2c.remote.server import PrefillWorker
from c2c.serving.errors import ApiError
from c2c.sharer import Sharer
from c2c.tokens import left_pad
from remote_rig import KEY, Proxy, serving, until
from test_private import DOCUMENT, QUESTION
from tiny import build, memory_pair, open_fusers, pair, tokenizer

TEXT = "The fox sleeps in a red house by the sea."
GREEDY = {"max_new_tokens": 6, "do_sample": False}
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
RATE = BUSY.replace(b"503 Service Unavailable", b"429 Too Many Requests\r\nRetry-After: 60")


@pytest.fixture(scope="module")
def local():
    return open_fusers(pair(fuser_options={"rank": 8}))


@pytest.fixture(scope="module")
def server(local):
    with serving(local.sharers[0]) as running:
        yield running


@pytest.fixture
def proxy(server):
    with Proxy(server.port) as between:
        yield between


@pytest.fixture(autouse=True)
def the_server_goes_on(request, local):
    """Whatever a test did: afterwards the server answers as ever."""
    yield
    if "server" in request.fixturenames:
        running = request.getfixturevalue("server")
        assert generated(local) == generated(through(local, running.url))


def through(local, url, **options) -> C2CModel:
    """The pair of ``local`` with its sharer at ``url``."""
    return C2CModel(local.receiver, [RemoteSharer(url, **options)], list(local.fusers))


def generated(model) -> list[int]:
    return model.generate(TEXT, **GREEDY).ids.tolist()


def fails(model, match: str, code: str, status: int | None = None) -> RemoteError:
    """A call raises; nothing is answered."""
    with pytest.raises(RemoteError, match=match) as caught:
        model.generate(TEXT, **GREEDY)
    assert (caught.value.code, caught.value.status) == (code, status)
    assert not isinstance(caught.value, SharerLost)
    return caught.value


def with_body(answer: bytes, change) -> bytes:
    """An HTTP answer with another body."""
    head, body = answer.split(b"\r\n\r\n", 1)
    if b"chunked" in head:
        chunks, body = body, b""
        while (size := int((parts := chunks.split(b"\r\n", 1))[0], 16)) > 0:
            body, chunks = body + parts[1][:size], parts[1][size + 2 :]
    dropped = (b"transfer-encoding", b"content-length", b"content-encoding")
    head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(dropped))
    body = change(body)
    return head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def forged(answer: bytes, change) -> bytes:
    """An answer whose records were changed by somebody who makes the hashes anew."""

    def records(body: bytes) -> bytes:
        found = [change(record.manifest, record.tensors) for record in read_records([body], 1 << 30)]
        return b"".join(Record(*parts).encode() for parts in found)

    return with_body(answer, records)


# -- the connection ----------------------------------------------------------------------------------------------------


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    with pytest.raises(RemoteError, match=r"2 attempts.*`c2c share`") as caught:
        RemoteSharer(url, retries=1)
    assert caught.value.code == "unreachable"


@pytest.mark.parametrize("at", [0, 60, 250, 2000, 4000])
def test_a_cut_anywhere_is_noticed(local, proxy, at):
    """Before the status, in the headers, between and within records."""
    model = through(local, proxy.url, retries=1)
    proxy.spoil(cut=at)
    fails(model, "2 attempts:", "unreachable")
    assert model.sharers[0].traffic.retries == 1


def test_an_answer_without_its_last_record_is_no_answer(local, proxy):
    """Cut between two records, where the HTTP framing looks whole."""
    model, end = through(local, proxy.url, retries=0), len(Record({"kind": "end"}, {}).encode())
    proxy.spoil(change=lambda answer: with_body(answer, lambda body: body[:-end]))
    fails(model, "cut off", "unreachable")


def test_a_second_attempt_is_the_same_request_and_succeeds(local, proxy):
    model = through(local, proxy.url)
    for spoiled in ({"cut": 4000}, {"answer": BUSY}):
        before = model.sharers[0].traffic.retries
        proxy.requests.clear()
        proxy.spoil(times=1, **spoiled)
        assert generated(model) == generated(local)
        assert model.sharers[0].traffic.retries == before + 1
        assert proxy.requests[0] == proxy.requests[1]


@pytest.mark.parametrize(("answer", "code", "status"), [(BUSY, "busy", 503), (RATE, "rate", 429)])
def test_a_busy_server_is_given_up_in_the_end(local, proxy, answer, code, status):
    model = through(local, proxy.url, retries=1, timeout=20)  # less than it is to wait for at 429
    proxy.spoil(answer=answer)
    fails(model, f"it answered {status}", code, status)


@pytest.mark.parametrize("status", [500, 404, 301])
def test_other_statuses_are_not_tried_again(local, proxy, status):
    model = through(local, proxy.url)
    proxy.spoil(answer=b"HTTP/1.1 %d No\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n" % status)
    before = model.sharers[0].traffic.requests
    fails(model, f"answered {status}", "status", status)
    assert model.sharers[0].traffic.requests == before + 1


def test_a_slow_link_runs_into_the_timeout(local, proxy):
    """Bytes go on trickling, so that no single read takes long."""
    model = through(local, proxy.url, timeout=1.0)
    proxy.spoil(rate=2000)
    fails(model, r"longer than 1 seconds.*precision='int8'", "timeout")


# -- damage ------------------------------------------------------------------------------------------------------------


def test_every_changed_byte_of_a_record_is_found():
    end = Record({"kind": "end"}, {}).encode()
    whole = Record({"kind": "layer", "layer": 1}, {"x": torch.ones(3)}).encode() + end
    assert next(read_records([whole], 1 << 20)).manifest["layer"] == 1
    for at in range(len(whole)):
        changed = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
        with pytest.raises(WireError):
            list(read_records([changed], 1 << 20))


def test_a_damaged_answer_is_refused_and_not_tried_again(local, proxy):
    model = through(local, proxy.url)
    proxy.spoil(change=lambda answer: with_body(answer, lambda body: body[:-1000] + b"?" + body[-999:]))
    before = model.sharers[0].traffic.requests
    fails(model, "sha256", "damaged")
    assert model.sharers[0].traffic.requests == before + 1


def on(kind, manifest=None, tensors=None):
    """A change of the records of one kind."""
    return lambda head, body: (
        (head | (manifest or {}), body if tensors is None else tensors) if head["kind"] == kind else (head, body)
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (on("layer", {"layer": 7}), "not asked for"),
        (on("layer", {"kind": "end"}), "did not come"),
        (on("layer", {"kind": "other"}), "'other' came"),
        (on("layer", tensors={}), "got None"),
        (on("layer", tensors={"0.key": torch.ones(1, 2, 3, 12)}), "expected"),
        (on("layer", {"format": "c2c-remote-9"}), "c2c-remote-9"),
        (on("begin", {"kind": "layer"}), "'begin' was expected"),
        (on("begin", {"columns": [1]}), "columns came"),
        (on("begin", {"drafted": [1]}), "a draft was sent"),
        (on("begin", {"drafted": None}), "can't be read"),
        (on("begin", {"sharer": None}), "identity of the model is missing"),
        (lambda head, body: (head | {"sharer": head.get("sharer", {}) | {"weights": "0"}}, body), "weights"),
        (lambda head, body: (head, body | {"more": torch.ones(1)}), "expected None"),
    ],
)
def test_an_answer_that_is_not_what_was_wanted_is_refused(local, proxy, change, match):
    model = through(local, proxy.url)
    proxy.spoil(change=lambda answer: forged(answer, change))
    with pytest.raises((RemoteError, MismatchError), match=match):
        generated(model)


# -- what a server refuses ---------------------------------------------------------------------------------------------


def request_of(sharer, /, **changes) -> dict:
    """A request by hand."""
    wanted = {"stop": 3, "layers": [0, 1, 2], "columns": [[0, 1, 2]], "precision": "float32"}
    return {"sharer": sharer.identity.to_dict(), "ids": [[5, 6, 7]]} | wanted | changes


def post(running, body) -> tuple[int, dict]:
    answer = httpx.post(running.url + PREFILL_PATH, json=body, timeout=30)
    return answer.status_code, {} if answer.status_code == 200 else answer.json()["error"]


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, 200, ""),
        ({"more": 1}, 400, "unknown parameter more"),
        ({"sharer": None}, 400, "sharer"),
        ({"sharer": {"name": "x"}}, 400, "sharer"),
        ({"stop": 0}, 400, "stop"),
        ({"stop": 4}, 400, "stop"),
        ({"stop": 1 << 60}, 400, "stop"),
        ({"layers": []}, 400, "layers must be"),
        ({"layers": [1, 0]}, 400, "layers must be"),
        ({"layers": "all"}, 400, "layers"),
        ({"layers": [0, 3]}, 422, "layers [3]"),
        ({"precision": "int3"}, 422, "precision 'int3'"),
        ({"fuser": "abc"}, 422, "does not have the fuser"),
        ({"draft_tokens": -1}, 400, "draft_tokens"),
        ({"draft_tokens": 8190}, 413, "8193 tokens"),
        ({"draft_tokens": 2, "stop": 2, "columns": [[0]]}, 400, "stop must be"),
        ({"ids": []}, 400, "matrices"),
        ({"ids": [[1, 2], [3]]}, 400, "matrices"),
        ({"ids": [[1 << 70, 2, 3]]}, 400, "ids"),
        ({"ids": [[5, 6, 512]]}, 422, "0 to 511"),
        ({"ids": [[5, 6, -1]]}, 400, "ids"),
        ({"ids": [[5, 6, 7]] * 2, "columns": [[0]] * 2, "draft_tokens": 1}, 400, "one row"),
        ({"positions": [[0, 1, 600]]}, 413, "made for 512"),
        ({"mask": [[True, True]]}, 400, "matrices"),
        ({"columns": [[0, 1, 5]]}, 400, "columns must be"),
        ({"columns": [[1, 1]]}, 400, "columns must be"),
        ({"columns": [[0]] * 2}, 400, "columns must be"),
        ({"columns": [[]]}, 400, "no entry"),
    ],
)
def test_a_request_that_is_wrong(local, server, changes, status, said):
    found, error = post(server, request_of(local.sharers[0], **changes))
    assert found == status
    assert said in error.get("message", "")


def test_a_request_that_is_too_long(local):
    with serving(local.sharers[0], max_tokens=60, max_body_kb=3) as running:
        assert httpx.post(running.url + PREFILL_PATH, content=bytes(4000)).status_code == 413
        model = through(local, running.url)
        with pytest.raises(RemoteError, match="takes 60") as caught:
            model.generate("word " * 60)
        assert (caught.value.code, caught.value.status) == ("too_long", 413)
        assert model.sharers[0].lost is None, "it is about this request"
        assert generated(model) == generated(local)


def test_keys_of_a_file_and_of_the_environment(local, tmp_path, monkeypatch):
    (tmp_path / "key").write_text(KEY + "\n")
    with serving(local.sharers[0], key_file=tmp_path / "key", api_key=["another key"]) as running:
        for options in ({}, {"token": "wrong"}):
            with pytest.raises(RemoteError, match="key") as caught:
                RemoteSharer(running.url, **options)
            assert (caught.value.code, caught.value.status) == ("invalid_api_key", 401)
        assert generated(through(local, running.url, key_file=tmp_path / "key")) == generated(local)
        monkeypatch.setenv("C2C_TOKEN", "another key")
        assert generated(through(local, running.url)) == generated(local)
        assert len({entry["owner"] for entry in running.log if "owner" in entry}) == 2


# -- the worker --------------------------------------------------------------------------------------------------------


def held_sharer(layer: int):
    """The sharer of ``local``, which waits before a layer until it may go on; and which layers it has begun."""
    sharer, hold, begun = Sharer(build("qwen2", 2), tokenizer("llama3"), "qwen2"), threading.Event(), []
    assert sharer.identity.kv  # reading its geometry runs the model once
    for index, module in enumerate(sharer.model.get_decoder().layers):
        module.register_forward_pre_hook(lambda *_, index=index: begun.append(index))
        if index == layer:
            module.register_forward_pre_hook(lambda *_: hold.wait(60) and None, prepend=True)
    hold.set()  # the handshake reads the cache of one token
    return sharer, hold, begun


def test_layers_are_sent_while_the_next_ones_are_made(local):
    sharer, hold, begun = held_sharer(1)
    with serving(sharer) as running:
        hold.clear()
        begun.clear()
        url, body = running.url + PREFILL_PATH, request_of(sharer)
        with httpx.stream("POST", url, json=body, timeout=30) as response:
            for record in read_records(response.iter_bytes(), 1 << 20):
                if record.kind == "layer" and record.manifest["layer"] == 0:
                    assert 2 not in begun, "the first layer is here, and the last has not begun"
                    hold.set()
        assert begun[-1] == 2


def submitted(local, monkeypatch, use, **options):
    """Run ``use(worker, request, layers begun)`` on an event loop with a worker that queues one layer."""
    monkeypatch.setattr(server_module, "QUEUED_BYTES", 1)
    sharer, _, begun = held_sharer(1)
    worker = PrefillWorker(sharer, ShareConfig(**options))
    begun.clear()
    request = PrefillRequest(**request_of(sharer))
    asyncio.run(use(worker, request, begun))
    worker.close()


def test_finished_layers_wait_for_a_client_that_does_not_read(local, monkeypatch):
    async def use(worker, request, begun):
        job = worker.submit(request, time.monotonic() + 60)
        await asyncio.sleep(0.5)
        assert begun == [0, 1], "the prefill waits too"
        records = [record async for record in job.records({})]
        assert begun == [0, 1, 2]
        assert len(records) == 5

    submitted(local, monkeypatch, use)


def test_requests_count_as_soon_as_they_are_accepted(local, monkeypatch):
    async def use(worker, request, begun):
        first = worker.submit(request, time.monotonic() + 60)
        with pytest.raises(ApiError) as caught:
            worker.submit(request, time.monotonic() + 60)
        assert (caught.value.status, caught.value.code) == (503, "busy")
        worker.stop()
        last = [record async for record in first.records({})][-1]
        assert next(read_records([last], 1 << 20)).kind == "error"
        while worker.waiting:
            await asyncio.sleep(0.01)
        worker.submit(request, time.monotonic() + 60).stop()

    submitted(local, monkeypatch, use, waiting=1)


def test_the_server_limits_the_time_of_a_request(local):
    sharer, hold, _ = held_sharer(2)
    with serving(sharer, timeout=1.0) as running:
        model = through(local, running.url, retries=0)
        hold.clear()
        threading.Timer(1.5, hold.set).start()
        with pytest.raises(RemoteError) as caught:
            generated(model)
        assert caught.value.code in ("timeout", "unreachable")
        assert generated(model) == generated(local)


def test_a_client_that_leaves_stops_the_work(local):
    """The model is in its second layer when the client gives up: it does not begin the third."""
    sharer, hold, begun = held_sharer(1)
    with serving(sharer) as running:
        model = through(local, running.url, timeout=0.5)
        hold.clear()
        begun.clear()
        fails(model, "longer than", "timeout")
        assert running.logged(2)[1]["code"] == "cut"
        hold.set()
        until(lambda: not running.worker.waiting)
        assert 2 not in begun
        assert generated(through(local, running.url)) == generated(local)


def test_a_model_that_fails_is_an_error_and_the_server_goes_on(local):
    sharer = Sharer(build("qwen2", 2), tokenizer("llama3"), "qwen2")

    def fail(*_):
        raise MemoryError("no more")

    with serving(sharer) as running:
        model = through(local, running.url)
        hook = sharer.model.get_decoder().layers[1].register_forward_pre_hook(fail)
        fails(model, "MemoryError", "failed", 200)
        hook.remove()
        assert generated(model) == generated(local)


# -- another model -----------------------------------------------------------------------------------------------------


def test_another_model_behind_the_same_address(local, server):
    """It was exchanged after the client had connected: a mistake, not a loss, under every policy."""
    strange = Sharer(build("qwen2", 9), tokenizer("llama3"), "strange")
    status, error = post(server, request_of(strange))
    assert (status, error["code"]) == (409, "mismatch")
    assert error["sharer"]["weights"] == local.sharers[0].identity.weights
    with serving(strange) as other, Proxy(server.port) as between:
        for policy in ("raise", "receiver_only"):
            between.port = server.port
            model = through(local, between.url, on_failure=policy)
            between.port = other.port
            with pytest.raises(MismatchError, match=r"weights(.|\n)*Another model is served"):
                generated(model)
            assert model.sharers[0].lost.code == "mismatch"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda facts: facts | {"sharer": facts["sharer"] | {"tokenizer": "0" * 32}}, MismatchError),
        (lambda facts: facts | {"format": "c2c-remote-9"}, RemoteError),
        (lambda facts: facts | {"dtype": "Tensor"}, RemoteError),
        (lambda facts: facts | {"sharer": facts["sharer"] | {"kv": {}}}, RemoteError),
        (
            lambda facts: facts | {"sharer": facts["sharer"] | {"kv": facts["sharer"]["kv"] | {"layers": 0}}},
            RemoteError,
        ),
        (lambda facts: facts | {"config": {"model_type": "none such"}}, RemoteError),
        (lambda facts: facts | {"tokenizer": {"../x": ""}}, RemoteError),
        (lambda facts: facts | {"tokenizer": {"tokenizer.json": "{}"}}, RemoteError),
        (lambda facts: [], RemoteError),
    ],
)
def test_a_handshake_that_does_not_hold(server, proxy, change, error):
    facts = httpx.get(server.url + HANDSHAKE_PATH + "?tokenizer=true").json()
    proxy.spoil(change=lambda answer: with_body(answer, lambda _: json.dumps(change(facts)).encode()))
    with pytest.raises(error):
        RemoteSharer(proxy.url)
    proxy.spoil(change=lambda answer: with_body(answer, lambda _: b"<html>"))
    with pytest.raises(RemoteError, match="JSON"):
        RemoteSharer(proxy.url)


@pytest.mark.parametrize(
    "options",
    [{"url": url} for url in (None, "ftp://x", "localhost:8650", "http://", "http://user:secret@127.0.0.1:1")]
    + [{"token": "Größe"}, {"token": "a\nb"}, {"on_failure": "ignore"}, {"client_cert": "/nowhere.pem"}],
)
def test_options_that_can_not_be_used(options):
    with pytest.raises(RemoteError) as caught:
        RemoteSharer(**{"url": "http://127.0.0.1:1"} | options)
    assert caught.value.code in {"url", "token", "policy", "certificate"}
    assert "secret" not in str(caught.value)


def test_a_connection_to_others_without_tls_warns():
    with pytest.warns(UserWarning, match="without TLS"), pytest.raises(RemoteError, match="no answer"):
        RemoteSharer("http://host.invalid:1", retries=0)


# -- the receiver alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", [TEXT, [TEXT, "Hi"]])
@pytest.mark.parametrize("fault", [{"cut": 4000}, {"answer": BUSY}, {"answer": b"what?\r\n\r\n"}])
def test_receiver_only_is_the_receiver_alone_bit_for_bit_and_says_so(local, proxy, fault, messages):
    model = through(local, proxy.url, on_failure="receiver_only", retries=0, timeout=10)
    proxy.spoil(**fault)
    prepared = model.prefill(messages)
    tokens = local.receiver.encode(messages)
    own = local.receiver.prefill(tokens, tokens.length - 1)
    assert torch.equal(
        local.receiver.next_logits(prepared.tokens, prepared.cache), local.receiver.next_logits(tokens, own)
    )
    answers, alone = model.generate(messages, **GREEDY), local.receiver.answer(messages, **GREEDY)
    for one, other in zip(*(x if isinstance(x, list) else [x] for x in (answers, alone)), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.prompt_tokens == other.prompt_tokens
    report = prepared.report
    assert [note[:14] for note in report.notes] == ["receiver only:"]
    assert proxy.url in report.notes[0]
    assert (report.fused_tokens, report.fused_layers, report.sharer_bytes) == (0, [], 0)
    assert set(report.skipped_layers.values()) == {"a sharer was lost"}
    json.dumps(report.to_dict())
    assert model.sharers[0].for_fuser(model.fusers[0]).lost is model.sharers[0].lost is not None
    proxy.spoil(times=0)
    again = model.generate(TEXT, **GREEDY)
    assert again.ids.tolist() == generated(local), "it is back, and nobody has to do anything"
    assert (again.report.notes, model.sharers[0].lost) == ([], None)


def test_receiver_only_for_private_context():
    ours = memory_pair()
    with serving(ours.sharers[0]) as running, Proxy(running.port) as between:
        model = through(ours, between.url, on_failure="receiver_only", retries=0)
        between.spoil(cut=3000)
        answer = model.generate(QUESTION, sharer_messages=DOCUMENT, **GREEDY)
        assert answer.ids.tolist() == ours.receiver.answer(QUESTION, **GREEDY).ids.tolist()
        assert answer.report.notes[0].startswith("receiver only: ")
        assert answer.report.memory_slots == 0
        with pytest.raises(SharerLost):
            model.sharers[0].read(DOCUMENT)


def test_receiver_only_for_token_ids_and_for_several_sharers(local, proxy):
    lost = through(local, proxy.url, on_failure="receiver_only", retries=0)
    mixed = C2CModel(local.receiver, [local.sharers[0], lost.sharers[0]], [local.fusers[0]] * 2)
    proxy.spoil(cut=3000)
    ids = torch.randint(1, 200, (2, 8), generator=torch.Generator().manual_seed(1))
    batch = left_pad(ids.tolist(), 0)
    alone = local.receiver.generate(batch, local.receiver.prefill(batch, 7), **GREEDY)
    assert torch.equal(lost.generate_ids(ids, ids, fuse_mask=torch.ones(8).bool(), **GREEDY), alone)
    answer = mixed.generate(TEXT, **GREEDY)
    assert answer.ids.tolist() == local.receiver.answer(TEXT, **GREEDY).ids.tolist()
    assert answer.report.notes[0].startswith("receiver only: ")


def test_mistakes_of_the_user_are_errors_under_every_policy_and_in_a_stream(local, server, proxy):
    model = through(local, server.url, on_failure="receiver_only")
    for prompt in ("long " * 600, ""):
        with pytest.raises(PromptError):
            model.generate(prompt)
    broken = through(local, proxy.url, retries=0)
    proxy.spoil(cut=3000)
    with pytest.raises(C2CError):
        "".join(broken.stream(TEXT, **GREEDY))
