"""What an engine tells about a request while it works on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from c2c.serving.errors import ApiError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer with its log-probability.

    Attributes:
        token: its text.
        logprob: natural logarithm of its probability, before temperature, ``top_p`` and penalties.
        offset: where it begins in the answer.
        top: the likeliest tokens at this position with theirs.
    """

    token: str
    logprob: float
    offset: int
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Started:
    """The prompt is read; decoding begins.

    Attributes:
        fallback: why the receiver answers alone although a sharer was to be asked; None where it does not.
    """

    fallback: str | None = None


@dataclass(frozen=True)
class Piece:
    """More text of one answer; only where a stream was asked for."""

    choice: int
    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    """One answer, whole.

    Attributes:
        choice: which one.
        text: all of it.
        reason: ``stop`` at an end token or stop text, ``length`` at the limit.
        tokens: how many were generated, an end token included.
        logprobs: of its tokens, the end token left out; empty if not asked for.
    """

    choice: int
    text: str
    reason: FinishReason
    tokens: int
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class Done:
    """All answers of a request are there.

    Attributes:
        prompt_tokens: tokens that the answering model has read.
        completion_tokens: tokens of all answers.
        first_token: ``time.monotonic()`` at the first one.
        rows: answers in the batch that it was part of.
        crossed: bytes that went from sharer to receiver: cache entries, or text.
        report: the fusion report; None where nothing was fused.
        message: what the sharer wrote, for text-to-text.
        fallback: as in :class:`Started`.
    """

    prompt_tokens: int
    completion_tokens: int
    first_token: float
    rows: int
    crossed: int = 0
    report: dict[str, Any] | None = None
    message: str | None = None
    fallback: str | None = None


@dataclass(frozen=True)
class Read:
    """A sharer has read what it is to hand over.

    Attributes:
        value: what the engine wants back when it is used.
        nbytes: what keeping it costs.
        tokens: tokens read.
        sharer: name of the sharer.
        index: which sharer it is.
        precision: how its numbers are kept.
    """

    value: Any
    nbytes: int
    tokens: int
    sharer: str
    index: int
    precision: str


@dataclass(frozen=True)
class Failed:
    """The request is over without an answer."""

    error: ApiError


Event = Started | Piece | Finished | Done | Read | Failed
