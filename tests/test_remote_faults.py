"""Everything that can go wrong between a receiver and its remote sharer: each ends in an error that says so, or in the
receiver's own answer with a note; never in an answer that was silently not fused, and never in a dead server."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
import zlib
from types import SimpleNamespace

import httpx
import pytest
import torch

from c2c import C2CModel
from c2c.errors import MismatchError
from c2c.language_model import Sharer
from c2c.remote import RemoteError, RemoteSharer, SharerLost
from c2c.remote.connection import Connection
from c2c.remote.frame import MAGIC, Frame, FrameReader, body_of, encode
from c2c.remote.freshness import Freshness, StaleError
from c2c.remote.greeting import Greeting
from c2c.remote.limits import Limits, RateLimiter
from c2c.remote.order import Order
from c2c.remote.retry import Backoff
from c2c.remote.signature import KeyFileError, Signer, read_key
from c2c.remote.standing import Standing
from c2c.tokens import left_pad
from remote_rig import KEY, Proxy, body_of_request, serving
from test_private import DOCUMENT, QUESTION, private
from tiny import build, open_fusers, pair, tokenizer

TEXT = "The fox sleeps in a red house by the sea."
GREEDY = {"max_new_tokens": 6, "do_sample": False}
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def local():
    return open_fusers(pair(fuser_options={"rank": 8}))


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("key") / "shared.key"
    path.write_bytes(KEY)
    return path


@pytest.fixture(scope="module")
def server(local):
    with serving(local.sharers[0]) as running:
        yield running


@pytest.fixture(scope="module")
def signed(local):
    with serving(local.sharers[0], key=KEY) as running:
        yield running


@pytest.fixture
def proxy(server):
    with Proxy(server.port) as between:
        yield between


@pytest.fixture(autouse=True)
def servers_go_on(request, local, key_file):
    """Whatever a test did: afterwards the servers answer as ever."""
    yield
    for name in {"server", "signed"} & set(request.fixturenames):
        running = request.getfixturevalue(name)
        options = {"key_file": key_file} if name == "signed" else {}
        assert generated(local) == generated(through(local, running.url, **options))


def through(local, url, **options) -> C2CModel:
    """The pair of ``local`` with its sharer at ``url``."""
    return C2CModel(local.receiver, [RemoteSharer(url, **options)], list(local.fusers))


def generated(model) -> list[int]:
    return model.generate(TEXT, **GREEDY).ids.tolist()


def fails(model, match: str, code: str, status: int | None = None) -> RemoteError:
    """Asking raises; nothing is answered."""
    with pytest.raises(RemoteError, match=match) as caught:
        model.generate(TEXT, **GREEDY)
    assert (caught.value.code, caught.value.status) == (code, status)
    assert not isinstance(caught.value, SharerLost)
    return caught.value


def is_body(answer: bytes) -> int:
    """A place in the entries of the last layer."""
    return len(answer) - len(answer) // 4


# -- the connection ----------------------------------------------------------------------------------------------------


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    with pytest.raises(RemoteError, match=r"no answer in 2 attempts.*Is `c2c share` running there") as caught:
        RemoteSharer(url, retries=1)
    assert caught.value.code == "unreachable"


def test_the_connection_is_cut_in_mid_answer(local, proxy):
    model = through(local, proxy.url, retries=2)
    proxy.spoil(cut=4000)
    error = fails(model, "no answer in 3 attempts", "unreachable")
    assert "4000" in str(error) or "closed" in str(error) or "cut off" in str(error)
    assert model.sharers[0].traffic.retries == 2


@pytest.mark.parametrize("at", [0, 60, 250, 2000])
def test_a_cut_anywhere_is_noticed(local, proxy, at):
    """Before the status, in the headers, between and within messages."""
    model = through(local, proxy.url, retries=0)
    proxy.spoil(cut=at)
    fails(model, "1 attempt:", "unreachable")


def test_an_answer_without_its_last_message_is_no_answer(local, proxy):
    """Cut between two messages, where the HTTP framing looks whole."""
    model = through(local, proxy.url, retries=0)

    def without_end(answer: bytes) -> bytes:
        head, chunks = answer.split(b"\r\n\r\n", 1)
        data = unchunked(chunks)
        last = data.rindex(MAGIC)
        head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"transfer-encoding"))
        return head + b"\r\nContent-Length: %d\r\n\r\n" % last + data[:last]

    proxy.spoil(change=without_end)
    fails(model, "ends before its last message", "unreachable")


def test_a_second_attempt_that_succeeds(local, proxy):
    """After a cut, and after a server that was busy: the same answer as ever."""
    model = through(local, proxy.url)
    for spoiled in ({"cut": 5000}, {"answer": BUSY}):
        before = model.sharers[0].traffic.retries
        proxy.spoil(times=1, **spoiled)
        assert generated(model) == generated(local)
        assert model.sharers[0].traffic.retries == before + 1


def test_a_retry_is_the_same_request_with_a_new_nonce(local, proxy):
    model = through(local, proxy.url)
    proxy.requests.clear()
    proxy.spoil(times=1, cut=5000)
    generated(model)
    headers = [FrameReader([body_of_request(raw)], Signer(None), 1 << 20).read().header for raw in proxy.requests]
    assert len(headers) == 2
    assert headers[0]["request"] == headers[1]["request"]
    assert headers[0]["nonce"] != headers[1]["nonce"]


def test_a_busy_server_is_given_up_in_the_end(local, proxy):
    model = through(local, proxy.url, retries=1)
    proxy.spoil(answer=BUSY)
    fails(model, "no answer in 2 attempts: it answered 503", "busy", 503)


@pytest.mark.parametrize("status", [500, 501, 404, 301])
def test_other_statuses_are_not_tried_again(local, proxy, status):
    model = through(local, proxy.url)
    proxy.spoil(answer=b"HTTP/1.1 %d No\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n" % status)
    before = model.sharers[0].traffic.requests
    fails(model, f"answered {status}", "status", status)
    assert model.sharers[0].traffic.requests == before + 1


def test_a_slow_link_runs_into_the_timeout(local, proxy):
    """Bytes go on trickling, so that no single read takes long."""
    model = through(local, proxy.url, timeout=1.5)
    proxy.spoil(rate=2000)
    began = time.monotonic()
    fails(model, r"longer than 1\.5 seconds.*precision='int8'", "timeout")
    assert time.monotonic() - began < 10


def test_a_link_that_falls_silent_runs_into_the_timeout(local):
    sharer, hold = slow_sharer()
    with serving(sharer) as running:
        model = through(local, running.url, timeout=1.0)
        fails(model, r"longer than 1 seconds", "timeout")
        hold.set()


def test_pauses_grow_within_bounds():
    pauses = [Backoff(retries=6, base=0.25, cap=2).pause(count) for count in range(1, 8)]
    assert pauses[-1] is None
    for pause, longest in zip(pauses, (0.25, 0.5, 1, 2, 2, 2), strict=False):
        assert longest / 2 <= pause <= longest
    assert Backoff().pause(1, retry_after=7) == 7
    assert len({Backoff().pause(3) for _ in range(5)}) > 1  # jitter


# -- tampering ---------------------------------------------------------------------------------------------------------


def test_a_changed_body_is_refused(local, proxy):
    model = through(local, proxy.url)
    proxy.answers.clear()
    generated(model)
    place = is_body(proxy.answers[-1])
    proxy.spoil(flip=place)
    before = model.sharers[0].traffic.requests
    fails(model, "does not have the sha256 in its header", "damaged")
    assert model.sharers[0].traffic.requests == before + 1  # not tried again: somebody meddles


def test_a_changed_header_is_refused(local, proxy):
    model = through(local, proxy.url)
    proxy.answers.clear()
    generated(model)
    place = proxy.answers[-1].rindex(b'"layer":2') + 8
    proxy.spoil(flip=place)
    fails(model, "the tag of a header does not fit it", "signature")


def test_every_changed_byte_of_a_message_is_found():
    signer = Signer(KEY)
    whole = b"".join(encode({"kind": "layer", "layer": 1}, body_of({"x": torch.ones(3)}), signer))
    assert FrameReader([whole], signer, 1 << 20).read().header["layer"] == 1
    for at in range(len(whole)):
        changed = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
        with pytest.raises(ValueError):
            FrameReader([changed], signer, 1 << 20).read()


def forged(answer: bytes, change) -> bytes:
    """An answer with its last layer changed by somebody who makes hashes and tags anew, but has no key."""
    head, chunks = answer.split(b"\r\n\r\n", 1)
    head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"transfer-encoding"))
    data = b""
    for part in unchunked(chunks).split(MAGIC)[1:]:
        (length,) = struct.unpack(">I", part[:4])
        header, body = json.loads(part[4 : 4 + length]), part[4 + length + 32 :]
        header, body = change(header, body)
        header |= {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}
        raw = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        data += MAGIC + struct.pack(">I", len(raw)) + raw + hashlib.sha256(raw).digest() + body
    return head + b"\r\nContent-Length: %d\r\n\r\n" % len(data) + data


def unchunked(chunks: bytes) -> bytes:
    data = b""
    while True:
        size, chunks = chunks.split(b"\r\n", 1)
        if int(size, 16) == 0:
            return data
        data, chunks = data + chunks[: int(size, 16)], chunks[int(size, 16) + 2 :]


def zeroed(header, body):
    return (header, body[:-64] + bytes(64)) if header["kind"] == "layer" else (header, body)


def test_a_forged_answer_needs_the_key(local, server, signed, key_file):
    """Without a key a forgery with new hashes passes, and changes what is fused: that is what the key is for."""
    with Proxy(server.port) as between:
        model = through(local, between.url)
        between.spoil(change=lambda answer: forged(answer, zeroed))
        open_cache, own = model.prefill(TEXT).cache, local.prefill(TEXT).cache
        assert not all(torch.equal(a.keys, b.keys) for a, b in zip(open_cache.layers, own.layers, strict=True))
    with Proxy(signed.port) as between:
        model = through(local, between.url, key_file=key_file)
        between.spoil(change=lambda answer: forged(answer, zeroed))
        fails(model, "tag of a header does not fit", "signature")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda header, body: (header | {"layer": 7} if header["kind"] == "layer" else header, body), "not asked for"),
        (
            lambda header, body: (header | {"tokens": "0"} if header["kind"] == "begin" else header, body),
            "other tokens",
        ),
        (lambda header, body: (header | {"number": 9}, body), "came where 0 was expected"),
        (lambda header, body: (header, b"" if header["kind"] == "layer" else body), "got nothing"),
        (lambda header, body: (header, b"no tensors" if header["kind"] == "layer" else body), "holds no tensors"),
        (lambda header, body: (header, body_of({"0.key": torch.ones(1, 2, 3, 12)}) if body else body), "expected"),
        (lambda header, body: (header | {"kind": "end"}, body), "'end'"),
        (lambda header, body: (header | {"drafted": [1]}, body), "a draft was sent"),
        (lambda header, body: (header | {"sharer": None}, body), "identity of the model is missing"),
        (lambda header, body: (header | {"format": "c2c-remote-9"}, body), "c2c-remote-9"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(local, proxy, change, match):
    """A server that is broken or means ill, and signs what it says."""
    model = through(local, proxy.url)
    proxy.spoil(change=lambda answer: forged(answer, change))
    with pytest.raises(RemoteError, match=match):
        generated(model)


def test_a_replayed_answer_is_refused(local, server, signed, key_file):
    for running, options in ((server, {}), (signed, {"key_file": key_file})):
        with Proxy(running.port) as between:
            model = through(local, between.url, **options)
            generated(model)
            between.spoil(answer=between.answers[-1])
            fails(model, "answers another request: it was replayed", "replayed")


def test_a_replayed_request_is_refused(local, signed, key_file):
    with Proxy(signed.port) as between:
        generated(through(local, between.url, key_file=key_file))
        again = httpx.post(signed.url + "/v1/share", content=body_of_request(between.requests[-1]))
    assert (again.status_code, again.json()["error"]["code"]) == (409, "replayed")
    assert "replay" in again.json()["error"]["message"]


def test_an_old_request_is_refused(local, signed, key_file, monkeypatch):
    model = through(local, signed.url, key_file=key_file)
    now = time.time
    for shift, said in ((-3600, "3600 seconds ago"), (3600, "3600 seconds in the future")):
        monkeypatch.setattr(time, "time", lambda shift=shift: now() + shift)
        raw = b"".join(request_of(model.sharers[0], Signer(KEY)))
        monkeypatch.undo()
        answer = httpx.post(signed.url + "/v1/share", content=raw)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "replayed")
        assert said in answer.json()["error"]["message"]


def test_an_old_answer_is_refused(local, signed, key_file, monkeypatch):
    """Signed, for this very request, and an hour old: the server's clock is wrong, or somebody held it back."""
    model = through(local, signed.url, key_file=key_file)
    monkeypatch.setattr("c2c.remote.stall.time", SimpleNamespace(time=lambda: time.time() - 3600))
    fails(model, r"sent 3600 seconds ago.*set the clocks", "replayed")
    monkeypatch.undo()


def test_a_nonce_is_remembered_as_long_as_it_could_pass():
    now = [1000.0]
    fresh = Freshness(window=60, clock=lambda: now[0])
    fresh.check("a", 1059.0)  # from a clock that goes ahead
    now[0] = 1118.0
    with pytest.raises(StaleError, match="replay"):
        fresh.check("a", 1059.0)
    now[0] = 1120.5
    with pytest.raises(StaleError, match="ago"):
        fresh.check("a", 1059.0)
    fresh.check("b", 1120.0)
    assert list(fresh._seen) == ["b"]  # and no longer
    with pytest.raises(StaleError):
        fresh.check("c", float("nan"))


def test_only_one_side_has_a_key_or_another_one(local, server, signed, key_file, tmp_path):
    other = tmp_path / "other.key"
    other.write_bytes(b"another key of enough bytes")
    for url, options in ((server.url, {"key_file": key_file}), (signed.url, {}), (signed.url, {"key_file": other})):
        with pytest.raises(RemoteError, match="Give both sides the same key file") as caught:
            RemoteSharer(url, **options)
        assert (caught.value.code, caught.value.status) == ("signature", 401)


def test_key_files(tmp_path):
    with pytest.raises(KeyFileError, match=r"can't be read.*token_hex"):
        read_key(tmp_path / "none")
    (tmp_path / "short").write_text("abc\n")
    with pytest.raises(KeyFileError, match="has 3 bytes, expected at least 16"):
        read_key(tmp_path / "short")


# -- what a server refuses ---------------------------------------------------------------------------------------------


def request_of(sharer, signer, /, **changes) -> list[bytes]:
    """A request by hand."""
    order = Order(left_pad([[5, 6, 7]], 0), 3, (0, 1, 2), (torch.arange(3),), "float32")
    header = {"kind": "prefill", "sharer": sharer.identity.to_dict()} | order.header()
    header |= {"request": "0" * 32, "nonce": hashlib.sha256(str(time.perf_counter()).encode()).hexdigest()[:32]}
    tensors = order.tensors() | changes.pop("tensors", {})
    return encode(header | {"time": time.time()} | changes, body_of(tensors), signer)


def post(running, pieces, **options) -> tuple[int, dict]:
    answer = httpx.post(running.url + "/v1/share", content=b"".join(pieces), **options)
    return answer.status_code, {} if answer.status_code == 200 else answer.json()["error"]


def test_a_request_by_hand_passes(local, server):
    """So that the refusals below are for what they change."""
    assert post(server, request_of(local.sharers[0], Signer(None)))[0] == 200


@pytest.mark.parametrize("token", [None, "wrong", ""])
def test_a_wrong_token(local, token):
    with serving(local.sharers[0], tokens=["right"]) as running:
        with pytest.raises(RemoteError, match=r"a wrong bearer token|no bearer token") as caught:
            RemoteSharer(running.url, token=token)
        assert (caught.value.code, caught.value.status) == ("unauthorized", 401)
        assert generated(through(local, running.url, token="right")) == generated(local)


def test_a_token_that_is_no_longer_accepted(local, proxy):
    """It is found while asking, and not tried again."""
    model = through(local, proxy.url)
    body = b'{"error": {"code": "unauthorized", "message": "a wrong bearer token was given."}}'
    proxy.spoil(answer=b"HTTP/1.1 401 No\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    fails(model, "a wrong bearer token", "unauthorized", 401)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "expected one message"),
        (b"{}", "ends in the middle"),
        (b"hello, is this c2c?", "begins with b'hell'"),
        (MAGIC + b"\xff\xff\xff\xff", "header of 4294967295 bytes"),
        (MAGIC + b"\x00\x00\x00\x00", "header of 0 bytes"),
        (MAGIC + struct.pack(">I", 4) + b"nojs" + hashlib.sha256(b"nojs").digest(), "not JSON"),
        (MAGIC + struct.pack(">I", 2) + b"[]" + hashlib.sha256(b"[]").digest(), "a JSON list"),
        (
            MAGIC + struct.pack(">I", 100_000) + b"[" * 100_000 + hashlib.sha256(b"[" * 100_000).digest(),
            "not JSON: RecursionError",
        ),
        (MAGIC + struct.pack(">I", 2) + b"{}" + bytes(32), "tag of a header"),
    ],
)
def test_what_is_no_message(server, raw, said):
    answer = httpx.post(server.url + "/v1/share", content=raw)
    assert answer.status_code == (401 if "tag" in said else 400)
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"kind": "steal"}, 400, "kind 'steal'"),
        ({"kind": "hello"}, 400, "kind 'hello'"),
        ({"nonce": "short"}, 400, "nonce must be 32"),
        ({"request": 5}, 400, "request must be 32"),
        ({"time": "now"}, 400, "time must be"),
        ({"sharer": None}, 400, "identity"),
        ({"sharer": {"name": "x"}}, 400, "identity"),
        ({"stop": 0}, 400, "stop is 0"),
        ({"stop": 4}, 400, "stop is 4"),
        ({"stop": True}, 400, "stop is True"),
        ({"layers": []}, 400, "layers must be"),
        ({"layers": [1, 0]}, 400, "layers must be"),
        ({"layers": "all"}, 400, "layers must be"),
        ({"layers": [0, 3]}, 422, r"layers [3] are not shared"),
        ({"layers": [-1]}, 422, r"layers [-1] are not shared"),
        ({"precision": "int3"}, 422, "precision 'int3'"),
        ({"precision": ["int8"]}, 422, "precision ['int8']"),
        ({"fuser": "abc"}, 422, "does not have the fuser"),
        ({"draft_tokens": -1}, 400, "draft_tokens is -1"),
        ({"draft_tokens": 8190}, 413, "8193 tokens"),
        ({"tokens": "0"}, 400, "hash of the token ids"),
        ({"tensors": {"ids": torch.ones(3, dtype=torch.int32)}}, 400, "no int32 tensor 'ids'"),
        ({"tensors": {"ids": torch.ones(1, 3)}}, 400, "no int32 tensor 'ids'"),
        ({"tensors": {"ids": torch.full((1, 3), 512, dtype=torch.int32)}}, 422, "the model knows 0 to 511"),
        ({"tensors": {"ids": torch.full((1, 3), -1, dtype=torch.int32)}}, 422, "token ids from -1"),
        ({"tensors": {"positions": torch.full((1, 3), 600, dtype=torch.int32)}}, 413, "made for 512"),
        ({"tensors": {"columns": torch.tensor([0, 1, 5], dtype=torch.int32)}}, 400, "columns must ascend"),
        ({"tensors": {"columns": torch.tensor([0, 1, 1], dtype=torch.int32)}}, 400, "columns must ascend"),
        ({"tensors": {"counts": torch.tensor([4], dtype=torch.int32)}}, 400, "do not add up"),
        ({"tensors": {"mask": torch.ones(1, 2, dtype=torch.int32)}}, 400, "no int32 tensor 'mask'"),
    ],
)
def test_a_request_that_is_signed_but_wrong(local, server, changes, status, said):
    found, error = post(server, request_of(local.sharers[0], Signer(None), **changes))
    assert found == status
    assert said in error["message"]


def test_an_unknown_layer_is_an_error_for_the_client(local, server):
    model = through(local, server.url)
    model.sharers[0]._greeting.__dict__["layers"] = frozenset(range(9))  # what a client that is not ours might ask
    model.fusers[0].config.layer_map = [0, 1, 2, 2, 7]
    try:
        fails(model, r"layers \[7\] are not shared", "layer", 422)
    finally:
        model.fusers[0].config.layer_map = [0, 0, 1, 2, 2]


def test_a_request_that_is_too_long(local):
    limits = Limits(tokens=60, body_bytes=3000, requests_per_minute=0)
    with serving(local.sharers[0], limits=limits) as running:
        answer = httpx.post(running.url + "/v1/share", content=bytes(3001))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_long")
        pieces = (bytes(1000) for _ in range(100))  # of a length that is not told before
        assert httpx.post(running.url + "/v1/share", content=pieces).status_code == 413
        model = through(local, running.url)
        with pytest.raises(RemoteError, match=r"takes 60\. Shorten the prompt") as caught:
            model.generate("word " * 60)
        assert (caught.value.code, caught.value.status) == ("too_long", 413)
        assert generated(model) == generated(local)


def test_too_many_requests(local):
    with serving(local.sharers[0], limits=Limits(requests_per_minute=3), tokens=["a", "b"]) as running:
        model = through(local, running.url, token="a", timeout=5)
        generated(model)
        generated(model)
        answer = httpx.post(running.url + "/v1/share", headers={"Authorization": "Bearer a"})
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        fails(model, "more than 3 requests in a minute", "rate", 429)  # a minute is longer than its timeout
        assert generated(through(local, running.url, token="b")) == generated(local)  # counted by token


def test_the_rate_is_over_the_last_minute():
    now = [0.0]
    limiter = RateLimiter(2, clock=lambda: now[0])
    assert [limiter.wait("a"), limiter.wait("a"), limiter.wait("b")] == [None, None, None]
    now[0] = 20.0
    assert limiter.wait("a") == 40
    now[0] = 60.1
    assert limiter.wait("a") is None
    now[0] = 200.0
    limiter.wait("c")
    assert list(limiter._times) == ["c"]  # callers are forgotten
    assert all(RateLimiter(0).wait("a") is None for _ in range(1000))


def slow_sharer():
    """A sharer that waits before its last layer until it may go on, as ``local``'s otherwise."""
    sharer, hold = Sharer(build("qwen2", 2), tokenizer("llama3"), "qwen2"), threading.Event()

    def wait(*_):
        hold.wait(60)

    sharer.model.get_decoder().layers[2].register_forward_pre_hook(wait)
    hold.set()
    _ = sharer.identity
    hold.clear()
    return sharer, hold


def test_the_server_limits_the_time_of_a_request(local):
    sharer, hold = slow_sharer()
    with serving(sharer, limits=Limits(seconds=1.0, requests_per_minute=0)) as running:
        model = through(local, running.url, retries=0)
        threading.Timer(1.5, hold.set).start()
        with pytest.raises(RemoteError, match=r"time limit|cut off|closed") as caught:
            generated(model)
        assert caught.value.code in ("timeout", "unreachable")
        assert generated(model) == generated(local)


def test_a_full_server_sends_away_and_the_client_comes_again(local):
    sharer, hold = slow_sharer()
    with serving(sharer, limits=Limits(waiting=1, requests_per_minute=0)) as running:
        first, second = through(local, running.url), through(local, running.url)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(generated(first)))
        thread.start()
        while httpx.get(running.url + "/health").json()["waiting"] == 0:
            time.sleep(0.05)
        assert post(running, request_of(sharer, Signer(None)))[0] == 503
        threading.Timer(1.0, hold.set).start()
        assert generated(second) == generated(local)
        thread.join()
        assert answers == [generated(local)]
        assert second.sharers[0].traffic.retries >= 1


def test_a_client_that_leaves_stops_the_work(local):
    """The model is in its second layer when the client gives up: it does not begin the third."""
    sharer, hold, third = Sharer(build("qwen2", 2), tokenizer("llama3"), "qwen2"), threading.Event(), []
    assert sharer.identity.kv  # reading its geometry runs the model once
    layers = sharer.model.get_decoder().layers
    layers[1].register_forward_pre_hook(lambda *_: hold.wait(60) and None)
    layers[2].register_forward_pre_hook(lambda *_: third.append(1))
    with serving(sharer) as running:
        with pytest.raises(RemoteError, match="longer than"):
            generated(through(local, running.url, timeout=1.0))
        assert running.logged(2)[1]["code"] == "cut"
        hold.set()
        while httpx.get(running.url + "/health").json()["waiting"]:
            time.sleep(0.05)
        assert third == []
        assert generated(through(local, running.url)) == generated(local)
        assert third == [1]


def test_a_model_that_fails_is_an_error_and_the_server_goes_on(local):
    sharer = Sharer(build("qwen2", 2), tokenizer("llama3"), "qwen2")
    _ = sharer.identity

    def fail(*_):
        raise MemoryError("no more")

    with serving(sharer) as running:
        model = through(local, running.url)
        hook = sharer.model.get_decoder().layers[1].register_forward_pre_hook(fail)
        fails(model, "the model failed: MemoryError", "failed", 200)
        hook.remove()
        assert generated(model) == generated(local)


# -- another model -----------------------------------------------------------------------------------------------------


def test_a_request_for_another_model(local, server):
    strange = Sharer(build("qwen2", 9), tokenizer("llama3"), "strange")
    status, error = post(server, request_of(strange, Signer(None)))
    assert (status, error["code"]) == (409, "mismatch")
    assert error["sharer"]["weights"] == local.sharers[0].identity.weights


def test_another_model_behind_the_same_address(local, server, monkeypatch):
    """It was exchanged after the client had connected."""
    strange = Sharer(build("qwen2", 9), tokenizer("llama3"), "strange")
    with serving(strange) as other, Proxy(server.port) as between:
        for policy in ("raise", "receiver_only"):  # a mismatch is a mistake, not a loss
            between.port = server.port
            model = through(local, between.url, on_failure=policy)
            between.port = other.port
            with pytest.raises(MismatchError, match=r"weights(.|\n)*Another model is served"):
                generated(model)


def test_a_server_that_does_not_check_is_checked(local, proxy):
    """The client compares by itself before any entry is read."""
    model = through(local, proxy.url)

    def other(header, body):
        return (header | {"sharer": header["sharer"] | {"weights": "0"}} if header["kind"] == "begin" else header), body

    proxy.spoil(change=lambda answer: forged(answer, other))
    with pytest.raises(MismatchError, match="weights"):
        generated(model)


def test_a_server_whose_claims_do_not_agree(local, proxy):
    """Its tokenizer is not the one of its identity."""

    def other(answer: bytes) -> bytes:
        head, data = answer.split(b"\r\n\r\n", 1)
        (length,) = struct.unpack(">I", data[4:8])
        header = json.loads(data[8 : 8 + length])
        facts = json.loads(zlib.decompress(data[8 + length + 32 :]))
        facts["sharer"]["tokenizer"] = "0" * 32
        body = zlib.compress(json.dumps(facts).encode())
        whole = b"".join(encode(header, body, Signer(None)))
        head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length"))
        return head + b"\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole

    proxy.spoil(change=other)
    with pytest.raises(MismatchError, match="tokenizer"):
        RemoteSharer(proxy.url)


def test_a_greeting_that_does_not_end_is_refused(monkeypatch):
    """A few bytes that inflate to more than is held."""
    monkeypatch.setattr("c2c.remote.greeting._LARGEST", 1 << 16)
    bomb = zlib.compress(b" " * (1 << 20))
    assert len(bomb) < 2000
    with pytest.raises(RemoteError, match="cut off or too long"):
        Greeting.from_frame(Frame({"kind": "hello"}, bomb), "http://x")
    with pytest.raises(RemoteError, match="can't be read"):
        Greeting.from_frame(Frame({"kind": "hello"}, zlib.compress(b"[]")), "http://x")


@pytest.mark.parametrize("url", ["ftp://x", "localhost:8650", "http://", "http://user:secret@127.0.0.1:1"])
def test_a_url_that_is_none(url):
    with pytest.raises(RemoteError, match=r"Expected https://host:port") as caught:
        RemoteSharer(url)
    assert "secret" not in str(caught.value)


def test_asking_others_without_tls_warns():
    with pytest.warns(UserWarning, match="without TLS"), pytest.raises(RemoteError, match="no answer"):
        RemoteSharer("http://host.invalid:1", retries=0)


@pytest.mark.parametrize("token", ["Größe", "a\nb"])
def test_a_token_that_no_header_can_hold(token):
    with pytest.raises(RemoteError, match="printable ASCII"):
        RemoteSharer("http://127.0.0.1:1", token=token)


def test_a_policy_that_is_none():
    with pytest.raises(RemoteError, match="expected 'raise' or 'receiver_only'"):
        RemoteSharer("http://127.0.0.1:1", on_failure="ignore")


# -- the receiver alone ------------------------------------------------------------------------------------------------


FAULTS = {
    "cut": {"cut": 4000},
    "busy": {"answer": BUSY},
    "forged": {"change": lambda answer: forged(answer, lambda h, b: (h | {"nonce": "0"}, b))},
    "no http": {"answer": b"what?\r\n\r\n"},
    "refused": {"answer": b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n"},
    "slow": {"rate": 1500},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("batch", [False, True])
def test_receiver_only_is_the_receiver_alone_bit_for_bit_and_says_so(local, proxy, fault, batch):
    messages = [TEXT, "Hi"] if batch else TEXT
    model = through(local, proxy.url, on_failure="receiver_only", retries=0, timeout=2.0)
    proxy.spoil(**FAULTS[fault])
    prepared = model.prefill(messages)
    tokens = local.receiver.encode(messages)
    own = local.receiver.prefill(tokens, tokens.length - 1)
    assert torch.equal(
        local.receiver.next_logits(prepared.tokens, prepared.cache), local.receiver.next_logits(tokens, own)
    )
    answers, alone = model.generate(messages, **GREEDY), local.receiver.answer(messages, **GREEDY)
    for one, other in zip(*(x if batch else [x] for x in (answers, alone)), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.prompt_tokens == other.prompt_tokens
    report = prepared.report
    assert len(report.notes) == 1
    assert report.notes[0].startswith("receiver only: the ")
    assert proxy.url in report.notes[0]
    assert (report.fused_tokens, report.fused_layers, report.sharer_bytes) == (0, [], 0)
    assert report.trained == local.trained
    assert report.gate_openness is None
    assert set(report.skipped_layers.values()) == {"a sharer was lost"}
    json.dumps(report.to_dict())
    proxy.spoil(times=0)
    again = model.generate(TEXT, **GREEDY)
    assert again.ids.tolist() == generated(local)  # it is back, and nobody has to do anything
    assert again.report.notes == []


def test_receiver_only_for_private_context():
    ours = private()
    with serving(ours.sharers[0]) as running, Proxy(running.port) as between:
        sharer = RemoteSharer(between.url, on_failure="receiver_only", retries=0)
        model = C2CModel(ours.receiver, [sharer], list(ours.fusers))
        between.spoil(cut=3000)
        answer = model.generate(QUESTION, sharer_messages=DOCUMENT, **GREEDY)
        assert answer.ids.tolist() == ours.receiver.answer(QUESTION, **GREEDY).ids.tolist()
        assert answer.report.notes[0].startswith("receiver only: ")
        assert answer.report.memory_slots == 0
        assert answer.report.trained
        with pytest.raises(SharerLost):  # who asks it directly is told
            sharer.read(DOCUMENT)


def test_receiver_only_for_token_ids_and_for_several_sharers(local, proxy):
    lost = through(local, proxy.url, on_failure="receiver_only", retries=0)
    mixed = C2CModel(local.receiver, [local.sharers[0], lost.sharers[0]], [local.fusers[0]] * 2)
    ids = torch.randint(1, 200, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([0, 1, 1, 1, 1, 1, 1, 0]).bool()
    proxy.spoil(cut=3000)
    alone = local.receiver.generate(
        left_pad(ids.tolist(), 0), local.receiver.prefill(left_pad(ids.tolist(), 0), 7), **GREEDY
    )
    assert torch.equal(lost.generate_ids(ids, ids, fuse_mask=mask, **GREEDY), alone)
    answer = mixed.generate(TEXT, **GREEDY)
    assert answer.ids.tolist() == local.receiver.answer(TEXT, **GREEDY).ids.tolist()
    assert answer.report.notes[0].startswith("receiver only: ")


def test_it_tells_how_the_last_call_ended(local, proxy):
    model = through(local, proxy.url, retries=0)
    sharer = model.sharers[0]
    assert sharer.lost is None
    proxy.spoil(cut=4000)
    error = fails(model, "1 attempt:", "unreachable")
    assert (sharer.lost.code, sharer.lost.message) == ("unreachable", str(error))
    assert sharer.for_fuser(model.fusers[0]).lost is sharer.lost
    proxy.spoil(times=0)
    generated(model)
    assert sharer.lost is None


def test_a_lost_sharer_is_left_in_peace_for_a_while(local, proxy):
    """After a loss that took time, if that is asked for."""
    model = through(local, proxy.url, retries=0, rest=1.0)
    proxy.spoil(cut=4000)
    fails(model, "1 attempt:", "unreachable")
    proxy.spoil(times=0)
    asked = model.sharers[0].traffic.requests
    fails(model, r"1 attempt:.* It will be asked again in [01] s\.", "unreachable")
    assert model.sharers[0].traffic.requests == asked
    time.sleep(1.1)
    assert generated(model) == generated(local)
    proxy.spoil(answer=b"HTTP/1.1 401 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    fails(model, "answered 401", "status", 401)
    proxy.spoil(times=0)
    assert generated(model) == generated(local), "a refusal takes no time: it is asked again at once"


def test_a_loss_rests_as_long_as_it_took():
    now, standing = [0.0], Standing(rest=5.0, clock=lambda: now[0])

    def call(seconds, error=None):
        with standing.call():
            now[0] += seconds
            if error is not None:
                raise error

    with pytest.raises(RemoteError):
        call(60, RemoteError("it took long", "timeout"))
    for now[0], left in ((61.0, 59), (119.0, 1)):
        with pytest.raises(RemoteError, match=f"it took long It will be asked again in {left} s"):
            call(0)
    now[0] = 120.0
    call(1)
    with pytest.raises(RemoteError):
        call(1, RemoteError("one prompt was too long", "too_long"))
    assert standing.lost is None, "it is there"


def test_a_prompt_that_is_wrong_is_no_loss(local, server):
    """Mistakes of the user are errors under every policy."""
    from c2c.errors import PromptError

    model = through(local, server.url, on_failure="receiver_only")
    with pytest.raises(PromptError):
        model.generate("long " * 600)
    with pytest.raises(PromptError):
        model.generate("")


def test_errors_are_seen_through_a_stream(local, proxy):
    model = through(local, proxy.url, retries=0)
    proxy.spoil(cut=3000)
    with pytest.raises(RemoteError):
        "".join(model.stream(TEXT, **GREEDY))


def test_connections_speak_http2_where_it_is_installed(monkeypatch):
    """The option reaches httpx; without the package for it the client does without."""
    seen = []
    with monkeypatch.context() as patched:
        patched.setattr(httpx, "Client", lambda **options: seen.append(options["http2"]))
        Connection("http://127.0.0.1:1", None, Signer(None), True, 1.0, Backoff())
        patched.setattr("importlib.util.find_spec", lambda name: None)
        Connection("http://127.0.0.1:1", None, Signer(None), True, 1.0, Backoff())
    assert seen == [True, False]
