"""A streamed answer is the same answer, and no thread outlives its reader."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from c2c.errors import PromptError
from c2c.systems import make_system
from tiny import memory_pair, open_fusers, pair, token_ids

PROMPTS = ["Hello world!", "What is the capital of France? Explain step by step, slowly.", "A 你好 🙂"]
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def opened():
    return open_fusers(pair("qwen3", "llama"))


class Collector(BaseStreamer):
    """A streamer that keeps the token ids."""

    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


def slowly(ids, scores):
    """A logits processor with which an answer of 200 tokens takes seconds."""
    threading.Event().wait(0.02)
    return scores


LONG = GREEDY | {"max_new_tokens": 400, "logits_processor": [slowly]}


def streaming() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "c2c-stream"]


def assert_all_end() -> None:
    """Threads of streams end within a few tokens."""
    gc.collect()
    limit = time.monotonic() + 5
    while streaming() and time.monotonic() < limit:
        time.sleep(0.01)
    assert not streaming()


# -- the answer --------------------------------------------------------------------------------------------------------


def test_a_streamer_gets_every_token(opened):
    collector = Collector()
    result = opened.generate(PROMPTS[0], max_new_tokens=5, streamer=collector)
    assert collector.ids == [*opened.receiver.encode(PROMPTS[0]).ids[0].tolist(), *result.ids.tolist()]
    assert collector.ended


@pytest.mark.parametrize("kwargs", [GREEDY, {"do_sample": True}], ids=["greedy", "sampling"])
def test_the_pieces_of_a_stream_join_to_the_answer(opened, kwargs):
    torch.manual_seed(4)
    stream = opened.stream(PROMPTS[1:2], max_new_tokens=16, **kwargs)
    pieces = list(stream)
    assert list(stream) == []  # and does not wait for ever
    torch.manual_seed(4)
    result = opened.generate(PROMPTS[1], max_new_tokens=16, **kwargs)
    assert "".join(pieces) == result.text == stream.result.text
    assert len([piece for piece in pieces if piece]) > 1
    assert token_ids(stream.result) == token_ids(result)
    assert stream.result.report.fused_tokens == result.report.fused_tokens


def test_closing_a_stream_stops_the_generation(opened):
    def wait(ids, scores):
        threading.Event().wait(0.02)
        return scores

    with opened.stream(PROMPTS[0], max_new_tokens=200, logits_processor=[wait]) as stream:
        next(stream)
    assert stream.result.new_tokens < 100


def test_a_stream_keeps_other_stopping_criteria(opened):
    length = opened.receiver.encode(PROMPTS[0]).length

    def after_three(ids, scores, **kwargs):
        return torch.full((ids.shape[0],), ids.shape[1] >= length + 3)

    stream = opened.stream(PROMPTS[0], max_new_tokens=50, stopping_criteria=[after_three])
    list(stream)
    assert stream.result.new_tokens == 3


def break_midway(ids, scores):
    raise RuntimeError("broken pipe")


@pytest.mark.parametrize(
    ("prompt", "kwargs", "error"),
    [
        ("Hello", {"temprature": 1}, "temprature"),  # refused by generate
        ("word " * 600, {}, "made for 512"),  # refused before it
        ("Hello", {"num_beams": 2}, "streamer"),
        ("Hello", {"logits_processor": [break_midway]}, "broken pipe"),
    ],
)
def test_errors_of_the_generation_reach_the_reader_of_a_stream(opened, prompt, kwargs, error):
    stream = opened.stream(prompt, max_new_tokens=4, **kwargs)
    with pytest.raises((ValueError, RuntimeError), match=error):
        list(stream)
    assert stream.result is None


def test_only_one_conversation_is_streamed(opened):
    with pytest.raises(PromptError, match="only one conversation"):
        opened.stream(PROMPTS)


def test_a_streamer_does_not_see_entries_of_private_context():
    model, collector = memory_pair(), Collector()
    result = model.generate(PROMPTS[0], sharer_messages="A red boat.", max_new_tokens=3, streamer=collector)
    assert collector.ids == [*model.receiver.encode(PROMPTS[0]).ids[0].tolist(), *result.ids.tolist()]


@pytest.mark.parametrize("kwargs", [{"num_beams": 2}, {"num_beams": 2, "do_sample": True}], ids=str)
def test_beams_are_not_streamed(opened, kwargs):
    with pytest.raises(PromptError, match="num_beams"):
        opened.generate("Hello", streamer=Collector(), max_new_tokens=3, **kwargs)


def test_a_stream_takes_no_other_streamer(opened):
    with pytest.raises(PromptError, match="streamer"):
        opened.stream("Hello", streamer=Collector())


# -- readers that leave ------------------------------------------------------------------------------------------------


def leave_by_break(stream):
    for _ in stream:
        break


def leave_by_error(stream):
    try:
        for piece in stream:
            raise KeyError(piece)
    except KeyError:
        pass


def never_read(stream):
    pass


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_error, never_read])
def test_a_stream_that_nobody_holds_ends(opened, leave):
    leave(opened.stream(PROMPTS[0], **LONG))
    assert_all_end()


@pytest.mark.parametrize("name", ["receiver", "sharer", "text", "c2c"])
def test_streams_of_systems_end_with_their_reader(opened, name):
    leave_by_break(make_system(name, opened).stream(PROMPTS[0], **LONG))
    assert_all_end()


def test_a_closed_stream_gives_no_more_text(opened):
    stream = opened.stream(PROMPTS[0], **LONG)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.result.new_tokens < 400
    stream.close()


def test_two_streams_at_once(opened):
    options = GREEDY | {"max_new_tokens": 12}
    streams = [opened.stream(prompt, **options) for prompt in PROMPTS[:2]]
    texts = ["".join(stream) for stream in streams]
    assert texts == [opened.generate(prompt, **options).text for prompt in PROMPTS[:2]]


LEAVE = {
    "break": "break",
    "error": "raise SystemExit(0)",
    "held": "keep = stream; break",
    "interrupt": "import _thread; _thread.interrupt_main()",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", LEAVE)
def test_a_program_ends_while_it_streams(how):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny import pair
stream = pair().stream("Hi there", max_new_tokens=480, do_sample=False)
try:
    for index, piece in enumerate(stream):
        if index == 2:
            {LEAVE[how]}
except KeyboardInterrupt:
    print("interrupted")
print("left")
"""
    began = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert ("left" in run.stdout) == (how != "error")
    assert time.monotonic() - began < 120
