"""The server's answers: those of the library, over HTTP, whatever they share a batch with."""

from __future__ import annotations

import json
import logging
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from c2c.generation import FirstTokenTimer
from c2c.prompting import RenderOptions
from c2c.systems.text_to_text import text_to_text
from c2c.tokens import left_pad
from serving_harness import NAME, PATIENCE, events, model, running, user

WAYS = [NAME, f"{NAME}/receiver", f"{NAME}/sharer", f"{NAME}/text"]
WORDS = ["hello", "there", "fox", "red", "house", "sea", "cat", "dog", "who", "buys", "what", "and", "why", "today"]


@pytest.fixture(scope="module")
def pair():
    return model()


@pytest.fixture(scope="module")
def server(pair):
    with running(pair) as found:
        yield found


def alone(pair, way: str, messages, tokens=6, **kwargs):
    """What the library answers."""
    kwargs |= {"max_new_tokens": tokens, "do_sample": False}
    if way == f"{NAME}/receiver":
        return pair.receiver.answer(messages, **kwargs)
    if way == f"{NAME}/sharer":
        return pair.sharers[0].answer(messages, **kwargs)
    if way == f"{NAME}/text":
        return text_to_text(pair.receiver, pair.sharers[0], messages, message_tokens=6, **kwargs).answer
    return pair.generate(messages, **kwargs)


# -- one request -------------------------------------------------------------------------------------------------------


def test_models_are_listed_and_found(server):
    listed = [card.id for card in server.client().models.list()]
    assert listed == WAYS
    card = server.client().models.retrieve(f"{NAME}/text")
    assert card.c2c == {"system": "text", "receiver": "llama", "sharers": ["qwen2"], "context": "shared", "trained": True}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_answers_as_the_library_does(server, pair, way):
    messages = [{"role": "system", "content": "Be brief."}, *user("hello there, who buys the red house?")]
    expected = alone(pair, way, messages)
    found = server.client().chat.completions.create(model=way, messages=messages, max_tokens=6, temperature=0)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "length"
    assert found.model == way
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == expected.new_tokens == 6
    assert found.usage.total_tokens == expected.prompt_tokens + 6


def test_ways_differ(pair):
    """So that the test above can tell them apart."""
    assert len({alone(pair, way, user("hello there")).text for way in WAYS}) == len(WAYS)


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_is_the_same_answer_in_pieces(server, pair, way):
    expected = alone(pair, way, user("hello there"), tokens=12)
    with server.client().chat.completions.create(
        model=way, messages=user("hello there"), max_completion_tokens=12, temperature=0, stream=True
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 4
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_has_the_shape_that_clients_expect(server):
    response = server.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    assert found[-1] == "[DONE]"
    assert found.count("[DONE]") == 1
    assert all(chunk["object"] == "chat.completion.chunk" and len(chunk["choices"]) == 1 for chunk in found[:-1])
    assert all("usage" not in chunk for chunk in found[:-1])
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert found[-2]["choices"][0]["delta"] == {}


def test_a_stream_tells_usage_and_report_in_a_last_chunk(server):
    plain = server.chat(c2c={"report": True}).json()
    found = events(server.chat(stream=True, stream_options={"include_usage": True}, c2c={"report": True}).text)
    assert [chunk["usage"] for chunk in found[:-2]] == [None] * (len(found) - 2)
    assert found[-2]["choices"] == []
    assert found[-2]["usage"] == plain["usage"]
    assert found[-2]["c2c"]["report"]["fused_tokens"] == plain["c2c"]["report"]["fused_tokens"] > 0


def test_a_report_is_that_of_the_request_alone(pair):
    """Also where others share its batch."""
    texts = ["hello", "hello there, who buys the red house by the sea?", "fox"]
    with running(pair, max_batch=3, window=PATIENCE) as server, ThreadPoolExecutor(3) as clients:
        found = list(clients.map(lambda text: server.chat(text, c2c={"report": True}).json()["c2c"], texts))
    for text, about in zip(texts, found, strict=True):
        expected = pair.generate(text, max_new_tokens=1, do_sample=False).report.to_dict()
        seconds = about["report"].pop("seconds")
        assert set(seconds) == set(expected.pop("seconds"))
        assert about["report"] == expected
        assert about["system"] == "c2c"
    assert [about["batch"] for about in found] == [3, 3, 3]


def test_text_to_text_reports_what_the_sharer_wrote(server, pair):
    told = text_to_text(pair.receiver, pair.sharers[0], "hello there", message_tokens=6, max_new_tokens=1)
    about = server.chat(model=f"{NAME}/text", c2c={"report": True}).json()["c2c"]
    assert about["message"] == told.message.text
    assert about["report"] is None


def test_an_answer_goes_on_from_a_prefix(server, pair):
    expected = alone(pair, NAME, user("hello"), options=RenderOptions(answer_prefix="The fox"))
    assert server.chat("hello", c2c={"answer_prefix": "The fox"}).json()["choices"][0]["message"]["content"] == (
        expected.text
    )
    assert expected.text != alone(pair, NAME, user("hello")).text


def test_content_may_come_in_parts_and_a_developer_is_the_system(server):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]}]
    assert server.chat(messages=parts).json()["choices"] == server.chat("hello there").json()["choices"]
    told = [[{"role": role, "content": "Be brief."}, *user("hello")] for role in ("developer", "system")]
    first, second = (server.chat(messages=messages).json()["choices"] for messages in told)
    assert first == second != server.chat("hello").json()["choices"]


def test_answers_of_the_api_can_be_sent_back(server):
    client = server.client()
    first = client.chat.completions.create(model=NAME, messages=user("hello there"), max_tokens=6, temperature=0)
    history = [*user("hello there"), first.choices[0].message, *user("and now?")]
    again = client.chat.completions.create(model=NAME, messages=history, max_tokens=2, temperature=0)
    assert again.usage.prompt_tokens > first.usage.prompt_tokens


# -- decoding settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_text(server, pair, stream):
    whole = alone(pair, NAME, user("hello there"), tokens=16).text
    stops = {whole[5:8]: whole.index(whole[5:8]), whole[3:4]: whole.index(whole[3:4])}
    for stop, at in stops.items():
        response = server.chat(max_tokens=16, stop=["never there", stop], stream=stream)
        if stream:
            chunks = events(response.text)[:-1]
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            reason = chunks[-1]["choices"][0]["finish_reason"]
        else:
            (choice,) = response.json()["choices"]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert (text, reason) == (whole[:at], "stop")


def test_a_stop_text_that_only_begins_is_not_lost(server, pair):
    whole = alone(pair, NAME, user("hello there"), tokens=12).text
    response = server.chat(max_tokens=12, stop=[whole[-2:] + "!?", whole[3:5] + "!?"], stream=True)
    chunks = events(response.text)[:-1]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole


def test_the_end_token_ends_an_answer(pair):
    whole = alone(pair, NAME, user("hello there"), tokens=8).ids.tolist()
    end = whole[4]
    config = pair.receiver.model.generation_config
    config.eos_token_id = end
    try:
        expected = alone(pair, NAME, user("hello there"), tokens=8)
        with running(pair) as server:
            found = server.chat(max_tokens=8, logprobs=True).json()
    finally:
        config.eos_token_id = None
    (choice,) = found["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == expected.text
    assert found["usage"]["completion_tokens"] == expected.new_tokens == whole.index(end) + 1
    assert len(choice["logprobs"]["content"]) == whole.index(end)


def test_seeds_make_samples_repeatable(server):
    def sample(**fields):
        return [c["message"]["content"] for c in server.chat(temperature=1.0, max_tokens=8, **fields).json()["choices"]]

    both = sample(seed=7, n=2)
    assert sample(seed=7, n=2) == both
    assert sample(seed=7) + sample(seed=8) == both
    assert both[0] != both[1]
    assert sample() != sample(), "without a seed every request draws its own"
    assert sample(seed=7, top_p=1e-6) == [server.chat(max_tokens=8).json()["choices"][0]["message"]["content"]]


def test_a_sample_does_not_depend_on_its_company(server, pair):
    def sample(where, seed):
        return where.chat(temperature=0.8, top_p=0.9, seed=seed, max_tokens=8, c2c={"report": True}).json()

    singles = [sample(server, seed)["choices"] for seed in range(6)]
    with running(pair, max_batch=6, window=PATIENCE) as together, ThreadPoolExecutor(6) as clients:
        found = list(clients.map(lambda seed: sample(together, seed), range(6)))
    assert [answer["choices"] for answer in found] == singles
    assert [answer["c2c"]["batch"] for answer in found] == [6] * 6


def test_several_answers_stream_side_by_side(server):
    fields = {"temperature": 1.0, "seed": 3, "n": 3, "max_tokens": 6}
    expected = [choice["message"]["content"] for choice in server.chat(**fields).json()["choices"]]
    texts, reasons = [""] * 3, [None] * 3
    for chunk in events(server.chat(stream=True, **fields).text)[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == expected
    assert reasons == ["length"] * 3


def test_logprobs_are_those_of_the_model(server, pair):
    fused = pair.prefill("hello there")
    expected = torch.log_softmax(pair.receiver.next_logits(fused.tokens, fused.cache)[0].float(), -1)
    answer = server.client().chat.completions.create(
        model=NAME, messages=user("hello there"), max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs.content
    assert len(found) == 4
    best = expected.topk(3)
    assert [top.logprob for top in found[0].top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert [top.token for top in found[0].top_logprobs] == [
        pair.receiver.tokenizer.decode([token]) for token in best.indices.tolist()
    ]
    assert found[0].logprob == pytest.approx(float(best.values[0]), abs=1e-4)
    sampled = server.chat(temperature=1.5, seed=5, logprobs=True, top_logprobs=0).json()["choices"][0]["logprobs"]
    assert sampled["content"][0]["logprob"] < float(best.values[0]) - 0.01
    assert sampled["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("stop", [[], ["e"]])
def test_a_stream_has_the_logprobs_of_the_whole_answer(server, stop):
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 12, "temperature": 1, "seed": 11, "stop": stop}
    (choice,) = server.chat(**fields).json()["choices"]
    chunks = events(server.chat(stream=True, **fields).text)[:-1]
    given = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    streamed = [entry for logprobs in given if logprobs for entry in logprobs["content"]]
    for ours, theirs in zip(streamed, choice["logprobs"]["content"], strict=True):
        assert ours["token"] == theirs["token"]
        assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)


def test_penalties_change_an_answer_as_they_should(server, pair):
    whole = alone(pair, NAME, user("hello there"), tokens=24).ids.tolist()
    assert len(set(whole)) < 24, "the plain answer repeats itself"
    fields = {"max_tokens": 24, "frequency_penalty": 2.0, "presence_penalty": 2.0, "logprobs": True}
    entries = server.chat(**fields).json()["choices"][0]["logprobs"]["content"]
    names = [entry["token"] for entry in entries]
    plain = [pair.receiver.tokenizer.decode([token]) for token in whole]
    repeated = next(i for i, name in enumerate(plain) if name in plain[:i])
    assert names[:repeated] == plain[:repeated], "nothing changes before the first repetition"
    assert len(set(names)) > len(set(plain))


# -- completions -------------------------------------------------------------------------------------------------------


def raw(model_, text, tokens=6) -> str:
    """What a model says after a text, without any template."""
    options = RenderOptions(chat_template=False)
    return model_.answer(text, options=options, max_new_tokens=tokens, do_sample=False).text


def test_completions_go_on_from_raw_text(server, pair):
    client, text = server.client(), "hello there, who buys the red"
    for way, answering in ((f"{NAME}/receiver", pair.receiver), (f"{NAME}/sharer", pair.sharers[0])):
        found = client.completions.create(model=way, prompt=text, max_tokens=6, temperature=0)
        assert found.choices[0].text == raw(answering, text)
        assert found.choices[0].finish_reason == "length"
        assert found.usage.prompt_tokens == len(answering.tokenizer(text)["input_ids"])
    fused = client.completions.create(model=NAME, prompt=text, max_tokens=6, temperature=0)
    assert fused.choices[0].text != raw(pair.receiver, text)


def test_completions_take_several_prompts(server):
    client, prompts = server.client(), ["hello there", "who buys the red house", "fox and dog"]
    singles = [
        client.completions.create(model=NAME, prompt=prompt, max_tokens=5, temperature=1, seed=4, n=2, logprobs=2)
        for prompt in prompts
    ]
    fields = {"model": NAME, "prompt": prompts, "max_tokens": 5, "temperature": 1, "seed": 4, "n": 2}
    both = client.completions.create(**fields, logprobs=2)
    assert [choice.text for choice in both.choices] == [c.text for single in singles for c in single.choices]
    assert [choice.index for choice in both.choices] == list(range(6))
    assert both.usage.total_tokens == sum(single.usage.total_tokens for single in singles)
    entry = both.choices[0].logprobs
    assert len(entry.tokens) == len(entry.token_logprobs) == len(entry.top_logprobs) == len(entry.text_offset) == 5
    texts = [""] * 6
    for chunk in client.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in both.choices]


# -- many requests at once ---------------------------------------------------------------------------------------------


def requests(count: int, seed: int) -> list[dict]:
    """Requests that differ in everything: prompts, ways, lengths, settings."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 20))) + f" {number}"
        fields = {"model": rng.choice(WAYS), "messages": user(text), "max_tokens": rng.randint(1, 10)}
        fields |= rng.choice([{"temperature": 0}, {"temperature": 0}, {"temperature": 1.0, "seed": rng.randint(0, 99)}])
        fields |= rng.choice([{}, {"n": 2}, {"stop": ["a", "e"]}, {"logprobs": True, "top_logprobs": 1}])
        made.append(fields)
    return made


def told(server, fields: dict, stream: bool) -> tuple:
    """What a client gets for every answer: text, reason, tokens with log-probabilities; and the usage of all."""
    asked = fields | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
    response = server.post("/v1/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    chunks = events(response.text)[:-1] if stream else [response.json()]
    answers = [["", None, []] for _ in range(fields.get("n", 1))]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        answer = answers[choice["index"]]
        answer[0] += choice["delta" if stream else "message"].get("content") or ""
        answer[1] = choice["finish_reason"] or answer[1]
        answer[2] += [(e["token"], round(e["logprob"], 3)) for e in (choice["logprobs"] or {}).get("content", [])]
    return answers, chunks[-1]["usage"]


def test_answers_to_16_clients_are_those_to_each_alone(server):
    asked = requests(48, seed=1)
    singles = [told(server, fields, stream=False) for fields in asked]
    batches = server.metric("c2c_batch_answers_count")
    with ThreadPoolExecutor(16) as clients:
        together = list(clients.map(lambda pair_: told(server, *pair_), [(f, i % 3 == 0) for i, f in enumerate(asked)]))
    for one, alone_ in zip(together, singles, strict=True):
        assert one[1] == alone_[1]
        for (text, reason, tokens), (own, own_reason, own_tokens) in zip(one[0], alone_[0], strict=True):
            assert (text, reason) == (own, own_reason)
            assert [name for name, _ in tokens] == [name for name, _ in own_tokens]
            assert [value for _, value in tokens] == pytest.approx([value for _, value in own_tokens], abs=2e-3)
    assert len({json.dumps(answers) for answers, _ in singles}) > 40, "the answers can be told apart"
    assert server.metric("c2c_batch_answers_count") - batches < len(asked), "some shared a batch"


def test_one_bad_prompt_does_not_spoil_its_batch(pair):
    texts = ["hello", "hello there " * 400, "fox"]
    with running(pair, max_batch=3, window=PATIENCE) as server, ThreadPoolExecutor(3) as clients:
        found = list(clients.map(lambda text: server.chat(text, c2c={"report": True}), texts))
    assert [response.status_code for response in found] == [200, 400, 200]
    for text, response in ((texts[0], found[0]), (texts[2], found[2])):
        assert response.json()["choices"][0]["message"]["content"] == alone(pair, NAME, user(text)).text


# -- what is told about requests ---------------------------------------------------------------------------------------


def test_metrics_count(server, pair):
    def counts():
        names = ("c2c_prompt_tokens_total", "c2c_generated_tokens_total", "c2c_sharer_bytes_total")
        return [server.metric(name, system="c2c") for name in names] + [
            server.metric("c2c_requests_total", system="c2c", status="200"),
            server.metric("c2c_requests_total", system="c2c", status="400"),
            server.metric("c2c_time_to_first_token_seconds_count", system="c2c"),
            server.metric("c2c_batch_answers_sum", system="c2c"),
        ]

    before = counts()
    server.chat("hello there", n=2)
    server.chat("hello there " * 400)
    report = pair.generate("hello there", max_new_tokens=1).report
    gained = [after - old for after, old in zip(counts(), before, strict=True)]
    assert gained == [report.prompt_tokens, 12, report.sharer_bytes, 1, 1, 1, 2]
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
    assert response.json()["choices"][0]["message"]["content"] not in logged


def test_a_request_id_is_the_clients_own_if_it_is_sane(server):
    path = "/v1/models"
    assert server.get(path, headers={"X-Request-ID": "abc-123"}).headers["x-request-id"] == "abc-123"
    ids = {server.get(path, headers={"X-Request-ID": bad}).headers["x-request-id"] for bad in ("a b", "x" * 200, "")}
    assert len(ids) == 3
    assert all(len(made) == 32 for made in ids)
