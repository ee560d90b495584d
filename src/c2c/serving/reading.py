"""Prompts that are read: what a batch of answers begins from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from c2c.generation import FusionReport
from c2c.language_model import LanguageModel
from c2c.messages import Conversation
from c2c.prompting import RenderOptions, encode, render, require_tokenizer
from c2c.serving.batch import Prefilled
from c2c.serving.engine import Ask
from c2c.serving.errors import too_long
from c2c.serving.failures import refusing
from c2c.serving.queue import Job
from c2c.serving.raw_text import RawText, as_message
from c2c.tokens import left_pad


@dataclass
class Prompted:
    """A request whose prompt is read.

    Attributes:
        job: the request.
        prompt_tokens: tokens that the answering model reads; entries of private context are none.
        room: new tokens that fit after the prompt; None where the model does not say.
        report: what was fused.
        message: what the sharer wrote.
        crossed: bytes that went from sharer to receiver.
        fallback: why the receiver answers alone although the sharer was to be asked; None where nothing was lost.
    """

    job: Job
    prompt_tokens: int
    room: int | None
    report: FusionReport | None = None
    message: str | None = None
    crossed: int = 0
    fallback: str | None = None


@dataclass
class Batch:
    """Prompts that are read for one model.

    Attributes:
        model: who writes the answers.
        prompted: the requests.
        prefilled: a row for each.
    """

    model: LanguageModel
    prompted: list[Prompted]
    prefilled: Prefilled


def read_alone(
    model: LanguageModel,
    jobs: Sequence[Job],
    prompt: Callable[[Job], Conversation | str],
    *,
    new_tokens: int | None = None,
    prefix: bool = True,
) -> Batch | None:
    """Let a model read prompts by itself, all together. None if none of them can be read.

    Args:
        model: who reads them.
        jobs: the requests.
        prompt: what it reads for each.
        new_tokens: how many must fit at least; by default what the request asks for.
        prefix: whether the prompt ends with the request's ``answer_prefix``.
    """
    prompted: list[Prompted] = []
    rows: list[list[int]] = []
    for job in jobs:
        with refusing(job):
            ids = _ids(model, prompt(job), options_of(ask_of(job)) if prefix else RenderOptions())
            model.check_prompt(left_pad([ids], 0))
            prompted.append(with_room(job, model, len(ids), len(ids), new_tokens))
            rows.append(ids)
    if not rows:
        return None
    tokens = left_pad(rows, 0).to(model.device)  # masked everywhere, so any id will do that every model has
    return Batch(model, prompted, Prefilled(tokens, model.prefill(tokens, tokens.length - 1)))


def with_room(
    job: Job, model: LanguageModel, columns: int, prompt_tokens: int, new_tokens: int | None = None
) -> Prompted:
    """A request with the room that its prompt leaves.

    Raises:
        ApiError: what it asks for does not fit.
    """
    limit, asked = model.context_length, new_tokens or ask_of(job).sampling.max_tokens or 1
    room = None if limit is None else limit - columns
    if room is not None and room < asked:
        raise too_long(
            f"the prompt has {columns} tokens for the {model.role} {model.name} and {asked} new ones were asked for, "
            f"{columns + asked} together, but it was made for {limit}. Shorten the prompt, or lower max_tokens."
        )
    return Prompted(job, prompt_tokens, room)


def ask_of(job: Job) -> Ask:
    """The request of a job that is no reading."""
    if not isinstance(job.ask, Ask):
        raise TypeError("a reading has no prompt to answer")
    return job.ask


def options_of(ask: Ask) -> RenderOptions:
    """How the prompt of a request is rendered."""
    return RenderOptions(answer_prefix=ask.answer_prefix)


def _ids(model: LanguageModel, prompt: Conversation | str, options: RenderOptions) -> list[int]:
    tokenizer = require_tokenizer(model.tokenizer, model.role)
    if isinstance(prompt, str):
        tokenizer, prompt = RawText(tokenizer), as_message(prompt)
    return encode(tokenizer, render(tokenizer, prompt, options)).ids
