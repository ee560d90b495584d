"""Parts of the server by themselves: scheduler, sampling, outputs, handoffs, request bodies, engines of other kinds."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models

from c2c.prompting import RenderOptions
from c2c.serving.config import ServeConfig
from c2c.serving.engine import (
    Delta,
    Engine,
    Finished,
    GenerateRequest,
    HandoffCreated,
    HandoffRequest,
    Prefilled,
    RequestHandle,
    SamplingParams,
)
from c2c.serving.errors import ApiError
from c2c.serving.handoffs import HandoffStore
from c2c.serving.outputs import Detokenizer, StopMatcher
from c2c.serving.protocol import ChatCompletionBody
from c2c.serving.scheduler import Job, Scheduler
from c2c.serving.transformers_engine import Sampler
from serving_harness import NAME, events, running, user
from tiny import tokenizer

# -- scheduler ---------------------------------------------------------------------------------------------------------


def job(system="c2c", n=1, prompt_tokens=10, new_tokens=6, handoff=False) -> Job:
    async def made() -> RequestHandle:
        return RequestHandle()

    request = HandoffRequest(user("a")) if handoff else GenerateRequest(system, user("a"), n=n)
    key = object() if handoff else system
    return Job(request, asyncio.run(made()), key, n, prompt_tokens, new_tokens)


def scheduler(*jobs: Job, rows=4, tokens=10**6, window=0.0, limit=64) -> Scheduler:
    made = Scheduler(limit, rows, tokens, window)
    for one in jobs:
        made.put(one)
    return made


def batches(*jobs: Job, **options) -> list[list[int]]:
    """The batches in which jobs are taken, as their places."""
    waiting = scheduler(*jobs, **options)
    waiting.close()
    return [[jobs.index(one) for one in batch] for batch in iter(waiting.take, [])]


def test_batches_are_of_equal_jobs_in_order_within_rows_and_kv_entries():
    assert batches(job(), job("text"), job(), job("raw"), job()) == [[0, 2, 4], [1], [3]]
    assert batches(job(n=2), job(n=3), job(n=2), job()) == [[0, 2], [1, 3]], "at most four rows"
    assert batches(job(handoff=True), job(handoff=True), window=60) == [[0], [1]], "these run alone"
    long = job(prompt_tokens=90)
    assert batches(job(), job(), long, job(), tokens=64) == [[0, 1, 3], [2]], "a long one waits for its turn"
    assert batches(job(), long, job(), tokens=288) == [[0, 1, 2]], "all rows are padded to 90 + 6 entries"
    assert batches(job(), long, job(), tokens=287) == [[0, 1], [2]]


def test_the_first_job_waits_for_others_until_the_window_closes_or_the_batch_is_full():
    def with_a_second(window, rows):
        waiting = scheduler(job(), window=window, rows=rows)
        Thread(target=lambda: (time.sleep(0.02), waiting.put(job()))).start()
        return len(waiting.take())

    began = time.monotonic()
    assert with_a_second(window=0.2, rows=3) == 2
    assert time.monotonic() - began > 0.1
    assert with_a_second(window=60, rows=2) == 2
    waited = job()
    waited.handle.created -= 60
    assert scheduler(waited, window=30).take() == [waited]


def test_jobs_can_be_removed_while_they_wait():
    first, second = job(), job()
    waiting = scheduler(first, second)
    waiting.remove(first)
    assert waiting.take() == [second]
    gone = job()
    waiting = scheduler(gone, window=60)
    Thread(target=lambda: (time.sleep(0.02), waiting.remove(gone), waiting.close())).start()
    assert waiting.take() == []


def test_a_full_or_closed_scheduler_refuses():
    waiting = scheduler(job(), limit=1)
    waiting.last_batch = 7.2
    with pytest.raises(ApiError) as refused:
        waiting.put(job())
    assert (refused.value.code, refused.value.headers) == ("queue_full", {"Retry-After": "8"})
    waiting.close()
    with pytest.raises(ApiError, match="shutting down"):
        waiting.put(job())
    assert len(waiting.take()) == 1
    assert waiting.take() == []


# -- sampling ----------------------------------------------------------------------------------------------------------


def chosen(sampler: Sampler, scores) -> int:
    token = int(sampler.choose(torch.as_tensor(scores)).argmax())
    sampler.record(token)
    return token


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.684, 0.247, 0.062, 0.007]),
        ({"top_p": 0.7}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        *(({"temperature": tiny, "logprobs": 1}, [1, 0, 0, 0]) for tiny in (1e-6, 1e-38, 5e-324)),
    ],
)
def test_samples_follow_the_distribution(params, expected):
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    sampler = Sampler(SamplingParams(seed=1, **params))
    drawn = torch.tensor([chosen(sampler, scores) for _ in range(1500)])
    assert (torch.bincount(drawn, minlength=4) / 1500).tolist() == pytest.approx(expected, abs=0.04)


def test_penalties_are_subtracted_from_tokens_of_the_answer():
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=1.0))
    scores = [3.0, 2.1, 0.0]  # a token costs 1.5 after its first time, then 2.5
    assert [chosen(sampler, scores) for _ in range(4)] == [0, 1, 0, 1]
    assert sampler.choose(torch.tensor(scores)).tolist() == pytest.approx([3 - 2.5, 2.1 - 2.5, 0])


def test_logprobs_are_those_before_all_parameters():
    sampler = Sampler(SamplingParams(temperature=2.0, top_p=0.5, seed=1, presence_penalty=2.0, logprobs=2))
    scores = torch.tensor([1.0, 3.0, 2.0])
    expected = scores.log_softmax(-1)
    for _ in range(2):
        token = int(sampler.choose(scores).argmax())
        scored = sampler.record(token)
        assert scored.chosen == pytest.approx(float(expected[token]))
        assert scored.top == [(1, pytest.approx(float(expected[1]))), (2, pytest.approx(float(expected[2])))]


# -- outputs -----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stops):
    matcher, out, count = StopMatcher(stops), "", 0
    while count < len(text) and not matcher.found:
        out += matcher.feed(text[count])
        count += 1
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (matcher.found, out + matcher.pending) == (False, text)
        return
    assert count == min(ends), "it ends with the token that completes a stop string"
    assert out == text[: min(text[:count].find(stop) for stop in stops if stop in text[:count])]


def test_what_can_be_no_stop_string_is_sent_at_once_and_no_more_is_kept():
    matcher = StopMatcher(["bcd"])
    assert [matcher.feed(letter) for letter in "abcebb"] == ["a", "", "", "bce", "", "b"]
    matcher = StopMatcher(["a" * 64 + "b"])
    for _ in range(20_000):
        matcher.feed("a")
        assert len(matcher.pending) <= 64


@pytest.mark.parametrize("name", ["chatml", "llama3", "metaspace"])
def test_text_grows_to_what_the_tokenizer_makes_of_all_tokens(name):
    words, seen = tokenizer(name), []
    ids = words("Größe 42? 日本語 😀 — naïve\n\n  two  spaces\t.", add_special_tokens=False)["input_ids"]
    for tokens in (ids, ids[:-8] + ids[:1], [*ids, words.convert_tokens_to_ids(words.all_special_tokens[0])]):
        detokenizer = Detokenizer(words)
        seen = [detokenizer.step(token) for token in tokens]
        assert "".join(seen) + detokenizer.flush() == words.decode(tokens, skip_special_tokens=True)
    assert "\ufffd" not in "".join(seen)


def test_bytes_that_are_no_text_do_not_end_an_answer():
    """With byte fallback an invalid byte changes the text of those before it, which were sent."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocabulary["again"] = 257
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    class Words:
        backend_tokenizer = made

        def decode(self, ids, **_):
            return made.decode(ids)

    detokenizer = Detokenizer(Words())
    text = "".join(detokenizer.step(byte + 1) for byte in [*b"fine ", 0xFF, 0xFE, 256])
    assert text.startswith("fine ")
    assert (text + detokenizer.flush()).endswith("again")


# -- handoffs, request bodies ------------------------------------------------------------------------------------------


def created(nbytes=10) -> HandoffCreated:
    return HandoffCreated("value", nbytes, 3, "sharer", 0, "float32")


def test_handoffs_expire():
    now = [1000.0]
    store = HandoffStore(ServeConfig(handoff_seconds=60, handoffs=2), clock=lambda: now[0])
    first, second = store.add(created(), "a"), store.add(created(), "a", seconds=1000)
    assert (first.expires, second.expires) == (1060, 1060), "no longer than the server keeps any"
    assert store.nbytes == 20
    with pytest.raises(ApiError, match="no room"):
        store.check_room()
    now[0] += 61
    assert len(store) == store.nbytes == 0
    with pytest.raises(ApiError, match="expired"):
        store.get(first.id, "a")


def test_only_the_owner_uses_and_deletes_a_handoff():
    store = HandoffStore(ServeConfig())
    stored = store.add(created(), "a")
    for use in (store.get, store.delete):
        with pytest.raises(ApiError, match="no handoff"):
            use(stored.id, "b")
    assert (store.list("b"), len(store)) == ([], 1)
    store.delete(stored.id, "a")
    assert len(store) == 0


@pytest.mark.fuzz
@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    )
)
def test_any_json_is_parsed_or_refused(value):
    for body in (value, {"model": "m", "messages": value}, {"model": "m", "messages": user("a"), "c2c": value}):
        with suppress(ApiError, ValidationError):
            ChatCompletionBody.model_validate(body)


# -- another engine ----------------------------------------------------------------------------------------------------


class Echo:
    """An engine without any model, which repeats the prompt: the protocol is all that the server needs."""

    def __init__(self):
        self.on_batch = lambda system, rows: None
        self.alive, self.waiting = False, 0
        self.systems, self.sharers = ["c2c"], [{"state": "ok"}]
        self.info = {"receiver": "echo", "sharers": ["nobody"], "context": "shared", "trained": True}

    def start(self):
        self.alive = True

    async def submit(self, request):
        assert request.render == RenderOptions()
        handle, text = RequestHandle(), request.prompt[-1]["content"]
        sent = [Prefilled(), Delta(0, text, reason="stop"), Finished(2, 1, time.monotonic(), 1)]
        for event in sent:
            handle.push(event)
        return handle

    def close(self):
        self.alive = False


def test_another_engine_can_take_its_place():
    engine: Engine = Echo()
    with running(None, engine=engine) as server:
        assert server.chat("echo me").json()["choices"][0]["message"]["content"] == "echo me"
        assert events(server.chat("echo me", stream=True).text)[1]["choices"][0]["delta"]["content"] == "echo me"
        assert [card["id"] for card in server.get("/v1/models").json()["data"]] == [NAME]
        assert server.chat(model=f"{NAME}/text").status_code == 404
        engine.alive = False
        health = server.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        engine.alive = True
    assert not engine.alive, "closed with the server"
