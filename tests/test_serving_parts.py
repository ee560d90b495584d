"""Parts of the server by themselves: queue, samplers, writers, handoffs, engines of other kinds."""

from __future__ import annotations

import asyncio
import json
import time
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from c2c.serving.detokenizer import Detokenizer
from c2c.serving.engine import Ask, AskToRead, Description, Engine, SharerState, Way
from c2c.serving.errors import ApiError
from c2c.serving.events import Done, Finished, Piece, Read, Started
from c2c.serving.handoffs import HandoffStore
from c2c.serving.logs import JsonFormatter
from c2c.serving.queue import Job, JobQueue
from c2c.serving.requests import ChatRequest, parse
from c2c.serving.sampling import Sampler, Sampling
from c2c.serving.settings import Settings
from c2c.serving.ticket import Ticket
from c2c.serving.writer import Writer
from serving_harness import NAME, events, running, user
from tiny import tokenizer

# -- queue -------------------------------------------------------------------------------------------------------------


def job(way=Way.C2C, n=1, prompt=None) -> Job:
    async def made() -> Ticket:
        return Ticket()

    return Job(Ask(way, prompt or user("hello"), n=n), asyncio.run(made()))


def filled(*jobs: Job, rows=4, window=0.0, limit=64) -> JobQueue:
    queue = JobQueue(limit, rows, window)
    for one in jobs:
        queue.put(one)
    return queue


def test_those_that_can_run_together_do_in_order():
    first, other, second, raw, third = job(), job(Way.TEXT), job(), job(prompt="hello"), job()
    queue = filled(first, other, second, raw, third)
    assert queue.take() == [first, second, third]
    assert queue.take() == [other]
    assert queue.take() == [raw]
    assert len(queue) == 0


def test_a_batch_has_so_many_rows():
    jobs = [job(n=2), job(n=3), job(n=2), job()]
    queue = filled(*jobs)
    assert queue.take() == [jobs[0], jobs[2]]
    assert queue.take() == [jobs[1], jobs[3]]


def test_readings_run_alone():
    async def made() -> Ticket:
        return Ticket()

    readings = [Job(AskToRead(user("a")), asyncio.run(made())) for _ in range(2)]
    queue = filled(*readings, window=60)
    assert queue.take() == [readings[0]], "nor do they wait"
    assert queue.take() == [readings[1]]


def test_the_first_waits_for_company_until_the_window_closes():
    queue = filled(job(), window=0.2, rows=3)
    Thread(target=lambda: (time.sleep(0.02), queue.put(job()))).start()
    began = time.monotonic()
    assert len(queue.take()) == 2
    assert time.monotonic() - began > 0.1
    queue = filled(job(), window=60, rows=2)
    Thread(target=lambda: (time.sleep(0.02), queue.put(job()))).start()
    assert len(queue.take()) == 2, "a full batch does not wait"


def test_who_has_waited_already_waits_no_more():
    one = job()
    one.ticket.made -= 60
    began = time.monotonic()
    assert filled(one, window=30).take() == [one]
    assert time.monotonic() - began < 10


def test_a_job_can_be_taken_back_while_it_waits():
    first, second = job(), job()
    queue = filled(first, second)
    queue.remove(first)
    assert queue.take() == [second]
    waiting = filled(job(), window=60)
    gone = waiting._jobs[0]
    Thread(target=lambda: (time.sleep(0.02), waiting.remove(gone), waiting.close())).start()
    assert waiting.take() == []


def test_a_closed_queue_hands_out_what_it_has():
    one = job()
    queue = filled(one)
    queue.close()
    with pytest.raises(ApiError, match="shutting down"):
        queue.put(job())
    assert queue.take() == [one]
    assert queue.take() == []


def test_a_full_queue_names_a_time():
    queue = filled(job(), job(), limit=2)
    queue.took(7.2)
    with pytest.raises(ApiError) as refused:
        queue.put(job())
    assert refused.value.headers == {"Retry-After": "8"}


# -- sampling ----------------------------------------------------------------------------------------------------------


def chosen(sampler: Sampler, scores) -> int:
    token = int(sampler.choose(torch.tensor(scores)).argmax())
    sampler.took(token)
    return token


def test_samples_follow_the_distribution():
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()

    def shares(**fields):
        sampler = Sampler(Sampling(seed=1, **fields))
        drawn = torch.tensor([chosen(sampler, scores) for _ in range(4000)])
        return (torch.bincount(drawn, minlength=4) / 4000).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(temperature=0.5) == pytest.approx([0.684, 0.247, 0.062, 0.007], abs=0.03)
    assert shares(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_p=0.5) == [1, 0, 0, 0]
    assert shares(temperature=0) == [1, 0, 0, 0]


def test_penalties_are_subtracted_from_what_was_said():
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=1.0))
    scores = [3.0, 2.1, 0.0]  # a token costs 1.5 after its first time, then 2.5
    assert [chosen(sampler, scores) for _ in range(4)] == [0, 1, 0, 1]
    assert sampler.choose(torch.tensor(scores)).tolist() == pytest.approx([3 - 2.5, 2.1 - 2.5, 0])


def test_logprobs_are_those_before_all_settings():
    sampler = Sampler(Sampling(temperature=2.0, top_p=0.5, seed=1, presence_penalty=2.0, logprobs=2))
    scores = torch.tensor([1.0, 3.0, 2.0])
    for _ in range(2):
        token = int(sampler.choose(scores).argmax())
        scored = sampler.took(token)
        expected = scores.log_softmax(-1)
        assert scored.chosen == pytest.approx(float(expected[token]))
        assert scored.top == [(1, pytest.approx(float(expected[1]))), (2, pytest.approx(float(expected[2])))]


# -- writing -----------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


def written(text: str, stops=(), limit=10**6):
    told = []
    writer = Writer(
        Letters(), Sampling(max_tokens=limit, temperature=0, stop=tuple(stops)), ends={0}, stream=True, tell=told.append
    )
    for letter in text:
        writer.take(ord(letter))
    pieces = "".join(event.text for event in told if isinstance(event, Piece))
    finished = [event for event in told if isinstance(event, Finished)]
    return pieces, finished[0] if finished else None


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_streamed_ends_before_the_first_stop_text(text, stops):
    pieces, finished = written(text + "\0", stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (pieces, finished.reason) == (text + "\0", "stop")
        return
    shortest = min(ends)  # generation stops at the token that completes a stop text
    cut = min(text[:shortest].find(stop) for stop in stops if stop in text[:shortest])
    assert (pieces, finished.text, finished.reason) == (text[:cut], text[:cut], "stop")
    assert finished.tokens == shortest


def test_what_can_be_no_stop_text_is_streamed_at_once():
    assert written("abc")[0] == "abc"
    assert written("abc", ["bcd"])[0] == "a"
    assert written("abce", ["bcd"])[0] == "abce"


def test_a_writer_nobody_waits_for_stops():
    gone = []
    writer = Writer(Letters(), Sampling(max_tokens=9, temperature=0), gone=lambda: bool(gone))
    writer.take(65)
    gone.append(True)
    writer.take(66)
    assert (writer.done, writer.tokens) == (True, 1)


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_text_grows_to_what_the_tokenizer_makes_of_all_tokens(name):
    text = "Größe 42? 日本語 😀 — naïve\n\n  two  spaces\t."
    words = tokenizer(name)
    grown = Detokenizer(words)
    seen = []
    for token in words(text, add_special_tokens=False)["input_ids"]:
        grown.add(token)
        assert "\ufffd" not in grown.text
        assert not seen or grown.text.startswith(seen[-1])
        seen.append(grown.text)
    assert grown.text == grown.finish() == words.decode(grown.ids)
    assert len(set(seen)) > 10


# -- handoffs, requests, logs ------------------------------------------------------------------------------------------


def test_handoffs_are_forgotten_when_their_time_is_over():
    now = [1000.0]
    store = HandoffStore(Settings(NAME, handoff_seconds=60, max_handoffs=2), clock=lambda: now[0])
    read = Read("value", 10, 3, "sharer", 0, "float32")
    first, second = store.add(read, "a"), store.add(read, "a", seconds=1000)
    assert (first.expires, second.expires) == (1060, 1060), "no longer than the server keeps any"
    assert store.nbytes == 20
    now[0] += 61
    assert len(store) == store.nbytes == 0
    with pytest.raises(ApiError, match="expired"):
        store.get(first.id, "a")
    store.add(read, "a")
    assert [stored.id for stored in store.of("b")] == []


def test_only_the_owner_deletes_a_handoff():
    store = HandoffStore(Settings(NAME))
    stored = store.add(Read("value", 10, 3, "sharer", 0, "float32"), "a")
    with pytest.raises(ApiError):
        store.delete(stored.id, "b")
    assert len(store) == 1
    store.delete(stored.id, "a")
    assert len(store) == 0


def refusal(body: bytes) -> ApiError | None:
    try:
        parse(ChatRequest, body)
    except ApiError as error:
        return error
    return None


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    )
)
def test_any_json_is_parsed_or_refused(value):
    for body in (value, {"model": "m", "messages": value}, {"model": "m", "messages": user("a"), "c2c": value}):
        refused = refusal(json.dumps(body).encode())
        assert refused is None or refused.status == 400
        json.dumps(refused and refused.to_dict())


def test_a_log_line_is_one_json_object():
    import logging

    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "facts": {"status": 200, "path": "a\nb"}})
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line) | {"time": 0} == {
        "time": 0,
        "level": "info",
        "event": "request",
        "status": 200,
        "path": "a\nb",
    }


# -- another engine ----------------------------------------------------------------------------------------------------


class Echo:
    """An engine without any model, which says what it is asked: the protocol is all that the server needs."""

    def __init__(self):
        self.on_batch = lambda way, rows: None
        self.alive, self.waiting = False, 0
        self.description = Description((Way.C2C,), "echo", ("nobody",), True, "shared")
        self.sharers = (SharerState(),)

    def start(self):
        self.alive = True

    def submit(self, ask):
        ticket = Ticket()
        ticket.push(Started())
        ticket.push(Piece(0, ask.prompt[-1]["content"]))
        ticket.push(Finished(0, ask.prompt[-1]["content"], "stop", 1))
        ticket.push(Done(2, 1, time.monotonic(), 1))
        return ticket

    def close(self):
        self.alive = False


def test_another_engine_can_stand_in_its_place():
    engine: Engine = Echo()
    with running(None, engine=engine) as server:
        assert server.chat("echo me").json()["choices"][0]["message"]["content"] == "echo me"
        assert events(server.chat("echo me", stream=True).text)[1]["choices"][0]["delta"]["content"] == "echo me"
        assert [card["id"] for card in server.get("/v1/models").json()["data"]] == [NAME]
        assert server.chat(model=f"{NAME}/text").status_code == 404
        engine.alive = False
        assert server.get("/health").json()["status"] == "dead"
        assert server.get("/health").status_code == 503
        engine.alive = True
    assert not engine.alive, "closed with the server"
