"""A server that has answered holds nothing of what it was asked, and gives back the memory that it took."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import contextmanager

import httpx
import pytest

from c2c.generation import FusionReport
from c2c.handoff import Handoff
from c2c.remote.handoff import PartialHandoff
from c2c.serving.answers import Answers
from c2c.serving.engine import Ask, AskToRead
from c2c.serving.queue import Job
from c2c.serving.reading import Batch, Prompted
from c2c.serving.ticket import Ticket
from c2c.serving.trace import Trace
from c2c.serving.writer import Writer
from serving_harness import NAME, PATIENCE, held, model, running, user
from test_private import DOCUMENT, private

OF_A_REQUEST = (Answers, Ask, AskToRead, Batch, FusionReport, Handoff, Job, PartialHandoff, Prompted)
OF_A_REQUEST += (Ticket, Trace, Writer)
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def pair():
    return model()


@contextmanager
def without_collector():
    """No garbage collector: what is freed is freed because nothing refers to it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def kept() -> Counter:
    """What there is of requests, by class."""
    return Counter(type(one).__name__ for one in gc.get_objects() if type(one) in OF_A_REQUEST)


def until_nothing_is_kept(server) -> None:
    try:
        server.until(lambda: not kept())
    except AssertionError:
        pytest.fail(f"of requests that have ended there is still: {kept()}")


def ask(server, **fields) -> httpx.Response:
    body = {"model": NAME, "messages": user("hello there"), "max_tokens": 4, "temperature": 0} | fields
    return server.post(CHAT, json=body)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A few seconds are enough for what is freed at once."""
    monkeypatch.setattr("serving_harness.PATIENCE", 10.0)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200),
        ({"stream": True}, 200),
        ({"n": 3, "c2c": {"report": True}}, 200),
        ({"model": f"{NAME}/receiver", "logprobs": True, "stop": ["e"]}, 200),
        ({"model": f"{NAME}/text", "c2c": {"report": True}}, 200),
        ({"model": f"{NAME}/sharer", "stream": True, "stream_options": {"include_usage": True}}, 200),
        ({"max_tokens": 100_000}, 400),
        ({"max_tokens": 100_000, "stream": True}, 400),
        ({"temperature": -1}, 400),
    ],
)
def test_nothing_of_a_request_outlives_it(pair, fields, status):
    with running(pair) as server:
        ask(server)  # what is made once
        with without_collector():
            for _ in range(5):
                assert ask(server, **fields).status_code == status
            until_nothing_is_kept(server)


def test_nothing_of_a_batch_outlives_it(pair):
    with running(pair) as server, without_collector():
        texts = [f"hello there {number}" for number in range(5)]
        body = {"model": NAME, "prompt": texts, "max_tokens": 4}
        assert len(server.post("/v1/completions", json=body).json()["choices"]) == 5
        until_nothing_is_kept(server)


def test_nothing_is_kept_of_those_whose_client_left(pair):
    with running(pair) as server, without_collector():
        with held(pair) as gate:
            for stream in (False, True):
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(
                        server.url + CHAT,
                        json={"model": NAME, "messages": user("hello"), "stream": stream},
                        timeout=0.2,
                    )
            gate.set()
        until_nothing_is_kept(server)


def test_nothing_is_kept_of_those_that_took_too_long(pair):
    with running(pair, timeout=0.2) as server, without_collector():
        with held(pair):
            assert ask(server).status_code == 504
        until_nothing_is_kept(server)


def test_a_handoff_that_was_deleted_is_gone():
    with running(private()) as server, without_collector():
        made = server.post("/v1/c2c/handoffs", json={"messages": DOCUMENT}).json()
        for stream in (False, True):
            assert ask(server, c2c={"handoff": made["id"]}, stream=stream).status_code == 200
        assert kept()["Handoff"] == 1
        httpx.delete(f"{server.url}/v1/c2c/handoffs/{made['id']}", timeout=PATIENCE)
        until_nothing_is_kept(server)
