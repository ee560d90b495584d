"""One answer while it is written: its text, where it ends, and what is told about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from c2c.serving.detokenizer import Detokenizer
from c2c.serving.events import Event, Finished, FinishReason, Piece, TokenLogprob
from c2c.serving.sampling import Sampler, Sampling, Scored


def _nothing(event: Event) -> None:
    """Tell nobody."""


def _nobody() -> bool:
    """Nobody has left."""
    return False


class Writer:
    """Takes the tokens of one row of a batch.

    Args:
        tokenizer: of the model that writes.
        sampling: how; ``max_tokens`` must be set.
        choice: which answer of its request it is.
        ends: the model's end tokens.
        stream: tell about every piece.
        tell: gets the events.
        gone: whether nobody waits for the answer any more.

    Attributes:
        sampler: chooses the tokens.
        first: ``time.monotonic()`` at the first token.
        done: the answer has ended, or was given up.
        text: the whole answer, once it has ended.
    """

    def __init__(
        self,
        tokenizer: Any,
        sampling: Sampling,
        *,
        choice: int = 0,
        ends: Collection[int] = (),
        stream: bool = False,
        tell: Callable[[Event], object] = _nothing,
        gone: Callable[[], bool] = _nobody,
    ) -> None:
        if sampling.max_tokens is None:
            raise ValueError("max_tokens is None; a writer needs a number.")
        self._limit = sampling.max_tokens
        self._stops, self._choice, self._ends = sampling.stop, choice, ends
        self._stream, self._tell, self._gone = stream, tell, gone
        self._words = Detokenizer(tokenizer)
        self._logprobs: list[TokenLogprob] = []
        self._sent = self._sent_logprobs = 0
        self.sampler = Sampler(sampling, choice)
        self.first: float | None = None
        self.done = False
        self.text = ""

    @property
    def limit(self) -> int:
        """New tokens at most."""
        return self._limit

    @property
    def tokens(self) -> int:
        """New tokens so far, an end token included."""
        return len(self._words.ids)

    def take(self, token: int) -> None:
        """One more token."""
        if self.done:
            return
        if self._gone():
            self._end()
            return
        if self.first is None:
            self.first = time.monotonic()
        scored, ended = self.sampler.took(token), token in self._ends
        if scored is not None and not ended:
            self._logprobs.append(self._named(token, scored))
        known = len(self._words.text)
        self._words.add(token)
        cut = self._stopped(known)
        if cut is not None:
            self._logprobs = [entry for entry in self._logprobs if entry.offset < cut]
            self._finish(self._words.text[:cut], "stop")
        elif ended:
            self._finish(self._words.finish(), "stop")
        elif self.tokens >= self._limit:
            self._finish(self._words.finish(), "length")
        elif self._stream:
            self._send(self._words.text, len(self._words.text) - self._held())

    def _named(self, token: int, scored: Scored) -> TokenLogprob:
        top = [(self._words.name(other), logprob) for other, logprob in scored.top]
        return TokenLogprob(self._words.name(token), scored.chosen, len(self._words.text), top)

    def _stopped(self, known: int) -> int | None:
        """Where the first stop text begins, or None. It ends in text that was not known before."""
        text = self._words.text
        found = [text.find(stop, max(0, known - len(stop) + 1)) for stop in self._stops]
        return min((at for at in found if at >= 0), default=None)

    def _held(self) -> int:
        """How many last characters could be the beginning of a stop text."""
        text = self._words.text
        return max((_overlap(text, stop) for stop in self._stops), default=0)

    def _finish(self, text: str, reason: FinishReason) -> None:
        self.text = text
        if self._stream:
            self._send(text, len(text), last=True)
        finished, tell = Finished(self._choice, text, reason, self.tokens, self._logprobs), self._tell
        self._end()
        tell(finished)

    def _end(self) -> None:
        """Take and tell no more. Who is told holds this writer: a circle, which is opened so that both are freed."""
        self.done = True
        self._tell, self._gone = _nothing, _nobody

    def _send(self, text: str, until: int, last: bool = False) -> None:
        """Tell about text up to ``until``, with the log-probabilities of the tokens that begin in it."""
        piece = text[self._sent : until]
        if not piece and not last:
            return
        due = [e for e in self._logprobs[self._sent_logprobs :] if last or e.offset < until]
        if piece or due:
            self._tell(Piece(self._choice, piece, due))
        self._sent, self._sent_logprobs = max(until, self._sent), self._sent_logprobs + len(due)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with, all of ``stop`` excepted."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
