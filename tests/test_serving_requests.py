"""Requests as clients and agent frameworks send them: answered as the library does, or refused by name."""

from __future__ import annotations

import http.client
import json
import math
from contextlib import suppress

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from c2c.prompting import RenderOptions
from c2c.serving.config import ServeConfig
from c2c.serving.errors import ApiError, ServerError
from c2c.serving.json_body import parse
from c2c.serving.outputs import StopMatcher, TokenNames
from serving_harness import NAME, PATIENCE, error_of, events, model, running, streamed, text_of, user
from test_messages import ASK, CALL, TOOL, TURNS, WITH_TOOLS
from tiny import tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def pair():
    return model()


@pytest.fixture(scope="module")
def server(pair):
    with running(pair, max_batch=4) as found:
        yield found


@pytest.fixture(scope="module")
def with_tools():
    """A pair whose chat templates have tools."""
    made = model()
    for side in (made.receiver, made.sharers[0]):
        side.tokenizer.chat_template = WITH_TOOLS
    return made


@pytest.fixture(scope="module")
def tool_server(with_tools):
    with running(with_tools) as found:
        yield found


def complete(server, prompt="hello there my friend", **fields) -> httpx.Response:
    return server.post(COMPLETIONS, json={"model": NAME, "prompt": prompt, "max_tokens": 8, "temperature": 0, **fields})


# -- messages and tools ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "planner"},
        {"tool_calls": [], "refusal": None, "audio": None, "function_call": None},
        {"annotations": [{"type": "url_citation"}], "id": "msg-1", "provider_specific_fields": {"a": None}},
        {"content": [{"type": "text", "text": "hello "}, {"type": "input_text", "text": "there"}]},
    ],
)
def test_fields_that_frameworks_add_to_messages_are_taken(server, fields):
    assert text_of(server.chat(messages=[{**user("hello there")[0], **fields}])) == text_of(server.chat("hello there"))


def test_what_a_model_refused_or_thought_can_be_sent_back(server):
    before = [*user("hello"), {"role": "assistant", "content": None, "refusal": "No."}, *user("why?")]
    same = [*user("hello"), {"role": "assistant", "content": "No.", "reasoning_content": "Hm."}, *user("why?")]
    assert text_of(server.chat(messages=before)) == text_of(server.chat(messages=same))


def test_a_tool_turn_of_the_openai_client_is_read_by_both_models(tool_server, with_tools):
    client, options = tool_server.client(), RenderOptions(tools=(TOOL,))
    asked = [{"role": "user", "content": ASK}]
    first = client.chat.completions.create(model=NAME, messages=asked, tools=[TOOL], max_tokens=6, temperature=0)
    assert first.choices[0].message.content == with_tools.generate(asked, max_new_tokens=6, options=options).text
    assert first.choices[0].message.tool_calls is None
    assert first.choices[0].message.content != text_of(tool_server.chat(ASK)), "the tools were shown"
    turns = [*asked, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    turns += [{"role": "tool", "tool_call_id": "c1", "content": "18"}]
    for stream in (False, True):
        fields = {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False, "stream": stream}
        got = client.chat.completions.create(model=NAME, messages=turns, max_tokens=6, temperature=0, **fields)
        pieces = [one.choices[0].delta.content or "" for one in got] if stream else [got.choices[0].message.content]
        assert "".join(pieces) == with_tools.generate(TURNS, max_new_tokens=6, options=options).text
    other = json.loads(json.dumps(turns).replace("Paris", "Rome"))
    assert text_of(tool_server.chat(messages=other, tools=[TOOL])) != "".join(pieces), "the call was read"


def test_without_a_choice_models_are_not_shown_the_tools(tool_server):
    assert text_of(tool_server.chat(ASK, tools=[TOOL], tool_choice="none")) == text_of(tool_server.chat(ASK))
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    assert text_of(tool_server.chat(ASK, tools=[strict])) == text_of(tool_server.chat(ASK, tools=[TOOL]))


@pytest.mark.parametrize("fields", [{"messages": TURNS}, {"tools": [TOOL]}])
@pytest.mark.parametrize("name", [NAME, f"{NAME}/receiver", f"{NAME}/sharer"])
def test_a_template_without_tools_is_an_error_that_names_them(server, name, fields):
    error = error_of(server.chat(model=name, **fields))
    assert (error["status"], error["param"]) == (400, "messages")
    assert "weather" in error["message"]


@pytest.mark.parametrize("arguments", ["{", "[1]", "1", '{"a": "\\ud800"}', "[" * 5000, "[" * 900 + "]" * 900])
def test_arguments_that_are_no_object_are_refused(tool_server, arguments):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    turns = [*user("a"), {"role": "assistant", "tool_calls": [call]}]
    error = error_of(tool_server.chat(messages=turns))
    assert (error["status"], error["param"]) == (400, "messages.1")
    assert len(error["message"]) < 400


# -- log-probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"temperature": 2, "seed": 5}])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_completions_name_each_token_once_and_the_chosen_one_by_its_name(server, count, fields):
    found = complete(server, logprobs=count, max_tokens=12, **fields).json()["choices"][0]["logprobs"]
    rows = list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True))
    assert len(rows) == 12
    for token, logprob, top in rows:
        assert top[token] == logprob
        others = sorted(top.values(), reverse=True)
        assert len(top) == count + (logprob < others[count - 1] if count else 1)
    if count and not fields:
        assert all(max(top, key=top.get) == token for token, _, top in rows), "greedy"


def test_top_logprobs_are_those_of_the_model(server, pair):
    options = RenderOptions(chat_template=False)
    fused = pair.prefill("hello there my friend", options=options)
    scores = torch.log_softmax(pair.receiver.next_logits(fused.tokens, fused.cache)[0].float(), -1).topk(5).values
    top = complete(server, logprobs=5).json()["choices"][0]["logprobs"]["top_logprobs"][0]
    assert list(top.values()) == pytest.approx(scores.tolist(), abs=1e-4)


def test_chat_gives_the_bytes_of_every_token(server):
    choice = server.chat(max_tokens=16, logprobs=True, top_logprobs=20).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert [len(one["top_logprobs"]) for one in content] == [20] * 16
    assert (
        b"".join(bytes(one["bytes"] or []) for one in content).decode(errors="replace") == choice["message"]["content"]
    )


def test_tokens_are_named_by_their_text_else_by_their_bytes_else_by_their_id():
    words = tokenizer("chatml")
    names, split = TokenNames(words), words("😀", add_special_tokens=False)["input_ids"]
    scored = [names.score(token, -1.0) for token in split]
    assert b"".join(one.bytes for one in scored).decode() == "😀"
    assert scored[0].text == "bytes:" + "".join(f"\\x{byte:02x}" for byte in scored[0].bytes)
    special = words.convert_tokens_to_ids("<|im_end|>")
    assert names.score(special, -math.inf).text == "<|im_end|>"
    assert names.score(special, -math.inf).logprob == -9999.0
    assert (names.score(10**6, -1.0).text, names.score(10**6, -1.0).bytes) == ("token_id:1000000", None)


def test_tokens_with_the_space_before_them_and_bytes_of_a_fallback_have_names_of_their_own():
    vocabulary = {"<unk>": 0, "a": 1, "▁a": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    strip = decoders.Strip(content=" ", left=1)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    names = TokenNames(PreTrainedTokenizerFast(tokenizer_object=made))
    found = [names.score(token, -1.0) for token in (1, 2, 0xF0 + 3, 0x41 + 3)]
    assert [one.text for one in found] == ["a", " a", "bytes:\\xf0", "A"]
    assert [one.bytes for one in found] == [b"a", b" a", b"\xf0", b"A"]


# -- stop strings ------------------------------------------------------------------------------------------------------


def test_a_stop_string_may_name_special_tokens():
    """They are no part of the text, and end it all the same, alone or with text around them."""
    made = model()
    words, tokens = (
        made.receiver.tokenizer,
        made.generate("hello there", max_new_tokens=12, do_sample=False).ids.tolist(),
    )
    at = next(i for i in range(3, 11) if tokens[i] not in (*tokens[:i], tokens[i + 1]))
    name = words.convert_ids_to_tokens(tokens[at])
    words.add_tokens([AddedToken(name, special=True)])
    before, whole = (words.decode(part, skip_special_tokens=True) for part in (tokens[:at], tokens))
    with running(made) as server:
        assert text_of(server.chat(max_tokens=12)) == whole
        for stop in (name, before[-2:] + name, name + words.decode(tokens[at + 1])[:1]):
            (choice,) = server.chat(max_tokens=12, stop=stop).json()["choices"]
            expected = before.removesuffix(stop.partition(name)[0])
            assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
            assert streamed(server.chat(max_tokens=12, stop=stop, stream=True)) == [expected]
        assert text_of(server.chat(max_tokens=12, stop=name + "!?")) == whole


def test_hidden_text_is_matched_and_never_shown():
    matcher = StopMatcher(["\n<|end|>you"])
    assert [matcher.feed("a\n"), matcher.feed("<|end|>", shown=False), matcher.feed("yo")] == ["a", "", ""]
    assert (matcher.feed("u"), matcher.found) == ("", True)
    matcher = StopMatcher(["\n<|end|>you"])
    assert [matcher.feed("a\n"), matcher.feed("<|end|>", shown=False), matcher.feed("me")] == ["a", "", "\nme"]
    assert matcher.feed("\n") == ""
    assert (matcher.feed("<|end|>", shown=False), matcher.pending) == ("", "\n")


# -- prompts and parameters --------------------------------------------------------------------------------------------


def test_a_prompt_of_one_token_has_nothing_to_fuse_and_models_alone_answer_it(server, pair):
    error = error_of(complete(server, "a"))
    assert (error["status"], error["param"]) == (400, "prompt")
    assert "one token" in error["message"]
    options = RenderOptions(chat_template=False)
    expected = pair.receiver.answer("a", options=options, max_new_tokens=8, do_sample=False)
    both = complete(server, ["a", "hello there"], model=f"{NAME}/receiver").json()["choices"]
    assert (both[0]["text"], expected.prompt_tokens) == (expected.text, 1)


@pytest.mark.parametrize("fields", [{"top_p": 0}, {"top_p": 1e-9}, {"top_p": 5e-324}, {"temperature": 1e-30}])
def test_extreme_values_leave_the_likeliest_token(server, fields):
    assert (
        complete(server, **{"temperature": 1, "seed": -3, **fields}).json()["choices"]
        == complete(server).json()["choices"]
    )


# -- HTTP --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "JSON"),
        (b"null", "object"),
        (b"[1]", "object"),
        (b'"a"', "object"),
        (b'{"model"', "JSON"),
        ('{"model": "é"}'.encode("latin-1"), "UTF-8"),
        ("{}".encode("utf-16"), "UTF-8"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"n": 1, "n": 2}', "twice"),
        (b'{"user": [{"a": 1, "a": 1}]}', "twice"),
        (b"[" * 100_000, "JSON"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "deeper"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "JSON"),
        (b'{"\\ud800": 1}', "surrogate"),
    ],
)
def test_bodies_that_are_no_object_of_json_are_refused(server, raw, word):
    error = error_of(server.post(CHAT, content=raw, headers=JSON))
    assert (error["status"], error["code"]) == (400, "invalid_json")
    assert word in error["message"]


@pytest.mark.parametrize("path", ["model", "stop", "user"])
def test_half_a_surrogate_pair_is_found_wherever_it_is(server, path):
    raw = json.dumps({"model": NAME, "messages": user("a"), path: ["\ud83d"] if path == "stop" else "\ud83d"}).encode()
    error = error_of(server.post(CHAT, content=raw, headers=JSON))
    assert (error["status"], error["param"]) == (400, "stop.0" if path == "stop" else path)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),
        ("multipart/form-data; boundary=json", 400),
        ("", 400),
    ],
)
def test_only_json_is_taken_for_json(server, kind, status):
    raw = b"\xef\xbb\xbf" + json.dumps({"model": NAME, "messages": user("a"), "max_tokens": 1}).encode()
    assert server.post(CHAT, content=raw, headers={"Content-Type": kind}).status_code == status


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", f"/v1/models/{NAME}/text"])
def test_head_has_the_status_and_headers_of_get_and_slashes_do_no_harm(server, path):
    found = server.get(path)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE)
    connection.request("HEAD", path)
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (found.status_code, b"")
    assert answer.getheader("content-type") == found.headers["content-type"]
    for other in (path + "/", path.replace("/", "//")):
        assert server.get(other).status_code == 200
    connection.request("HEAD", "/v1/embeddings")  # the connection can be used on
    assert connection.getresponse().status == 404
    connection.close()


def test_endpoints_take_slashes_and_no_other_methods(server):
    body = {"model": NAME, "messages": user("hello there"), "max_tokens": 6, "temperature": 0}
    assert text_of(server.post("//v1/chat//completions/", json=body)) == text_of(server.chat())
    for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "TRACE"):
        assert httpx.request(method, server.url + CHAT).status_code == 405
    assert httpx.options(server.url + CHAT, headers={"Origin": "https://a.example"}).status_code == 405


def test_keys_are_asked_for_whatever_the_slashes(pair):
    with running(pair, api_key=["k" * 20]) as server:
        for path in ("/v1/models", "//v1/models/", "/health/../v1/models", "/v1/models/health"):
            assert server.get(path).status_code == 401
        assert server.get("/health/").status_code == 200


def test_web_pages_of_chosen_origins_may_use_the_server(pair, server):
    page = "https://page.example"
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    assert "access-control-allow-origin" not in server.get("/v1/models", headers={"Origin": page}).headers
    with running(pair, api_key=["k" * 20], cors_origin=[page]) as chosen:
        leave = httpx.options(chosen.url + CHAT, headers={"Origin": page, **ask})
        assert (leave.status_code, leave.headers["access-control-allow-origin"]) == (200, page)
        assert "authorization" in leave.headers["access-control-allow-headers"]
        assert httpx.options(chosen.url + CHAT, headers={"Origin": "https://other.example", **ask}).status_code == 400
        refused = chosen.get("/v1/models", headers={"Origin": page})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page)
    with pytest.raises(ServerError, match="slash"):
        ServeConfig(cors_origin=[page + "/"])
    assert ServeConfig(cors_origin=["*", "http://localhost:3000"]).cors_origin


# -- anything at all ---------------------------------------------------------------------------------------------------

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(
        [0, 1, -1, 1e-30, 1e-320, 1e308, "", "auto", "none", "a", "<|im_end|>", "\x00", "\u2028", "\ud800"]
    )
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
texts = st.sampled_from(["hello there", "a", " ", "fox 😀", "<|im_start|>user\n", "x" * 700]) | st.text(max_size=8)


def some(**fields):
    """Objects with some of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


def odd(sane, names):
    """What is right, and one time in four the same with one field of any value."""
    spoilt = st.tuples(sane, st.dictionaries(st.sampled_from(names), anything, min_size=1, max_size=1))
    return st.one_of(sane, sane, sane, spoilt.map(lambda both: {**both[0], **both[1]}))


parts = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "input_text"]), "text": texts}), max_size=2)
arguments = st.sampled_from(["", "{}", '{"city": "Paris"}', '{"a": [1, {"b": null}]}']) | st.just({})
calls = st.fixed_dictionaries(
    {
        "id": st.just("c1"),
        "type": st.just("function"),
        "function": odd(st.fixed_dictionaries({"name": texts, "arguments": arguments}), ["name", "arguments"]),
    }
)
MESSAGE = ["role", "content", "name", "tool_calls", "tool_call_id", "refusal", "reasoning_content", "audio", "a"]
roles = st.sampled_from(["system", "developer", "user", "user", "user", "assistant", "tool", "function"])
further = some(
    name=texts,
    tool_calls=st.lists(calls, max_size=2),
    tool_call_id=texts,
    refusal=st.none() | texts,
    annotations=anything,
)
messages = odd(
    st.tuples(st.fixed_dictionaries({"role": roles, "content": texts | parts}), further).map(
        lambda x: {**x[1], **x[0]}
    ),
    MESSAGE,
)
functions = st.tuples(
    st.fixed_dictionaries({"name": st.just("weather") | st.from_regex("[a-z_]{1,9}", fullmatch=True)}),
    some(description=texts, parameters=st.dictionaries(texts, anything, max_size=2), strict=st.booleans()),
).map(lambda both: {**both[0], **both[1]})
tools = odd(
    st.fixed_dictionaries(
        {"type": st.just("function"), "function": odd(functions, ["name", "description", "parameters", "strict", "a"])}
    ),
    ["type", "function", "a"],
)
FIELDS = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "n": st.integers(1, 2),
    "stop": st.lists(texts.filter(bool).map(lambda text: text[:200]), max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "stream": st.booleans(),
    "user": anything,
    "metadata": anything,
}
CHAT_FIELDS = FIELDS | {
    "logprobs": st.just(True),
    "tools": st.lists(tools, max_size=2),
    "tool_choice": st.sampled_from(["none", "auto"]),
}
ODD = [
    *CHAT_FIELDS,
    "model",
    "max_tokens",
    "messages",
    "prompt",
    "stream_options",
    "response_format",
    "logit_bias",
    "c2c",
]
ODD += ["echo", "best_of", "suffix", "top_logprobs", "max_completion_tokens", "service_tier", "top_k", "a"]
names = st.sampled_from([NAME, NAME, f"{NAME}/receiver", f"{NAME}/sharer", f"{NAME}/text"])
c2c = odd(
    some(report=st.booleans(), answer_prefix=texts), ["report", "answer_prefix", "sharer_messages", "handoff", "a"]
)


def bodies(fields, **needed):
    sane = st.fixed_dictionaries({"model": names, "max_tokens": st.integers(1, 4), **needed})
    return odd(st.tuples(sane, some(**fields, c2c=c2c)).map(lambda both: {**both[1], **both[0]}), ODD)


requests = st.one_of(
    st.tuples(st.just(CHAT), bodies(CHAT_FIELDS, messages=st.lists(messages, min_size=1, max_size=3))),
    st.tuples(st.just(COMPLETIONS), bodies(FIELDS | {"logprobs": st.integers(0, 5)}, prompt=texts | st.lists(texts))),
)


def check_answer(response: httpx.Response) -> int:
    """Every request is answered, or refused with a reason; return the status."""
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = error_of(response)
        assert error["type"] == "invalid_request_error"
        assert 5 < len(error["message"]) < 1500
    elif response.headers["content-type"].startswith("text/event-stream"):
        last = events(response.text)[-1]  # what only the prefill of a later prompt finds comes in the stream
        assert last == "[DONE]" or last["error"]["type"] == "invalid_request_error", response.text[-300:]
    else:
        assert response.json()["choices"]
    return response.status_code


@pytest.mark.fuzz
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(request=requests)
def test_no_request_breaks_the_server(tool_server, request):
    path, body = request
    check_answer(tool_server.post(path, content=json.dumps(body).encode(), headers=JSON))


@pytest.mark.fuzz
@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | anything.map(lambda x: json.dumps(x).encode()))
def test_bytes_are_parsed_as_json_does_or_refused(raw):
    with suppress(ApiError):
        assert parse(raw) == json.loads(raw)
