"""The answers to one request while they are written, in a batch with those to others."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from c2c.serving.batch import ends_of
from c2c.serving.events import Done, Event, Finished, Started
from c2c.serving.reading import Batch, Prompted, ask_of
from c2c.serving.writer import Writer


class Answers:
    """Makes the writers of a request, and tells when all of them are done.

    Args:
        prompted: the request, its prompt read.
        batch: what it is part of.
        default_tokens: new tokens at most where the request does not say.
        rows: answers in the batch.
    """

    def __init__(self, prompted: Prompted, batch: Batch, default_tokens: int, rows: int) -> None:
        ask = ask_of(prompted.job)
        self._prompted, self._ticket, self._rows = prompted, prompted.job.ticket, rows
        self._left = ask.n
        self._began = time.monotonic()
        limit = ask.sampling.max_tokens or min(default_tokens, prompted.room or default_tokens)
        ends = ends_of(batch.model)
        self.writers = [
            Writer(
                batch.model.tokenizer,
                replace(ask.sampling, max_tokens=limit),
                choice=choice,
                ends=ends,
                stream=ask.stream,
                tell=self._tell,
                gone=self._ticket.gone,
            )
            for choice in range(ask.n)
        ]
        self._ticket.push(Started(prompted.fallback))

    def _tell(self, event: Event) -> None:
        self._ticket.push(event)
        if isinstance(event, Finished):
            self._left -= 1
            if self._left == 0:
                self._ticket.push(self._done())

    def _done(self) -> Done:
        prompted = self._prompted
        first = min(writer.first for writer in self.writers if writer.first is not None)
        return Done(
            prompt_tokens=prompted.prompt_tokens,
            completion_tokens=sum(writer.tokens for writer in self.writers),
            first_token=first,
            rows=self._rows,
            crossed=prompted.crossed,
            report=self._report(first),
            message=prompted.message,
            fallback=prompted.fallback,
        )

    def _report(self, first: float) -> dict[str, Any] | None:
        """The fusion report; its seconds are those of the whole batch, up to where this request is done."""
        if self._prompted.report is None:
            return None
        data = self._prompted.report.to_dict()
        stages = {"first_token": first - self._began, "decode": time.monotonic() - first}
        return data | {"seconds": data["seconds"] | stages}
