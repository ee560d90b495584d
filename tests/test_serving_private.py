"""Private context and handoffs over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from c2c import C2CModel
from c2c.errors import SystemUnavailableError
from c2c.systems import SystemOptions, make_system
from serving_harness import NAME, PATIENCE, error_of, model, running, text_of, user
from test_messages import WITH_TOOLS
from test_private import DOCUMENT, LONGER
from tiny import memory_pair

HANDOFFS = "/v1/c2c/handoffs"
QUESTION = "Where does the fox sleep?"


@pytest.fixture(scope="module")
def pair() -> C2CModel:
    return memory_pair()


@pytest.fixture(scope="module")
def server(pair):
    with running(pair) as found:
        yield found


def library(pair, question, given, system="c2c") -> str:
    """What the library answers."""
    made = make_system(system, pair, SystemOptions(message_tokens=6))
    return made.generate(question, given, max_new_tokens=6, do_sample=False).text


def create(server, **fields) -> dict:
    """A handoff of the document."""
    response = server.post(HANDOFFS, json={"messages": DOCUMENT} | fields)
    assert response.status_code == 201, response.text
    return response.json()


def test_the_sharers_messages_reach_the_answer(server, pair):
    expected = library(pair, QUESTION, DOCUMENT)
    assert expected != library(pair, QUESTION, LONGER)
    for given in (DOCUMENT, user(DOCUMENT), [user(DOCUMENT)], [DOCUMENT]):
        assert text_of(server.chat(QUESTION, c2c={"sharer_messages": given})) == expected
    found = server.chat(QUESTION, c2c={"sharer_messages": DOCUMENT, "report": True}).json()
    result = pair.generate(QUESTION, sharer_messages=DOCUMENT, max_new_tokens=1)
    assert found["c2c"]["report"] | {"seconds": 0} == result.report.to_dict() | {"seconds": 0}
    assert found["c2c"]["report"]["memory_slots"] > 5
    assert found["usage"]["prompt_tokens"] == result.prompt_tokens


def test_a_handoff_is_prefilled_once_and_used_many_times(server, pair):
    made = create(server)
    assert made["object"] == "c2c.handoff"
    assert made["tokens"] == pair.sharers[0].encode(DOCUMENT).length
    assert made["bytes"] > 1000
    questions = [QUESTION, "Who?", "And by the sea, what is there?"]
    prefills = []
    hook = pair.sharers[0].model.register_forward_pre_hook(lambda *_: prefills.append(1))
    found = [text_of(one) for one in server.chat_all(questions, c2c={"handoff": made["id"]})]
    hook.remove()
    assert prefills == []
    assert found == [library(pair, question, DOCUMENT) for question in questions]
    assert [stored["id"] for stored in server.get(HANDOFFS).json()["data"]] == [made["id"]]
    assert server.get(f"{HANDOFFS}/{made['id']}").json() == made
    assert (server.metric("c2c_handoffs"), server.metric("c2c_handoff_bytes")) == (1, made["bytes"])
    assert httpx.delete(f"{server.url}{HANDOFFS}/{made['id']}").json()["deleted"] is True
    assert error_of(server.chat(QUESTION, c2c={"handoff": made["id"]}))["code"] == "handoff_not_found"
    assert httpx.delete(f"{server.url}{HANDOFFS}/{made['id']}").status_code == 404
    assert server.metric("c2c_handoffs") == server.metric("c2c_handoff_bytes") == 0


def test_handoffs_in_8_bits_and_with_a_draft(server, pair):
    whole, small, drafted = create(server), create(server, precision="int8"), create(server, draft_tokens=4)
    assert small["bytes"] < whole["bytes"] / 2
    assert drafted["tokens"] == whole["tokens"] + 4
    read = pair.sharers[0].read
    for made, handoff in ((small, read(DOCUMENT).to("int8")), (drafted, read(DOCUMENT, draft_tokens=4))):
        assert text_of(server.chat(QUESTION, c2c={"handoff": [made["id"]]})) == library(pair, QUESTION, handoff)


@pytest.mark.parametrize("system", ["sharer", "text"])
def test_systems_without_a_cache_read_the_context_as_text(server, pair, system):
    found = server.chat(QUESTION, model=f"{NAME}/{system}", c2c={"sharer_messages": DOCUMENT})
    assert text_of(found) == library(pair, QUESTION, DOCUMENT, system)


def test_documents_are_never_mixed_up(pair):
    """Each client has a document and a question of its own; half of them as handoffs."""
    asked = [(f"Key {n}?", f"The key {n} hangs behind clock {n * 37 % 101}. " * (1 + n % 4)) for n in range(8)]
    singles = [library(pair, question, document) for question, document in asked]
    assert len(set(singles)) > 5
    with running(pair, max_batch=4, window=PATIENCE) as server, ThreadPoolExecutor(8) as clients:
        given = [
            {"handoff": create(server, messages=document)["id"]} if n % 2 else {"sharer_messages": document}
            for n, (_, document) in enumerate(asked)
        ]
        fields = [c2c | {"report": True} for c2c in given]
        found = list(clients.map(lambda n: server.chat(asked[n][0], c2c=fields[n]).json(), range(8)))
    assert [answer["choices"][0]["message"]["content"] for answer in found] == singles
    assert [answer["c2c"]["batch"] for answer in found] == [4] * 8


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({}, 400, "missing_private_context"),
        ({"c2c": {"sharer_messages": []}}, 400, "invalid_value"),
        ({"c2c": {"sharer_messages": user("")}}, 400, "invalid_value"),
        ({"c2c": {"sharer_messages": ["a", "b"]}}, 400, "invalid_value"),
        ({"c2c": {"sharer_messages": DOCUMENT}, "model": f"{NAME}/receiver"}, 400, "invalid_value"),
        ({"c2c": {"sharer_messages": user("a") * 2}, "model": f"{NAME}/sharer"}, 400, "invalid_value"),
        ({"c2c": {"handoff": "handoff-123"}}, 404, "handoff_not_found"),
        ({"c2c": {"sharer_messages": "a dog " * 400}}, 400, "context_length_exceeded"),
        ({"c2c": {"sharer_messages": "a dog " * 200}, "max_tokens": 400}, 400, "context_length_exceeded"),
    ],
)
def test_wrong_private_context_is_refused(server, fields, status, code):
    error = error_of(server.chat(QUESTION, **fields))
    assert (error["status"], error["code"]) == (status, code)


def test_handoffs_and_raw_text_have_limits(server):
    made = create(server)["id"]
    assert server.chat(QUESTION, c2c={"handoff": made}, model=f"{NAME}/text").status_code == 400
    body = {"model": NAME, "prompt": "a", "c2c": {"handoff": made}}
    assert error_of(server.post("/v1/completions", json=body))["param"] == "prompt"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"messages": ...}, "missing_parameter"),
        ({"precision": "int4"}, "invalid_value"),
        ({"sharer": 3}, "invalid_value"),
        ({"extra": 3}, "unknown_parameter"),
        ({"messages": 5}, "invalid_value"),
        ({"messages": "a dog " * 400}, "context_length_exceeded"),
    ],
)
def test_wrong_handoffs_are_refused(server, fields, code):
    body = {name: value for name, value in ({"messages": DOCUMENT} | fields).items() if value is not ...}
    error = error_of(server.post(HANDOFFS, json=body))
    assert (error["status"], error["code"]) == (400, code)


def test_a_shared_fuser_hands_nothing_over():
    with running(model(), systems=["c2c"]) as server:
        assert "memory" in error_of(server.post(HANDOFFS, json={"messages": DOCUMENT}))["message"]
    with pytest.raises(SystemUnavailableError, match="nobody"), running(model(), systems=["nobody"]):
        pass


def test_the_server_keeps_so_many_handoffs(pair):
    size = pair.sharers[0].read(DOCUMENT).nbytes
    with running(pair, handoffs=2) as server:
        assert [server.post(HANDOFFS, json={"messages": DOCUMENT}).status_code for _ in range(3)] == [201, 201, 429]
    with running(pair, handoff_mb=1.5 * size / 1e6) as server:
        documents = (DOCUMENT * 5, DOCUMENT, DOCUMENT)
        found = [server.post(HANDOFFS, json={"messages": document}).status_code for document in documents]
        assert found == [413, 201, 429]


def test_handoffs_belong_to_a_key(pair):
    with running(pair, api_key=["first", "second"]) as server:
        first, second = ({"Authorization": f"Bearer {key}"} for key in ("first", "second"))
        made = server.post(HANDOFFS, json={"messages": DOCUMENT}, headers=first).json()["id"]
        statuses = [server.chat(QUESTION, c2c={"handoff": made}, headers=key).status_code for key in (first, second)]
        assert statuses == [200, 404]
        assert server.get(HANDOFFS, headers=second).json()["data"] == []
        with pytest.raises(openai.AuthenticationError):
            server.client("third").models.list()
        assert server.metric("c2c_requests_total", status="401") == 1
        assert server.get(f"{HANDOFFS}/{made}", headers=second).status_code == 404


def test_handoffs_expire(pair):
    with running(pair) as server:
        made = create(server, ttl_seconds=0.05)["id"]
        server.until(lambda: server.get(f"{HANDOFFS}/{made}").status_code == 404)
        assert server.metric("c2c_handoffs") == 0


def test_tools_are_for_the_model_that_answers(pair):
    """The sharer's template has none, and a handoff that was read before is as good."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    made = memory_pair()
    made.receiver.tokenizer.chat_template = WITH_TOOLS
    with running(made) as server:
        plain, told = (
            text_of(server.chat(QUESTION, c2c={"sharer_messages": DOCUMENT}, **fields))
            for fields in ({}, {"tools": [tool]})
        )
        named = {"handoff": create(server, messages=DOCUMENT)["id"]}
        assert text_of(server.chat(QUESTION, c2c=named, tools=[tool])) == told != plain
