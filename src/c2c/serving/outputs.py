"""Outputs of requests while they are decoded: detokenization, stop strings, log-probabilities, events."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers.convert_slow_tokenizer import bytes_to_unicode

from c2c.errors import ContextLengthError
from c2c.generation import PrefilledPrompt
from c2c.language_model import LanguageModel
from c2c.serving.engine import (
    Delta,
    Finished,
    FinishReason,
    GenerateRequest,
    Prefilled,
    SamplingParams,
    TokenLogprob,
    TokenScore,
)
from c2c.serving.scheduler import Job

_IMPOSSIBLE = -9999.0  # in place of minus infinity, which JSON does not have
_BROKEN = "\ufffd"  # stands for bytes that are no text
_BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")
_BYTE_LEVEL = {letter: byte for byte, letter in bytes_to_unicode().items()}


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

    def _restart(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._length = 0


class TokenNames:
    """Name tokens for log-probabilities: each by the text that it stands for inside of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.convert_tokens_to_ids("a")  # a decoder strips the space that a text begins with
        self._before = "" if self._anchor is None else self._decode([self._anchor])

    def score(self, token: int, logprob: float) -> TokenScore:
        """Return a token with its name and log-probability.

        Bytes that are no text by themselves are named ``bytes:\\xf0\\x9f``, and ids without text ``token_id:640``.
        """
        logprob = max(logprob, _IMPOSSIBLE)
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not piece:
            return TokenScore(token, f"token_id:{token}", None, logprob)
        text = self._decode([token]) if self._anchor is None else self._decode([self._anchor, token])
        text = text.removeprefix(self._before)
        raw = (_piece_bytes(piece) if _BROKEN in text else None) or text.encode()
        try:
            return TokenScore(token, raw.decode(), raw, logprob)
        except UnicodeDecodeError:
            return TokenScore(token, "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw, logprob)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _piece_bytes(piece: str) -> bytes | None:
    """Return the bytes that a piece of a vocabulary stands for, in the two ways that there are; None where in none."""
    if found := _BYTE_FALLBACK.fullmatch(piece):
        return bytes([int(found[1], 16)])
    values = [_BYTE_LEVEL.get(letter) for letter in piece]
    return None if None in values else bytes(value for value in values if value is not None)


class StopMatcher:
    """Find the first stop string in a text that grows, looking at no more than the end of it.

    Attributes:
        found: one was found; nothing may follow.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held, self._shown = "", list[bool]()  # the last characters, which could be the beginning of a stop string
        self.found = False

    @property
    def pending(self) -> str:
        """What is held back and was no stop string, should the text end here."""
        return _visible(self._held, self._shown)

    def feed(self, text: str, shown: bool = True) -> str:
        """Append text; return what is certain to stand before any stop string.

        Args:
            text: that follows.
            shown: False for the text of a special token, which stop strings may name and no answer has.
        """
        self._held, self._shown = self._held + text, self._shown + [shown] * len(text)
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.found = bool(ends)
        if ends:
            certain, self._held = _visible(self._held[: min(ends)], self._shown), ""
            return certain
        cut = min((_partial(self._held, stop) for stop in self._stops), default=len(self._held))
        certain = _visible(self._held[:cut], self._shown)
        self._held, self._shown = self._held[cut:], self._shown[cut:]
        return certain


def _visible(text: str, shown: Sequence[bool]) -> str:
    return "".join(letter for letter, visible in zip(text, shown, strict=False) if visible)


def special_texts(tokenizer: Any, stops: Sequence[str]) -> dict[int, str]:
    """Return the texts of those special tokens that stop strings name."""
    special = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return {token: text for token, text in special.items() if any(text in stop for stop in stops)}


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
        self._special = special_texts(model.tokenizer, params.stop) if params.stop else {}
        self._names = None if params.logprobs is None else TokenNames(model.tokenizer)
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
        if scored is not None and self._names is not None and not ended:
            top = [self._names.score(*pair) for pair in scored.top]
            self._logprobs.append(TokenLogprob(self._names.score(token, scored.chosen), self._read, top))
        piece = self._detokenizer.step(token)
        self._read += len(piece)
        text = self._stop.feed(piece)
        if token in self._special and not self._stop.found:
            text += self._stop.feed(self._special[token], shown=False)
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
            notes=job.notes,
        )
        columns = int(prompt.tokens.positions[row, -1]) + 1
        limit = new_tokens(model, columns, request.sampling.max_tokens, default_tokens)
        self.answers = [AnswerOutput(self, model, request.sampling, limit, index) for index in range(request.n)]
        self.handle.push(Prefilled(fallback, job.notes))

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
    limit = model.answer_limit(prompt_tokens)
    if limit is not None and prompt_tokens + (requested or 1) > limit:
        whole = limit == model.context_length
        reason = f"was made for {limit}" if whole else f"can go on from this cache up to {limit} only"
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens for the {model.role} {model.name} and {requested or 1} new ones "
            f"were requested, {prompt_tokens + (requested or 1)} together, but it "
            f"{reason}. Shorten the prompt, or lower max_tokens."
        )
    return requested or (default if limit is None else min(default, limit - prompt_tokens))
