"""The four ways to answer, each as a stream of panes."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from c2c.alignment.base import derange
from c2c.demo.pane import Pane, State, Way
from c2c.demo.question import Question
from c2c.demo.ticking import ticking
from c2c.generation import FirstTokenTimer, GenerationResult, TextStream, unbatch
from c2c.language_model import LanguageModel
from c2c.messages import Conversation
from c2c.model import C2CModel
from c2c.prompting import RenderOptions
from c2c.systems.base import with_passage
from c2c.systems.text_to_text import hand_over, request, summary_request

TICK = 0.2  # seconds between two looks at a stopwatch

Panes = Iterator[Pane]
Run = Generator[Pane, None, GenerationResult]


def answer(way: Way, model: C2CModel, question: Question, pane: Pane) -> Panes:
    """Answer in one way.

    Args:
        way: which.
        model: the pair.
        question: what is asked.
        pane: where it starts from; its figures are those of this run alone.

    Yields:
        The pane as it fills; the last one is done.

    Raises:
        C2CError: what the models can't do.
    """
    ways: dict[Way, Callable[[C2CModel, Question, Pane], Panes]] = {
        Way.RECEIVER: _receiver,
        Way.SHARER: _sharer,
        Way.TEXT: _text,
        Way.C2C: _c2c,
    }
    return ways[way](model, question, replace(pane, state=State.RUNNING, prefix=question.prefix, total=0.0))


def _receiver(model: C2CModel, question: Question, pane: Pane) -> Panes:
    result = yield from _stream(model.receiver, model.receiver.answer, question.messages, question, pane)
    yield _done(pane, result)


def _sharer(model: C2CModel, question: Question, pane: Pane) -> Panes:
    sharer, messages = model.sharers[0], question.messages
    if question.document is not None:
        messages = with_passage(messages, question.document)
    result = yield from _stream(sharer, sharer.answer, messages, question, pane)
    yield _done(pane, result)


def _text(model: C2CModel, question: Question, pane: Pane) -> Panes:
    """The sharer writes, then the receiver reads it: the time of both counts."""
    began, sharer, messages = time.perf_counter(), model.sharers[0], question.messages
    if question.document is None:
        asked = request(messages, "fair")
    else:
        asked = summary_request(question.document, question.message_tokens)
    writing = replace(question, prefix="", max_new_tokens=question.message_tokens)
    message: GenerationResult | None = None
    written = _stream(sharer, sharer.answer, asked, writing, replace(pane, message=""))
    while message is None:
        try:
            step = next(written)
        except StopIteration as end:
            message = end.value
        else:
            yield replace(step, message=step.text, text="")
    pane = replace(pane, message=message.text, message_written=message.new_tokens, crossed=len(message.text.encode()))
    told = _told(messages, question, message.text)
    before = time.perf_counter() - began
    result = yield from _stream(model.receiver, model.receiver.answer, told, question, pane, before)
    yield _done(pane, result, before)


def _told(messages: Conversation, question: Question, message: str) -> Conversation:
    return hand_over(messages, "fair", message) if question.document is None else with_passage(messages, message)


def _c2c(model: C2CModel, question: Question, pane: Pane) -> Panes:
    if question.document is not None:
        handed = question.document if question.misled is None else question.misled
        generate: Callable[..., Any] = partial(model.generate, sharer_messages=handed)
    elif question.misled is not None:
        generate = partial(_misled, model, question.misleading, question.blend)
    else:
        generate = partial(model.generate, blend=question.blend)
    pane = replace(pane, misled=question.misled)
    result = yield from _stream(model.receiver, generate, question.messages, question, pane)
    report = result.report
    note = "" if model.trained else "The fuser is untrained: it adds nothing, and this is the receiver's own answer."
    yield replace(_done(pane, result), crossed=report.sharer_bytes if report else None, note=note)


@torch.no_grad()
def _misled(
    model: C2CModel,
    other: Conversation,
    blend: float,
    messages: Any,
    *,
    options: RenderOptions,
    **kwargs: Any,
) -> Any:
    """As ``C2CModel.generate``, with the sharer's cache of another conversation laid over this one."""
    clock = FirstTokenTimer()
    tokenizers = [sharer.tokenizer for sharer in model.sharers]
    (own,) = model.aligner.align(model.receiver.tokenizer, tokenizers, [messages], options)
    (theirs,) = model.aligner.align(model.receiver.tokenizer, tokenizers, [other], options)
    return unbatch(model.fuse_prompts([derange(own, theirs)], blend=blend).generate(clock, **kwargs), messages)


def _stream(
    model: LanguageModel,
    generate: Callable[..., Any],
    messages: Conversation,
    question: Question,
    pane: Pane,
    before: float = 0.0,
) -> Run:
    """Yield the pane with the text so far; return the result. Stops the model where no one reads on."""
    began, text = time.perf_counter(), ""
    options = RenderOptions(answer_prefix=question.prefix)
    stream = TextStream(
        model.tokenizer,
        generate,
        messages,
        options=options,
        max_new_tokens=question.max_new_tokens,
        do_sample=False,
    )
    try:
        for piece in ticking(stream, TICK):
            text += piece or ""
            yield replace(pane, text=text, total=before + time.perf_counter() - began)
    finally:
        stream.close()
    assert stream.result is not None
    return stream.result


def _done(pane: Pane, result: GenerationResult, before: float = 0.0) -> Pane:
    return replace(
        pane,
        state=State.DONE,
        text=result.text,
        first=before + result.seconds_to_first_token,
        total=before + result.seconds_total,
        read=result.prompt_tokens,
        written=result.new_tokens,
    )
