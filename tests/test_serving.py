"""The server's answers: those of the library, over HTTP, whatever they share a batch with."""

from __future__ import annotations

import json
import logging
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from c2c.prompting import RenderOptions
from c2c.systems import SystemOptions, make_system
from serving_harness import NAME, PATIENCE, events, model, running, streamed, text_of, user

MODELS = [NAME, f"{NAME}/receiver", f"{NAME}/sharer", f"{NAME}/text"]
WORDS = ["hello", "there", "fox", "red", "house", "sea", "cat", "dog", "who", "buys", "what", "and", "why", "today"]
TEXTS = ["hello", "hello there, who buys the red house by the sea?", "fox"]


@pytest.fixture(scope="module")
def pair():
    return model()


@pytest.fixture(scope="module")
def server(pair):
    with running(pair) as found:
        yield found


def library(pair, name, messages, tokens=6, **kwargs):
    """What the library answers."""
    system = make_system(name.partition("/")[2] or "c2c", pair, SystemOptions(message_tokens=6))
    return system.generate(messages, max_new_tokens=tokens, do_sample=False, **kwargs)


# -- one request -------------------------------------------------------------------------------------------------------


def test_models_are_listed_and_found(server):
    assert [card.id for card in server.client().models.list()] == MODELS
    facts = {"system": "text", "receiver": "llama", "sharers": ["qwen2"], "context": "shared", "trained": True}
    assert server.client().models.retrieve(f"{NAME}/text").c2c == facts


def test_other_systems_can_be_served(pair):
    names = [NAME, f"{NAME}/text_published", f"{NAME}/summary_64"]
    with running(pair, systems=["c2c", "text_published", "summary_64"]) as server:
        assert [card.id for card in server.client().models.list()] == names
        assert text_of(server.chat(model=names[1])) == library(pair, names[1], "hello there").text


@pytest.mark.parametrize("name", MODELS)
def test_every_system_answers_as_the_library_does(server, pair, name):
    messages = [{"role": "system", "content": "Be brief."}, *user("hello there, who buys the red house?")]
    expected = library(pair, name, messages, tokens=12)
    found = server.client().chat.completions.create(model=name, messages=messages, max_tokens=12, temperature=0)
    assert (found.model, found.object, len(found.choices)) == (name, "chat.completion", 1)
    choice, usage = found.choices[0], found.usage
    assert (choice.message.content, choice.message.role) == (expected.text, "assistant")
    assert choice.finish_reason == "length"
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, 12)
    assert usage.total_tokens == expected.prompt_tokens + 12
    with server.client().chat.completions.create(
        model=name, messages=messages, max_completion_tokens=12, temperature=0, stream=True
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 4


def test_systems_differ(pair):
    """So that the test above can tell them apart."""
    assert len({library(pair, name, "hello there").text for name in MODELS}) == len(MODELS)


def test_a_stream_has_the_shape_that_clients_expect_and_ends_with_usage_and_report(server):
    response, plain = server.chat(stream=True), server.chat(c2c={"report": True}).json()
    assert response.headers["content-type"].startswith("text/event-stream")
    *found, done = events(response.text)
    assert (done, found.count(done)) == ("[DONE]", 0)
    assert all(chunk["object"] == "chat.completion.chunk" and len(chunk["choices"]) == 1 for chunk in found)
    assert all("usage" not in chunk and "c2c" not in chunk for chunk in found)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert found[-1]["choices"][0]["delta"] == {}
    *found, last, _ = events(
        server.chat(stream=True, stream_options={"include_usage": True}, c2c={"report": True}).text
    )
    assert [chunk["usage"] for chunk in found] == [None] * len(found)
    assert (last["choices"], last["usage"]) == ([], plain["usage"])
    assert last["c2c"]["report"]["fused_tokens"] == plain["c2c"]["report"]["fused_tokens"] > 0


def test_a_report_is_that_of_the_request_alone_in_a_batch_too(pair):
    with running(pair, max_batch=3, window=PATIENCE) as server:
        found = [one.json()["c2c"] for one in server.chat_all(TEXTS, c2c={"report": True})]
    for text, about in zip(TEXTS, found, strict=True):
        expected = pair.generate(text, max_new_tokens=1, do_sample=False).report.to_dict()
        assert set(about["report"].pop("seconds")) == set(expected.pop("seconds"))
        assert about["report"] == expected
        assert (about["system"], about["batch"], about["fallback"]) == ("c2c", 3, None)


def test_text_to_text_reports_the_text_of_the_sharer(server, pair):
    about = server.chat(model=f"{NAME}/text", c2c={"report": True}).json()["c2c"]
    assert about["message"] == library(pair, f"{NAME}/text", "hello there").message.text
    assert about["report"] is None


def test_an_answer_continues_a_prefix(server, pair):
    expected = library(pair, NAME, "hello", options=RenderOptions(answer_prefix="The fox"))
    assert text_of(server.chat("hello", c2c={"answer_prefix": "The fox"})) == expected.text
    assert expected.text != library(pair, NAME, "hello").text


def test_content_may_come_in_parts_a_developer_is_the_system_and_answers_can_be_sent_back(server):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]}]
    assert text_of(server.chat(messages=parts)) == text_of(server.chat("hello there"))
    first, second = (
        text_of(server.chat(messages=[{"role": role, "content": "Be brief."}, *user("hello")]))
        for role in ("developer", "system")
    )
    assert first == second != text_of(server.chat("hello"))
    client = server.client()
    answer = client.chat.completions.create(model=NAME, messages=user("hello there"), max_tokens=6, temperature=0)
    history = [*user("hello there"), answer.choices[0].message, *user("and now?")]
    again = client.chat.completions.create(model=NAME, messages=history, max_tokens=2, temperature=0)
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


# -- decoding parameters -----------------------------------------------------------------------------------------------


def test_an_answer_ends_before_a_stop_string(server, pair):
    whole = library(pair, NAME, "hello there", tokens=16).text
    for stop in (whole[5:8], whole[3:4]):
        (choice,) = server.chat(max_tokens=16, stop=["never there", stop]).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
        assert streamed(server.chat(max_tokens=16, stop=stop, stream=True)) == [whole[: whole.index(stop)]]
    begun = [whole[-2:] + "!?", whole[3:5] + "!?"]
    assert streamed(server.chat(max_tokens=16, stop=begun, stream=True)) == [whole], "what only begins is not lost"


def test_the_end_token_ends_an_answer(pair):
    ids = library(pair, NAME, "hello there", tokens=8).ids.tolist()
    config = pair.receiver.model.generation_config
    config.eos_token_id = ids[4]
    try:
        expected = library(pair, NAME, "hello there", tokens=8)
        with running(pair) as server:
            found = server.chat(max_tokens=8, logprobs=True).json()
    finally:
        config.eos_token_id = None
    (choice,), count = found["choices"], ids.index(ids[4]) + 1
    assert (choice["message"]["content"], choice["finish_reason"]) == (expected.text, "stop")
    assert found["usage"]["completion_tokens"] == expected.new_tokens == count
    assert len(choice["logprobs"]["content"]) == count - 1


def test_seeds_make_samples_repeatable(server):
    def sample(**fields):
        return [c["message"]["content"] for c in server.chat(temperature=1.0, max_tokens=8, **fields).json()["choices"]]

    both = sample(seed=7, n=2)
    assert sample(seed=7, n=2) == both == sample(seed=7) + sample(seed=8)
    assert both[0] != both[1]
    assert streamed(server.chat(temperature=1.0, max_tokens=8, seed=7, n=2, stream=True)) == both
    assert sample() != sample(), "without a seed every request draws its own"
    assert sample(seed=7, top_p=1e-6) == [text_of(server.chat(max_tokens=8))]


def test_a_batch_changes_no_sample_and_a_tiny_temperature_is_greedy(server, pair):
    fields = [{"temperature": 0.8, "top_p": 0.9, "seed": seed} for seed in range(4)]
    fields += [{"temperature": 1e-40}, {"temperature": 5e-324, "logprobs": True}]
    singles = [server.chat(max_tokens=8, **one).json()["choices"] for one in fields]
    assert [one[0]["message"]["content"] for one in singles[4:]] == [text_of(server.chat(max_tokens=8))] * 2
    with running(pair, max_batch=6, window=PATIENCE) as together, ThreadPoolExecutor(6) as clients:
        found = list(clients.map(lambda one: together.chat(max_tokens=8, c2c={"report": True}, **one).json(), fields))
    assert [answer["c2c"]["batch"] for answer in found] == [6] * 6
    texts = [[choice["message"]["content"] for choice in answer["choices"]] for answer in found]
    assert texts == [[choice["message"]["content"] for choice in single] for single in singles]


def test_logprobs_are_those_of_the_model(server, pair):
    fused = pair.prefill("hello there")
    expected = torch.log_softmax(pair.receiver.next_logits(fused.tokens, fused.cache)[0].float(), -1).topk(3)
    answer = server.client().chat.completions.create(
        model=NAME, messages=user("hello there"), max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs.content
    assert len(found) == 4
    assert [top.logprob for top in found[0].top_logprobs] == pytest.approx(expected.values.tolist(), abs=1e-4)
    names = [pair.receiver.tokenizer.decode([token]) for token in expected.indices.tolist()]
    assert [top.token for top in found[0].top_logprobs] == names
    assert found[0].logprob == pytest.approx(float(expected.values[0]), abs=1e-4)


@pytest.mark.parametrize("stop", [[], ["e"]])
def test_a_stream_has_the_logprobs_of_the_whole_answer(server, stop):
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 12, "temperature": 1, "seed": 11, "stop": stop}
    (choice,) = server.chat(**fields).json()["choices"]
    given = [chunk["choices"][0]["logprobs"] for chunk in events(server.chat(stream=True, **fields).text)[:-1]]
    found = [entry for logprobs in given if logprobs for entry in logprobs["content"]]
    assert [entry["token"] for entry in found] == [entry["token"] for entry in choice["logprobs"]["content"]]
    assert [entry["logprob"] for entry in found] == pytest.approx(
        [entry["logprob"] for entry in choice["logprobs"]["content"]], abs=1e-4
    )


# -- completions -------------------------------------------------------------------------------------------------------


def test_completions_continue_raw_text(server, pair):
    client, text, options = server.client(), "hello there, who buys the red", RenderOptions(chat_template=False)
    for name in MODELS[:3]:
        expected = library(pair, name, text, options=options)
        found = client.completions.create(model=name, prompt=text, max_tokens=6, temperature=0)
        assert (found.choices[0].text, found.usage.prompt_tokens) == (expected.text, expected.prompt_tokens)
    assert client.completions.create(model=NAME, prompt=text, max_tokens=6, temperature=0).object == "text_completion"


def test_completions_take_several_prompts(server):
    client, prompts = server.client(), ["hello there", "who buys the red house", "fox and dog"]
    fields = {"model": NAME, "max_tokens": 5, "temperature": 1, "seed": 4, "n": 2}
    singles = [client.completions.create(prompt=prompt, **fields) for prompt in prompts]
    together = client.completions.create(prompt=prompts, logprobs=2, **fields)
    texts = [choice.text for single in singles for choice in single.choices]
    assert [choice.text for choice in together.choices] == texts
    assert [choice.index for choice in together.choices] == list(range(6))
    assert together.usage.total_tokens == sum(single.usage.total_tokens for single in singles)
    entry = together.choices[0].logprobs
    assert len(entry.tokens) == len(entry.token_logprobs) == len(entry.top_logprobs) == len(entry.text_offset) == 5
    assert streamed(server.post("/v1/completions", json=fields | {"prompt": prompts, "stream": True})) == texts


# -- many requests at once ---------------------------------------------------------------------------------------------


def mixed(count: int, seed: int) -> list[dict]:
    """Requests that differ in everything: prompts, systems, lengths, parameters."""
    rng, made = random.Random(seed), []
    for number in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 20))) + f" {number}"
        fields = {"model": rng.choice(MODELS), "messages": user(text), "max_tokens": rng.randint(1, 8)}
        fields |= rng.choice([{"temperature": 0}, {"temperature": 0}, {"temperature": 1.0, "seed": rng.randint(0, 99)}])
        made.append(fields | rng.choice([{}, {"n": 2}, {"stop": ["a", "e"]}, {"logprobs": True}]))
    return made


def answers_to(server, fields: dict, stream: bool) -> tuple:
    """Texts and reasons of all answers, and the usage."""
    fields = fields | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
    response = server.chat(**fields)
    assert response.status_code == 200, response.text
    chunks = events(response.text)[:-1] if stream else [response.json()]
    answers = [["", None] for _ in range(fields.get("n", 1))]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        answer = answers[choice["index"]]
        answer[0] += choice["delta" if stream else "message"].get("content") or ""
        answer[1] = choice["finish_reason"] or answer[1]
    return answers, chunks[-1]["usage"]


def test_answers_to_16_clients_are_those_to_each_alone(server):
    requests = mixed(32, seed=1)
    singles = [answers_to(server, fields, stream=False) for fields in requests]
    batches = server.metric("c2c_batch_answers_count")
    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda one: answers_to(server, requests[one], one % 3 == 0), range(32)))
    assert found == singles
    assert len({json.dumps(answers) for answers, _ in singles}) > 25, "the answers can be told apart"
    assert server.metric("c2c_batch_answers_count") - batches < 32, "some shared a batch"


def test_a_prompt_that_is_too_long_does_not_fail_its_batch(pair):
    texts = [TEXTS[0], "hello there " * 400, TEXTS[2]]
    with running(pair, max_batch=2, window=PATIENCE) as server:
        first, second, third = server.chat_all(texts)
        assert (second.status_code, second.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert [text_of(first), text_of(third)] == [library(pair, NAME, text).text for text in (texts[0], texts[2])]


def test_batches_are_bounded_by_kv_entries(pair):
    read = pair.receiver.encode("hello there").length
    fields = {"max_tokens": 10, "c2c": {"report": True}}
    with running(pair, max_batch=4, window=0.3, kv_tokens=2 * (read + 10)) as server:
        found = server.chat_all(["hello there"] * 4, **fields)
        assert [one.json()["c2c"]["batch"] for one in found] == [2, 2, 2, 2]
        assert {text_of(one) for one in found} == {library(pair, NAME, "hello there", tokens=10).text}
        refused = server.chat(max_tokens=10, n=3)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "--kv-tokens" in refused.text


# -- metrics and logs --------------------------------------------------------------------------------------------------


def test_metrics_count(server, pair):
    names = ("c2c_prompt_tokens_total", "c2c_generated_tokens_total", "c2c_sharer_bytes_total")
    names += ("c2c_time_to_first_token_seconds_count", "c2c_request_seconds_count", "c2c_batch_answers_sum")

    def counts():
        return [server.metric(name, system="c2c") for name in names] + [
            server.metric("c2c_requests_total", system="c2c", status=status) for status in ("200", "400")
        ]

    before = counts()
    server.chat("hello there", n=2)
    server.chat("hello there " * 400)
    report = pair.generate("hello there", max_new_tokens=1).report
    gained = [after - old for after, old in zip(counts(), before, strict=True)]
    assert gained == [report.prompt_tokens, 12, report.sharer_bytes, 1, 1, 2, 1, 1]
    assert server.metric("c2c_queue_length") == server.metric("c2c_active_requests") == 0
    text = server.metric("c2c_sharer_bytes_total", system="text")
    message = server.chat(model=f"{NAME}/text", c2c={"report": True}).json()["c2c"]["message"]
    assert server.metric("c2c_sharer_bytes_total", system="text") - text == len(message.encode())


def test_the_log_has_facts_and_no_texts(server, caplog):
    with caplog.at_level(logging.INFO, logger="c2c.serving"):
        response = server.chat("a secret about the fox")
        server.chat("a secret about the fox " * 200)
        server.post("/v1/chat/completions", content=b'{"secret')
        server.until(lambda: len([r for r in caplog.records if r.message == "request"]) >= 3)
    facts = [record.facts for record in caplog.records if record.message == "request"]
    assert facts[0]["request_id"] == response.headers["x-request-id"]
    assert (facts[0]["status"], facts[0]["system"], facts[0]["completion_tokens"]) == (200, "c2c", 6)
    assert [fact.get("code") for fact in facts] == [None, "context_length_exceeded", "invalid_json"]
    logged = json.dumps(facts) + caplog.text
    assert "secret" not in logged
    assert text_of(response) not in logged
