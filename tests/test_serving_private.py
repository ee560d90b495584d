"""Private context and handoffs over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import pytest

import remote_rig
from c2c import C2CModel
from c2c.remote import RemoteSharer
from c2c.systems.base import with_passage
from c2c.systems.text_to_text import passage_to_text, summary_request
from serving_harness import NAME, PATIENCE, model, running, user
from test_private import DOCUMENT, LONGER, private

HANDOFFS = "/v1/c2c/handoffs"
QUESTION = "Where does the fox sleep?"


@pytest.fixture(scope="module")
def pair() -> C2CModel:
    return private()


@pytest.fixture(scope="module")
def server(pair):
    with running(pair) as found:
        yield found


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def alone(pair, question, given) -> str:
    return pair.generate(question, sharer_messages=given, max_new_tokens=6, do_sample=False).text


def test_the_sharers_messages_reach_the_answer(server, pair):
    expected = alone(pair, QUESTION, DOCUMENT)
    assert expected != alone(pair, QUESTION, LONGER)
    for given in (DOCUMENT, user(DOCUMENT), [user(DOCUMENT)], [DOCUMENT]):
        assert text_of(server.chat(QUESTION, c2c={"sharer_messages": given})) == expected
    report = server.chat(QUESTION, c2c={"sharer_messages": DOCUMENT, "report": True}).json()["c2c"]["report"]
    expected_report = pair.generate(QUESTION, sharer_messages=DOCUMENT, max_new_tokens=1).report.to_dict()
    assert report | {"seconds": 0} == expected_report | {"seconds": 0}
    assert report["memory_slots"] > 5


def test_the_openai_client_sends_them_too(server, pair):
    found = server.client().chat.completions.create(
        model=NAME,
        messages=user(QUESTION),
        max_tokens=6,
        temperature=0,
        extra_body={"c2c": {"sharer_messages": DOCUMENT}},
    )
    assert found.choices[0].message.content == alone(pair, QUESTION, DOCUMENT)
    result = pair.generate(QUESTION, sharer_messages=DOCUMENT, max_new_tokens=6)
    assert found.usage.prompt_tokens == result.prompt_tokens


def test_a_handoff_is_read_once_and_asked_many_times(server, pair, monkeypatch):
    read = []
    original = type(pair.sharers[0]).read
    monkeypatch.setattr(type(pair.sharers[0]), "read", lambda *a, **k: read.append(1) or original(*a, **k))
    created = server.post(HANDOFFS, json={"messages": DOCUMENT})
    assert created.status_code == 201
    about = created.json()
    assert about["object"] == "c2c.handoff"
    assert about["tokens"] == len(pair.sharers[0].encode(DOCUMENT).ids[0])
    assert about["bytes"] > 1000
    questions = [QUESTION, "Who?", "And by the sea, what is there?"]
    with ThreadPoolExecutor(3) as clients:
        found = list(clients.map(lambda q: text_of(server.chat(q, c2c={"handoff": about["id"]})), questions))
    assert len(read) == 1
    monkeypatch.undo()
    assert found == [alone(pair, question, DOCUMENT) for question in questions]
    assert [stored["id"] for stored in server.get(HANDOFFS).json()["data"]] == [about["id"]]
    assert server.get(f"{HANDOFFS}/{about['id']}").json() == about
    assert server.metric("c2c_handoffs") == 1
    assert server.metric("c2c_handoff_bytes") == about["bytes"]
    assert httpx.delete(f"{server.url}{HANDOFFS}/{about['id']}").json()["deleted"] is True
    gone = server.chat(QUESTION, c2c={"handoff": about["id"]})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "handoff_not_found")
    assert httpx.delete(f"{server.url}{HANDOFFS}/{about['id']}").status_code == 404
    assert server.metric("c2c_handoffs") == 0


def test_handoffs_in_8_bits_and_with_a_draft(server, pair):
    whole, small, drafted = (
        server.post(HANDOFFS, json={"messages": user(DOCUMENT)} | fields).json()
        for fields in ({}, {"precision": "int8"}, {"draft_tokens": 4})
    )
    assert small["bytes"] < whole["bytes"] / 2
    assert drafted["tokens"] == whole["tokens"] + 4
    packed = pair.sharers[0].read(DOCUMENT).to("int8")
    assert text_of(server.chat(QUESTION, c2c={"handoff": small["id"]})) == alone(pair, QUESTION, packed)
    with_draft = pair.sharers[0].read(DOCUMENT, draft_tokens=4)
    assert text_of(server.chat(QUESTION, c2c={"handoff": [drafted["id"]]})) == alone(pair, QUESTION, with_draft)


def test_ways_without_a_cache_read_the_context_as_text(server, pair):
    settings = {"max_new_tokens": 6, "do_sample": False}
    fields = {"c2c": {"sharer_messages": DOCUMENT}}
    expected = pair.sharers[0].answer(with_passage(user(QUESTION), DOCUMENT), **settings)
    assert text_of(server.chat(QUESTION, model=f"{NAME}/sharer", **fields)) == expected.text
    request = summary_request(DOCUMENT, 6)
    told = passage_to_text(pair.receiver, pair.sharers[0], user(QUESTION), request, message_tokens=6, **settings)
    assert text_of(server.chat(QUESTION, model=f"{NAME}/text", **fields)) == told.answer.text
    assert text_of(server.chat(QUESTION, model=f"{NAME}/receiver")) == pair.receiver.answer(QUESTION, **settings).text


def test_documents_are_never_mixed_up(pair):
    """Each client has a document and a question that only it knows."""
    asked = [(f"Key {n}?", f"The key {n} hangs behind clock {n * 37 % 101}. " * (1 + n % 4)) for n in range(12)]
    singles = [alone(pair, question, document) for question, document in asked]
    with running(pair, max_batch=4, window=PATIENCE) as server, ThreadPoolExecutor(12) as clients:
        found = list(
            clients.map(lambda a: server.chat(a[0], c2c={"sharer_messages": a[1], "report": True}).json(), asked)
        )
    assert [answer["choices"][0]["message"]["content"] for answer in found] == singles
    assert len(set(singles)) > 8
    assert [answer["c2c"]["batch"] for answer in found] == [4] * 12


def test_wrong_private_context_is_refused(server, pair):
    def refused(status, code, **fields):
        response = server.chat(QUESTION, **fields)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)

    refused(400, "missing_private_context")
    refused(400, "invalid_value", c2c={"sharer_messages": []})
    refused(400, "invalid_value", c2c={"sharer_messages": [{"role": "user", "content": ""}]})
    refused(400, "unknown_parameter", c2c={"sharer_messages": [{"role": "user", "content": "a", "x": 1}]})
    refused(400, "invalid_value", c2c={"sharer_messages": ["a", "b"]})
    refused(400, "invalid_value", c2c={"sharer_messages": DOCUMENT}, model=f"{NAME}/receiver")
    refused(404, "handoff_not_found", c2c={"handoff": "handoff-123"})
    refused(400, "context_length_exceeded", c2c={"sharer_messages": "a dog " * 400})
    refused(400, "context_length_exceeded", c2c={"sharer_messages": "a dog " * 200}, max_tokens=400)
    made = server.post(HANDOFFS, json={"messages": DOCUMENT}).json()["id"]
    refused(400, "invalid_value", c2c={"handoff": made}, model=f"{NAME}/sharer")
    completion = server.post("/v1/completions", json={"model": NAME, "prompt": "a"})
    assert completion.status_code == 400


def test_wrong_handoffs_are_refused(server):
    for fields, status, code in (
        ({}, 400, "missing_parameter"),
        ({"messages": DOCUMENT, "precision": "int4"}, 400, "invalid_value"),
        ({"messages": DOCUMENT, "sharer": 3}, 400, "invalid_value"),
        ({"messages": DOCUMENT, "extra": 3}, 400, "unknown_parameter"),
        ({"messages": 5}, 400, "invalid_value"),
        ({"messages": "a dog " * 400}, 400, "context_length_exceeded"),
    ):
        response = server.post(HANDOFFS, json=fields)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_a_shared_fuser_hands_nothing_over():
    with running(model()) as server:
        response = server.post(HANDOFFS, json={"messages": DOCUMENT})
        assert response.status_code == 400
        assert "memory" in response.json()["error"]["message"]


def test_the_server_keeps_so_many_handoffs(pair):
    size = pair.sharers[0].read(DOCUMENT).nbytes
    with running(pair, handoffs=2, max_handoff_bytes=int(2.5 * size)) as server:
        assert [server.post(HANDOFFS, json={"messages": DOCUMENT}).status_code for _ in range(3)] == [201, 201, 429]
        too_large = server.post(HANDOFFS, json={"messages": DOCUMENT * 5})
        assert too_large.status_code == 429, "full, whatever its size"
    with running(pair, handoff_mb=1.5 * size / 1e6) as server:
        assert server.post(HANDOFFS, json={"messages": DOCUMENT * 5}).status_code == 413
        assert server.post(HANDOFFS, json={"messages": DOCUMENT}).status_code == 201
        assert server.post(HANDOFFS, json={"messages": DOCUMENT}).status_code == 429


def test_handoffs_belong_to_a_key(pair):
    with running(pair, api_key=("first", "second")) as server:
        ours, theirs = ({"headers": {"Authorization": f"Bearer {key}"}} for key in ("first", "second"))
        made = server.post(HANDOFFS, json={"messages": DOCUMENT}, **ours).json()["id"]
        body = {"model": NAME, "messages": user(QUESTION), "max_tokens": 2, "c2c": {"handoff": made}}
        assert server.post("/v1/chat/completions", json=body, **ours).status_code == 200
        assert server.post("/v1/chat/completions", json=body, **theirs).status_code == 404
        assert server.get(HANDOFFS, **theirs).json()["data"] == []
        assert server.get(f"{HANDOFFS}/{made}", **theirs).status_code == 404


def test_handoffs_expire(pair):
    with running(pair) as server:
        made = server.post(HANDOFFS, json={"messages": DOCUMENT, "ttl_seconds": 0.05}).json()["id"]
        server.until(lambda: server.get(f"{HANDOFFS}/{made}").status_code == 404)
        assert server.metric("c2c_handoffs") == 0


def test_a_sharer_on_another_machine(pair):
    """It reads, shares and hands over; it does not answer."""
    with remote_rig.serving(pair.sharers[0]) as share, closing(RemoteSharer(share.url)) as sharer:
        private_ = C2CModel(pair.receiver, [sharer], list(pair.fusers))
        with running(private_) as server:
            assert [card["id"] for card in server.get("/v1/models").json()["data"]] == [NAME, f"{NAME}/receiver"]
            expected = alone(pair, QUESTION, DOCUMENT)
            assert text_of(server.chat(QUESTION, c2c={"sharer_messages": DOCUMENT})) == expected
            made = server.post(HANDOFFS, json={"messages": DOCUMENT}).json()
            assert text_of(server.chat(QUESTION, c2c={"handoff": made["id"]})) == expected
            kept = private_.sharers[0].for_fuser(private_.fusers[0]).read(DOCUMENT)
            assert made["bytes"] == sum(part.nbytes for pair in kept.layers for part in pair) > kept.nbytes
            refused = server.post(HANDOFFS, json={"messages": DOCUMENT, "precision": "int8"})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "precision")
            assert server.chat(model=f"{NAME}/text").status_code == 404
        shared = model()
        remote = C2CModel(shared.receiver, [RemoteSharer(share.url)], list(shared.fusers))
        with running(remote) as server:
            assert text_of(server.chat("hello there")) == (
                shared.generate("hello there", max_new_tokens=6, do_sample=False).text
            )
