"""Answers as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from c2c.serving.errors import ApiError, client_gone
from c2c.serving.events import Done, Event, Finished, Piece, Started
from c2c.serving.responses import Data, Shape, about, usage
from c2c.serving.ticket import Ticket
from c2c.serving.trace import Trace

_LAST = b"data: [DONE]\n\n"


@dataclass
class Stream:
    """The answers to one HTTP request, as they are written.

    With several prompts, the answers to the second begin when those to the first have ended.

    Attributes:
        tickets: one per prompt.
        n: answers per prompt.
        shape: how chunks look.
        seconds: how long the request may take.
        include_usage: whether a last chunk tells the tokens.
        report: whether a last chunk says more under ``c2c``.
        trace: notes how it ends.
    """

    tickets: Sequence[Ticket]
    n: int
    shape: Shape
    seconds: float
    include_usage: bool
    report: bool
    trace: Trace

    async def chunks(self) -> AsyncIterator[bytes]:
        """The response, up to ``[DONE]`` or an error.

        Raises:
            ApiError: something went wrong before the first chunk, so that it can still become the response's status.
        """
        begun = False
        done: list[Done] = []
        try:
            for place, ticket in enumerate(self.tickets):
                async for event in ticket.events(self.seconds):
                    if isinstance(event, Done):
                        done.append(event)
                    for chunk in self._chunks(event, place * self.n):
                        yield self._event(chunk)
                        begun = True
                    if isinstance(event, Started) and not begun:
                        yield b": reading is done\n\n"
                        begun = True
        except ApiError as error:
            if not begun:
                raise
            self.trace.status, self.trace.code = error.status, error.code
            yield _event(error.to_dict())
            return
        self.trace.note(self.tickets, done)
        for last in self._last(done):
            yield last
        yield _LAST

    def _chunks(self, event: Event, first: int) -> list[Data]:
        if isinstance(event, Started):
            return self._openings(event, range(first, first + self.n))
        if isinstance(event, Piece):
            return [self.shape.piece(first + event.choice, event)]
        if isinstance(event, Finished):
            return [self.shape.ending(first + event.choice, event)]
        return []

    def _openings(self, started: Started, indices: range) -> list[Data]:
        """How answers begin: with the word that a sharer was lost, where it was, so that nobody reads on unaware."""
        if started.fallback is None:
            openings = [self.shape.opening(index) for index in indices]
            return [opening for opening in openings if opening is not None]
        told = {"c2c": {"way": self.trace.way, "fallback": started.fallback}}
        return [(self.shape.opening(index) or self.shape.piece(index, Piece(0, ""))) | told for index in indices]

    def _event(self, chunk: Data) -> bytes:
        return _event(chunk | {"usage": None} if self.include_usage else chunk)

    def _last(self, done: Sequence[Done]) -> list[bytes]:
        if not self.include_usage and not self.report:
            return []
        chunk = self.shape.closing()
        if self.include_usage:
            chunk["usage"] = usage(done)
        return [_event(chunk | about(self.trace.way, done, self.report))]


class EventStream(StreamingResponse):
    """Sends a stream; the requests behind it are given up when the client goes.

    Args:
        first: the first chunk, which is there already.
        rest: the others.
        stream: what they belong to.
    """

    def __init__(self, first: bytes, rest: AsyncIterator[bytes], stream: Stream) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield first
            async for chunk in rest:
                yield chunk

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks(), media_type="text/event-stream", headers=headers)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            left = [ticket for ticket in self._stream.tickets if not ticket.ended]
            for ticket in left:
                ticket.cancel()
            if left and self._stream.trace.code is None:
                self._stream.trace.status, self._stream.trace.code = 499, client_gone().code


def _event(data: Data) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
