"""What the server refuses, and what it does when it gets too much, is too slow, or its clients leave."""

from __future__ import annotations

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from c2c import C2CModel
from c2c.language_model import Receiver
from c2c.sharer import Sharer
from serving_harness import NAME, PATIENCE, error_of, events, held, model, running, stop, text_of, user
from tiny import NO_SPECIALS, build, pair_folders, tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def pair():
    return model()


@pytest.fixture(scope="module")
def server(pair):
    with running(pair, max_batch=4) as found:
        yield found


# -- wrong requests ----------------------------------------------------------------------------------------------------

WRONG = [
    ({"messages": ...}, "messages", "missing_parameter"),
    ({"model": ...}, "model", "missing_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hello"}, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages.0", "invalid_value"),
    ({"messages": [{"role": "planner", "content": "4"}]}, "messages.0.role", "invalid_value"),
    ({"messages": [{"role": "user", "content": "a", "names": "b"}]}, "messages.0.names", "unknown_parameter"),
    (
        {"messages": [{"role": "user", "content": "a", "audio": {"id": "b"}}]},
        "messages.0.audio",
        "unsupported_parameter",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0", "invalid_value"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages.0", "invalid_value"),
    (
        {"messages": [{"role": "user", "content": "a", "function_call": {}}]},
        "messages.0.function_call",
        "unsupported_parameter",
    ),
    ({"messages": [{"role": "user", "content": ""}]}, "messages", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": "6"}, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": 7}, "max_tokens", "invalid_value"),
    ({"temperature": 100}, "temperature", "invalid_value"),
    ({"max_tokens": 10**4000}, "max_tokens", "invalid_value"),
    ({"n": 10**4000}, "n", "invalid_value"),
    ({"seed": -(10**30)}, "seed", "invalid_value"),
    ({"top_p": -0.1}, "top_p", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 5}, "n", "invalid_value"),
    ({"stop": ["a", ""]}, "stop.1", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"stop": "a" * 257}, "stop.0", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_value"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, "tools.0.function", "missing_parameter"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f", "a": 1}}]}, "tools.0.function.a", "unknown_parameter"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "invalid_value"),
    ({"stop_token_ids": [3]}, "stop_token_ids", "unknown_parameter"),
    ({"min_p": 0.1}, "min_p", "unsupported_parameter"),
    ({"logit_bias": {"-1": 5}}, "logit_bias", "unsupported_parameter"),
    ({"store": 1}, "store", "unsupported_parameter"),
    ({"top_k": 5}, "top_k", "unsupported_parameter"),
    ({"c2c": {"sharer": "x"}}, "c2c.sharer", "unknown_parameter"),
    ({"c2c": {"report": 1}}, "c2c.report", "invalid_value"),
    ({"c2c": {"sharer_messages": "x"}}, "c2c", "invalid_value"),
    ({"c2c": {"sharer_messages": [{"role": "user"}]}}, "c2c.sharer_messages.0.0", "invalid_value"),
    ({"c2c": {"sharer_messages": "x", "handoff": "y"}}, "c2c.handoff", "invalid_value"),
    ({"model": f"{NAME}/text", "messages": [{"role": "assistant", "content": "a"}]}, "messages", "invalid_value"),
]


@pytest.mark.parametrize(("fields", "param", "code"), WRONG, ids=[json.dumps(f, default=str)[:60] for f, _, _ in WRONG])
def test_wrong_fields_are_refused_by_name(server, fields, param, code):
    error = error_of(server.chat(**fields))
    assert (error["status"], error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)
    assert len(error["message"]) > 10


def test_fields_that_change_nothing_are_taken(server):
    nothing = {"response_format": {"type": "text"}, "tools": [], "logit_bias": {}, "store": False, "user": "me"}
    nothing |= {"n": None, "stop": None, "seed": None, "metadata": {"a": "b"}, "parallel_tool_calls": True, "c2c": None}
    nothing |= {"tool_choice": "auto", "top_k": -1, "min_p": 0.0, "prediction": {"type": "content", "content": "a"}}
    nothing |= {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": False}, "top_p": 1}
    assert text_of(server.chat(**nothing)) == text_of(server.chat())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt.0"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 2, 3]}, "prompt"),
        ({"prompt": [[1, 2], [3]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt.1"),
        ({"prompt": ["a", 1]}, "prompt.1"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"prompt": ["a"] * 5}, "n"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "model": f"{NAME}/text"}, "prompt"),
    ],
)
def test_wrong_completions_are_refused(server, fields, param):
    error = error_of(server.post(COMPLETIONS, json={"model": NAME} | fields))
    assert (error["status"], error["param"]) == (400, param)


JSON = {"Content-Type": "application/json"}


def test_half_a_surrogate_pair_is_no_text(server):
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud83d"}]}'
    assert error_of(server.post(CHAT, content=body, headers=JSON))["param"] == "messages.0.content"


def test_unknown_models_and_paths_are_not_found(server):
    for name in ("gpt-5", f"{NAME}/other", f"{NAME}/c2c", ""):
        assert error_of(server.chat(model=name))["code"] == "model_not_found"
    assert error_of(server.get("/v1/models/other"))["code"] == "model_not_found"
    assert error_of(server.get("/v1/embeddings"))["code"] == "not_found"
    assert error_of(server.get(CHAT))["code"] == "method_not_allowed"
    with pytest.raises(openai.NotFoundError):
        server.client().chat.completions.create(model="gpt-5", messages=user("hello"))


@pytest.mark.parametrize("name", ["", "/receiver", "/sharer", "/text"])
@pytest.mark.parametrize(("text", "tokens"), [("hello there " * 400, 1), ("hello", 600)])
def test_what_does_not_fit_the_context_is_refused(server, name, text, tokens):
    for stream in (False, True):
        error = error_of(server.chat(text, model=NAME + name, max_tokens=tokens, stream=stream))
        assert (error["status"], error["code"]) == (400, "context_length_exceeded")
        assert "512" in error["message"]


def test_as_many_new_tokens_as_fit_where_none_are_requested(server, pair):
    text = "hello there " * 160
    read = pair.receiver.encode(text).length
    assert 400 < read < 512
    found = server.chat(text, model=f"{NAME}/receiver", max_tokens=...).json()
    assert found["usage"]["completion_tokens"] == 512 - read


# -- too much, too slow, gone ------------------------------------------------------------------------------------------


def busy(server, waiting: int) -> None:
    """Wait until one request is under way, and so many wait."""
    server.until(lambda: server.state.active == 1 + waiting and server.engine.waiting == waiting)


def test_a_full_queue_refuses_and_says_when_to_come_back(pair):
    with held(pair) as gate, running(pair, max_queue=2, max_batch=4, window=0) as server, ThreadPoolExecutor(3) as pool:
        accepted = [pool.submit(server.chat)]
        busy(server, 0)
        accepted.append(pool.submit(server.chat))
        busy(server, 1)
        several = server.post(COMPLETIONS, json={"model": NAME, "prompt": ["a", "b"]})
        assert (several.status_code, server.engine.waiting) == (429, 1), "all prompts are accepted, or none"
        accepted.append(pool.submit(server.chat, stream=True))
        busy(server, 2)
        response = server.chat()
        error = error_of(response)
        assert (error["status"], error["code"], error["type"]) == (429, "queue_full", "rate_limit_error")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert server.metric("c2c_queue_length") == 2
        gate.set()
        assert [future.result().status_code for future in accepted] == [200, 200, 200]
        assert server.metric("c2c_requests_total", status="429") == 2


def test_a_request_that_takes_too_long_is_given_up(pair):
    with held(pair) as gate, running(pair, timeout=0.3) as server:
        for stream in (False, True):
            error = error_of(server.chat(stream=stream))
            assert (error["status"], error["code"]) == (504, "timeout")
        assert server.engine.waiting == 0
        gate.set()


def test_a_stream_that_takes_too_long_ends_with_an_error(pair):
    with held(pair, after=3) as gate, running(pair, timeout=1.5) as server:
        response = server.chat(stream=True, max_tokens=20)
        found = events(response.text)
        assert (response.status_code, found[-1]["error"]["code"]) == (200, "timeout")
        assert len(found) > 2
        assert server.metric("c2c_requests_total", status="504") == 1
        with pytest.raises(openai.APIError, match=r"longer than 1\.5 s"):
            list(server.client().chat.completions.create(model=NAME, messages=user("hello"), stream=True))
        gate.set()
        assert server.chat().status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_worker(pair, stream):
    """The answer would take long; it is not decoded to its end."""
    steps = []
    hook = pair.receiver.model.register_forward_pre_hook(lambda *_: steps.append(time.sleep(0.02)))
    try:
        with running(pair, max_batch=1) as server:
            connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE)
            fields = {"model": NAME, "messages": user("hello"), "max_tokens": 480, "temperature": 0, "stream": stream}
            connection.request("POST", CHAT, json.dumps(fields), JSON)
            if stream:
                assert connection.getresponse().read(20).startswith(b"data: {")
            server.until(lambda: len(steps) > 3)
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            server.until(lambda: server.state.active == 0)
            assert server.chat(max_tokens=2).status_code == 200
            assert len(steps) < 200
            assert server.metric("c2c_requests_total", status="499") == 1
    finally:
        hook.remove()


def test_a_client_that_leaves_does_not_take_its_batch_with_it(pair):
    expected = pair.generate("hello there", max_new_tokens=30, do_sample=False).text
    with held(pair) as gate, running(pair, window=PATIENCE, max_batch=2) as server, ThreadPoolExecutor(1) as pool:
        staying = pool.submit(server.chat, max_tokens=30)
        with pytest.raises(httpx.ReadTimeout):
            server.chat("hello", max_tokens=30, timeout=1.0)
        gate.set()
        assert text_of(staying.result()) == expected
        assert server.metric("c2c_batch_answers_sum") == 2
        server.until(lambda: server.state.active == 0)


def test_a_fault_is_reported_without_texts_and_the_worker_goes_on(pair, monkeypatch, caplog):
    with running(pair) as server:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "argmax", lambda *_, **__: 1 / 0)
            error = error_of(server.chat("a secret"))
        assert (error["status"], error["code"], error["type"]) == (500, "internal_error", "server_error")
        assert server.chat().status_code == 200
        assert server.get("/health").json()["status"] == "ok"
    failure = next(record for record in caplog.records if record.message == "batch_failed")
    assert failure.facts["error"] == "ZeroDivisionError"
    assert "secret" not in json.dumps(failure.facts)


def test_a_server_that_drains_refuses_and_gives_up_what_is_under_way_at_a_second_signal(pair):
    with held(pair) as gate, running(pair, max_batch=1) as server, ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(server.chat) for _ in range(2)]
        busy(server, 1)
        stop(server.server)
        server.until(lambda: server.state.draining)
        assert error_of(server.chat())["code"] == "shutting_down"
        stop(server.server)
        assert {error_of(future.result())["code"] for future in accepted} == {"shutting_down"}
        gate.set()


def test_an_answer_that_would_grow_out_of_the_fused_cache_is_refused_before_it_starts():
    """Phi-3 reads its prompt anew at the length from which on it rotates otherwise; what is fused would be lost."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    switch = {"original_max_position_embeddings": 60}
    parameters = rope | switch | {"factor": 4.0}
    config = Phi3Config(vocab_size=512, **sizes, **NO_SPECIALS, **switch, rope_parameters=parameters)
    receiver = Receiver(Phi3ForCausalLM(config), tokenizer("chatml"), "phi3")
    room = 61 - receiver.encode(["hello there"]).length
    sharer = Sharer(build("qwen2", 2), tokenizer("llama3"), "sharer")
    with running(C2CModel.from_models(receiver, sharer)) as server:
        refused = server.chat(max_tokens=room + 1)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "up to 61" in error["message"]
        for given in (room, ...):  # with no number it ends there
            answer = server.chat(max_tokens=given)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == room


def test_what_other_servers_take_is_refused_with_what_to_do(server):
    for ids in ([1, 2], [[1, 2], [3]]):
        error = error_of(server.post(COMPLETIONS, json={"model": NAME, "prompt": ids}))
        assert (error["status"], error["param"]) == (400, "prompt")
        assert "token ids" in error["message"]
    error = error_of(server.post("/v1/responses", json={"model": NAME, "input": "hello"}))
    assert error["status"] == 404
    assert CHAT in error["message"]


# -- what clients see of the server's models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_folder(tmp_path_factory):
    """A server of models that were loaded from folders, whose templates drop system messages and refuse a 'b'."""
    folders = pair_folders(lambda name: tmp_path_factory.mktemp("private") / name)
    made = C2CModel.from_models(*folders)
    for one in (made.receiver, made.sharers[0]):
        one.tokenizer.chat_template = (
            "{% for m in messages if m.role != 'system' %}"
            "{{ raise_exception('no b') if m.content == 'b' }}<{{ m.content }}>{% endfor %}"
        )
    with running(made, systems=("c2c", "receiver", "text")) as found:
        found.folder = "/private"
        yield found


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [*user("a"), {"role": "assistant", "content": "b"}]},
        {"messages": user("hello " * 600)},
        {"tools": [{"type": "function", "function": {"name": "weather"}}]},
    ],
)
def test_errors_do_not_say_where_the_models_lie(in_folder, fields):
    for response in (in_folder.chat(**fields), in_folder.chat(model=f"{NAME}/receiver", **fields)):
        assert response.status_code == 400
        assert in_folder.folder not in response.text
        assert "chatml" in response.text
    assert in_folder.folder not in in_folder.get("/v1/models").text


@pytest.mark.parametrize("system", ["", "/receiver", "/text"])
def test_a_client_sees_that_its_system_message_is_not_read(in_folder, system):
    turns = [{"role": "system", "content": "Answer in French."}, *user("hello")]
    answer = in_folder.chat(messages=turns, model=NAME + system).json()
    (first, *_) = events(in_folder.chat(messages=turns, model=NAME + system, stream=True).text)
    for found in (answer, first):
        assert "system message" in found["c2c"]["notes"][0]
        assert in_folder.folder not in str(found)
    assert "c2c" not in in_folder.chat(model=NAME + system).json()
