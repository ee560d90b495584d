"""What the server refuses, and what it does when it is asked too much or left alone."""

from __future__ import annotations

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx
import openai
import pytest
import torch

from serving_harness import NAME, PATIENCE, events, held, model, running, user

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def pair():
    return model()


@pytest.fixture(scope="module")
def server(pair):
    with running(pair, max_body_mb=0.02, max_batch=4) as found:
        yield found


def error_of(response: httpx.Response) -> dict:
    data = response.json()
    assert set(data) == {"error"}
    assert set(data["error"]) == {"message", "type", "param", "code"}
    return data["error"]


# -- wrong requests ----------------------------------------------------------------------------------------------------

BAD_FIELDS = [
    ({"messages": ...}, "messages", "missing_parameter"),
    ({"model": ...}, "model", "missing_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hello"}, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_parameter"),
    ({"messages": [{"role": "tool", "content": "4"}]}, "messages.0.role", "invalid_value"),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages.0.name", "unknown_parameter"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "invalid_value"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": "6"}, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": 7}, "max_tokens", "invalid_value"),
    ({"temperature": 2.5}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 5}, "n", "invalid_value"),
    ({"stop": ["a", ""]}, "stop.1", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_value"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
    ({"store": True}, "store", "unsupported_parameter"),
    ({"top_k": 5}, "top_k", "unknown_parameter"),
    ({"c2c": {"sharer": "x"}}, "c2c.sharer", "unknown_parameter"),
    ({"c2c": {"report": 1}}, "c2c.report", "invalid_value"),
    ({"c2c": {"sharer_messages": "x"}}, "c2c", "invalid_value"),
    ({"c2c": {"sharer_messages": "x", "handoff": "y"}}, "c2c.handoff", "invalid_value"),
    ({"model": f"{NAME}/text", "messages": [{"role": "assistant", "content": "a"}]}, "messages", "invalid_value"),
]


@pytest.mark.parametrize(
    ("fields", "param", "code"), BAD_FIELDS, ids=[json.dumps(f, default=str) for f, _, _ in BAD_FIELDS]
)
def test_wrong_fields_are_refused_by_name(server, fields, param, code):
    response = server.chat(**fields)
    error = error_of(response)
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)
    assert len(error["message"]) > 10


def test_fields_that_ask_for_nothing_are_taken(server):
    plain = server.chat().json()["choices"]
    nothing = {"response_format": {"type": "text"}, "tools": [], "logit_bias": {}, "store": False, "user": "me"}
    nothing |= {"n": None, "stop": None, "seed": None, "metadata": {"a": "b"}, "parallel_tool_calls": True, "c2c": None}
    assert server.chat(**nothing).json()["choices"] == plain


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt.0"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 2, 3]}, "prompt.0"),
        ({"prompt": ["a"] * 5}, "n"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "model": f"{NAME}/text"}, "prompt"),
    ],
)
def test_wrong_completions_are_refused(server, fields, param):
    response = server.post(COMPLETIONS, json={"model": NAME} | fields)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


@pytest.mark.parametrize("body", [b"", b'{"model": ', b"[1]", b"\xff\xfe", b"[" * 15_000, b'"text"'])
def test_what_is_no_json_object_is_refused(server, body):
    response = server.post(CHAT, content=body)
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")


def test_half_a_surrogate_pair_is_no_text(server):
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud83d"}]}'
    assert error_of(server.post(CHAT, content=body))["param"] == "messages.0.content"


def test_unknown_models_and_places_are_not_found(server):
    for way in ("gpt-5", f"{NAME}/other", f"{NAME}/c2c", ""):
        response = server.chat(model=way)
        assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    assert error_of(server.get("/v1/models/other"))["code"] == "model_not_found"
    assert error_of(server.get("/v1/embeddings"))["code"] == "not_found"
    response = server.get(CHAT)
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
    with pytest.raises(openai.NotFoundError):
        server.client().chat.completions.create(model="gpt-5", messages=user("hello"))


@pytest.mark.parametrize("way", ["", "/receiver", "/sharer", "/text"])
@pytest.mark.parametrize(("text", "tokens"), [("hello there " * 400, 1), ("hello", 600)])
def test_what_does_not_fit_the_context_is_refused(server, way, text, tokens):
    for fields in ({}, {"stream": True}):
        response = server.chat(text, model=NAME + way, max_tokens=tokens, **fields)
        assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")
        assert "512" in error_of(response)["message"]


def test_new_tokens_are_those_that_fit_if_none_are_asked_for(server, pair):
    text = "hello there " * 160
    read = pair.receiver.encode(text).length
    assert 400 < read < 512
    found = server.chat(text, model=f"{NAME}/receiver", max_tokens=...).json()
    assert found["usage"]["completion_tokens"] == 512 - read


def test_a_body_that_is_too_large_is_refused(server):
    for content in (b"x" * 30_000, (b"x" * 1000 for _ in range(30)), (b"x" * 100_000 for _ in range(50))):
        response = server.post(CHAT, content=content)
        assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")


def test_keys_are_asked_for(pair):
    with running(pair, api_key=("first", "second")) as server:
        for headers in (
            {},
            {"Authorization": "Bearer third"},
            {"Authorization": "first"},
            {"Authorization": "Bearer é"},
        ):
            raw = {key: value.encode("latin-1") for key, value in headers.items()}
            response = server.get("/v1/models", headers=raw)
            assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
        for key in ("first", "second"):
            assert server.client(key).models.list().data
        with pytest.raises(openai.AuthenticationError):
            server.client("third").chat.completions.create(model=NAME, messages=user("hello"))
        assert server.get("/health").status_code == server.get("/metrics").status_code == 200
        assert server.metric("c2c_requests_total", status="401") == 5


# -- too much, too slow, gone ------------------------------------------------------------------------------------------


def in_background(pool, server, **fields):
    return pool.submit(server.chat, **fields)


def test_a_full_queue_refuses_and_says_when_to_come_back(pair):
    with held(pair) as gate, running(pair, max_queue=2, max_batch=1, window=0) as server, ThreadPoolExecutor(3) as pool:
        accepted = [in_background(pool, server)]
        server.until(lambda: server.state.active == 1 and server.engine.waiting == 0)
        accepted += [in_background(pool, server), in_background(pool, server, stream=True)]
        server.until(lambda: server.engine.waiting == 2)
        response = server.chat()
        assert (response.status_code, error_of(response)["code"]) == (429, "queue_full")
        assert error_of(response)["type"] == "rate_limit_error"
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert server.metric("c2c_queue_length") == 2
        gate.set()
        assert [future.result().status_code for future in accepted] == [200, 200, 200]
        assert server.metric("c2c_requests_total", status="429") == 1


def test_several_prompts_are_accepted_together_or_not_at_all(pair):
    with held(pair) as gate, running(pair, max_queue=2, max_batch=4, window=0) as server, ThreadPoolExecutor(2) as pool:
        first = in_background(pool, server)
        server.until(lambda: server.state.active == 1 and server.engine.waiting == 0)
        second = in_background(pool, server)
        server.until(lambda: server.engine.waiting == 1)
        response = server.post(COMPLETIONS, json={"model": NAME, "prompt": ["a", "b"]})
        assert response.status_code == 429
        assert server.engine.waiting == 1
        gate.set()
        assert first.result().status_code == second.result().status_code == 200


def test_a_request_that_takes_too_long_is_given_up(pair):
    with held(pair) as gate, running(pair, timeout=0.3) as server:
        for stream in (False, True):
            response = server.chat(stream=stream)
            assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
        assert server.engine.waiting == 0, "who has given up does not wait"
        gate.set()
    with running(pair) as server:
        assert server.chat().status_code == 200


def slow_after(pair, passes: int):
    """Let so many forward passes of the receiver go by, and hold the next one until it is released."""
    gate, count = Event(), [0]

    def wait(*_):
        count[0] += 1
        if count[0] > passes:
            gate.wait(PATIENCE)

    return gate, pair.receiver.model.register_forward_pre_hook(wait)


def test_a_stream_that_takes_too_long_ends_with_an_error(pair):
    gate, hook = slow_after(pair, 3)
    try:
        with running(pair, timeout=3) as server:
            response = server.chat(stream=True, max_tokens=20)
            found = events(response.text)
            assert response.status_code == 200
            assert found[-1]["error"]["code"] == "timeout"
            assert len(found) > 2
            assert server.metric("c2c_requests_total", status="504") == 1
            gate.set()
            assert server.chat().status_code == 200
    finally:
        gate.set()
        hook.remove()


def test_the_openai_client_raises_what_ends_a_stream(pair):
    gate, hook = slow_after(pair, 3)
    try:
        with running(pair, timeout=3) as server:
            stream = server.client().chat.completions.create(
                model=NAME, messages=user("hello"), max_tokens=20, temperature=0, stream=True
            )
            with pytest.raises(openai.APIError, match="longer than 3 s"):
                list(stream)
            gate.set()
    finally:
        gate.set()
        hook.remove()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_worker(pair, stream):
    """The answer would take minutes; the next request gets its own at once."""
    steps = []
    hook = pair.receiver.model.register_forward_pre_hook(lambda *_: steps.append(time.sleep(0.02)))
    try:
        with running(pair, max_batch=1) as server:
            address = server.url.removeprefix("http://")
            connection = http.client.HTTPConnection(address, timeout=PATIENCE)
            fields = {"model": NAME, "messages": user("hello"), "max_tokens": 480, "temperature": 0, "stream": stream}
            connection.request("POST", CHAT, json.dumps(fields), {"Content-Type": "application/json"})
            if stream:
                assert connection.getresponse().read(20).startswith(b"data: {")
            server.until(lambda: len(steps) > 3)
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            server.until(lambda: server.state.active == 0)
            assert server.chat(max_tokens=2).status_code == 200
            assert len(steps) < 200, "the rest of the answer was not written"
            assert server.metric("c2c_requests_total", status="499") == 1
    finally:
        hook.remove()


def test_a_client_that_leaves_does_not_take_its_batch_with_it(pair):
    expected = pair.generate("hello there", max_new_tokens=30, do_sample=False).text
    with (
        held(pair) as gate,
        running(pair, window=PATIENCE, max_batch=2) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        staying = in_background(pool, server, max_tokens=30)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                server.url + CHAT,
                json={"model": NAME, "messages": user("hello"), "max_tokens": 30, "temperature": 0},
                timeout=1.0,
            )
        gate.set()
        found = staying.result().json()
        assert found["choices"][0]["message"]["content"] == expected
        assert server.metric("c2c_batch_answers_sum") == 2
        server.until(lambda: server.state.active == 0)


def test_what_breaks_is_told_and_the_worker_goes_on(pair, monkeypatch, caplog):
    with running(pair) as server:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "argmax", lambda *_, **__: 1 / 0)
            response = server.chat("a secret")
        assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
        assert error_of(response)["type"] == "server_error"
        assert server.chat().status_code == 200
        assert server.get("/health").json()["status"] == "ok"
    failure = next(record for record in caplog.records if record.message == "batch_failed")
    assert failure.facts["error"] == "ZeroDivisionError"
    assert failure.facts["frames"]
    assert "secret" not in json.dumps(failure.facts)


def test_a_server_that_drains_finishes_and_takes_nothing_new(pair):
    with held(pair) as gate, running(pair, max_batch=1) as server, ThreadPoolExecutor(3) as pool:
        accepted = [in_background(pool, server) for _ in range(3)]
        server.until(lambda: server.state.active == 3 and server.engine.waiting == 2)
        server.service.draining = True
        response = server.chat()
        assert (response.status_code, error_of(response)["code"]) == (503, "shutting_down")
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        assert server.get("/v1/models").status_code == 200
        gate.set()
        assert [future.result().status_code for future in accepted] == [200] * 3
