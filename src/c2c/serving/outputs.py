"""Outputs of requests while they are decoded: detokenization, stop strings, log-probabilities, events."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokenizers.decoders import DecodeStream

from c2c.errors import ContextLengthError
from c2c.generation import PrefilledPrompt
from c2c.language_model import LanguageModel
from c2c.serving.engine import Delta, Finished, FinishReason, GenerateRequest, Prefilled, SamplingParams, TokenLogprob
from c2c.serving.scheduler import Job


@dataclass(frozen=True)
class Scored:
    """Log-probabilities at one position, before temperature, ``top_p`` and penalties."""

    chosen: float  # of the token that was taken
    top: list[tuple[int, float]]  # the likeliest tokens with theirs, best first


class Detokenizer:
    """Turn tokens into text, one at a time; a character that is split over tokens comes when it is complete."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._restart()

    def step(self, token: int) -> str:
        """Return the text that one more token completes; often empty. Special tokens have none."""
        backend = self._tokenizer.backend_tokenizer
        try:
            piece = self._stream.step(backend, token) or ""
        except Exception:  # tokenizers' own: with byte fallback an invalid byte changes text before it, which was sent
            self._restart()
            piece = self._stream.step(backend, token) or ""
        self._ids.append(token)
        self._length += len(piece)
        return piece

    def flush(self) -> str:
        """Return the text of an incomplete character at the end."""
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))[self._length :]

    def name(self, token: int) -> str:
        """Return one token as text, special tokens too."""
        return str(self._tokenizer.decode([token]))

    def _restart(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._length = 0


class StopMatcher:
    """Find the first stop string in a text that grows, looking at no more than the end of it.

    Attributes:
        found: one was found; nothing may follow.
        pending: the last characters, which could be the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self.found, self.pending = False, ""

    def feed(self, text: str) -> str:
        """Append text; return what is certain to stand before any stop string."""
        text = self.pending + text
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self.pending = True, ""
            return text[: min(ends)]
        cut = min((_partial(text, stop) for stop in self._stops), default=len(text))
        self.pending = text[cut:]
        return text[:cut]


def _partial(text: str, stop: str) -> int:
    """Return where the end of ``text`` begins that ``stop`` begins with; the length of ``text`` if there is none."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return at if at >= 0 else len(text)


class AnswerOutput:
    """Take the tokens of one answer, and send its text.

    Args:
        owner: the output of its request, which gets its events.
        model: the answering model.
        params: how it is decoded.
        limit: new tokens at most.
        index: which answer of its request it is.

    Attributes:
        first: ``time.monotonic()`` at the first token.
        tokens: number of tokens so far, an end token included.
        done: the answer has ended, or was given up.
    """

    def __init__(
        self, owner: RequestOutput, model: LanguageModel, params: SamplingParams, limit: int, index: int
    ) -> None:
        self.params, self.limit, self.index, self._owner, self._ends = params, limit, index, owner, model.ends
        self._detokenizer, self._stop = Detokenizer(model.tokenizer), StopMatcher(params.stop)
        self._read = self._certain = 0  # characters: of all tokens, certain to be in the answer
        self._unsent, self._logprobs = "", list[TokenLogprob]()  # not sent yet
        self.first: float | None = None
        self.tokens = 0
        self.done = False

    def append(self, token: int, scored: Scored | None = None) -> None:
        """Append one token, with its log-probability where that is requested."""
        self.done = self.done or self._owner.handle.cancelled
        if self.done:
            return
        self.first = self.first or time.monotonic()
        self.tokens += 1
        ended = token in self._ends
        if scored is not None and not ended:
            top = [(self._detokenizer.name(other), logprob) for other, logprob in scored.top]
            self._logprobs.append(TokenLogprob(self._detokenizer.name(token), scored.chosen, self._read, top))
        piece = self._detokenizer.step(token)
        self._read += len(piece)
        text = self._stop.feed(piece)
        reason: FinishReason | None = None
        if self._stop.found:
            reason = "stop"
        elif ended or self.tokens >= self.limit:
            text += self._stop.pending + self._detokenizer.flush()
            reason = "stop" if ended else "length"
        self._unsent += text
        self._certain += len(text)
        self._send(reason)

    def _send(self, reason: FinishReason | None) -> None:
        """Send the text that is certain, with the log-probabilities of the tokens that begin in it."""
        if reason is None and not (self._owner.stream and self._unsent):
            return
        whole = reason is not None and not self._stop.found
        due = [entry for entry in self._logprobs if whole or entry.offset < self._certain]
        self._owner.handle.push(Delta(self.index, self._unsent, due, reason))
        self._unsent, self._logprobs = "", self._logprobs[len(due) :]
        if reason is not None:
            self.done = True
            self._owner.check_finished()


class RequestOutput:
    """Collect the answers to one request, whose prompt is prefilled.

    Args:
        job: the request, with its handle.
        prompt: the batch that it is part of.
        row: its row of ``prompt``.
        rows: answers in the batch.
        default_tokens: new tokens at most where the request does not say.

    Attributes:
        answers: one output for each answer.

    Raises:
        ContextLengthError: the model has no room for what is requested.
    """

    def __init__(self, job: Job, prompt: PrefilledPrompt, row: int, rows: int, default_tokens: int) -> None:
        request, model = job.request, prompt.model
        if not isinstance(request, GenerateRequest):
            raise TypeError("a handoff has no answers")
        self.handle, self.stream, self._began = job.handle, request.stream, time.monotonic()
        self._report = report = prompt.report.row(row) if prompt.report else None
        message = prompt.messages[row].text if prompt.messages else None
        fallback = f"receiver only: {report.lost}" if report and report.lost else None
        self._finished = partial(
            Finished,
            prompt_tokens=int(prompt.tokens.mask[row].sum()) - (prompt.slots[row] if prompt.slots else 0),
            rows=rows,
            sharer_bytes=report.sharer_bytes if report else len((message or "").encode()),
            message=message,
            fallback=fallback,
        )
        columns = int(prompt.tokens.positions[row, -1]) + 1
        limit = new_tokens(model, columns, request.sampling.max_tokens, default_tokens)
        self.answers = [AnswerOutput(self, model, request.sampling, limit, index) for index in range(request.n)]
        self.handle.push(Prefilled(fallback))

    def check_finished(self) -> None:
        """Report that all answers are there, once they are."""
        if not all(answer.done for answer in self.answers):
            return
        first, report = min(answer.first or math.inf for answer in self.answers), None
        if self._report is not None:  # its seconds are those of the batch, up to where this request is done
            report = self._report.to_dict()
            report["seconds"] |= {"first_token": first - self._began, "decode": time.monotonic() - first}
        tokens = sum(answer.tokens for answer in self.answers)
        self.handle.push(self._finished(completion_tokens=tokens, first_token=first, report=report))


def new_tokens(model: LanguageModel, prompt_tokens: int, requested: int | None, default: int) -> int:
    """Return how many tokens may follow a prompt: those requested, else ``default`` or what fits if that is less.

    Raises:
        ContextLengthError: not so many fit.
    """
    limit = model.context_length
    if limit is not None and prompt_tokens + (requested or 1) > limit:
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens for the {model.role} {model.name} and {requested or 1} new ones "
            f"were requested, {prompt_tokens + (requested or 1)} together, but it was made for {limit}. Shorten the "
            "prompt, or lower max_tokens."
        )
    return requested or (default if limit is None else min(default, limit - prompt_tokens))
