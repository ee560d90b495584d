"""The connection between a request, which waits on the event loop, and an engine, which works in a thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from c2c.serving.errors import ApiError, client_gone, timed_out
from c2c.serving.events import Done, Event, Failed, Read


class Ticket:
    """One request's place at an engine. Made on the event loop.

    Attributes:
        cancelled: nobody waits for it any more; the engine drops it as soon as it can.
        made: ``time.monotonic()`` when it was accepted.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._on_cancel: Callable[[], object] | None = None
        self._ended = False
        self.cancelled = False
        self.made = time.monotonic()

    @property
    def ended(self) -> bool:
        """Whether it was answered."""
        return self._ended

    # -- the engine's side; any thread ---------------------------------------------------------------------------------

    def push(self, event: Event) -> None:
        """Tell what happened."""
        if self.cancelled or self._loop.is_closed():
            return
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # closed since: nobody waits
            self.cancelled = True

    def fail(self, error: ApiError) -> None:
        """End without an answer."""
        self.push(Failed(error))

    def gone(self) -> bool:
        """Whether nobody waits any more."""
        return self.cancelled

    def on_cancel(self, call: Callable[[], object]) -> None:
        """What the engine wants to do when the request is given up."""
        self._on_cancel = call

    # -- the server's side; the event loop -----------------------------------------------------------------------------

    async def events(self, seconds: float) -> AsyncIterator[Event]:
        """What happens, up to :class:`Done` or :class:`Read`. Leaving early cancels the request.

        Args:
            seconds: how long after its acceptance the request may take.

        Raises:
            ApiError: it failed, or took too long.
        """
        try:
            while not self._ended:
                event = await self._next(seconds)
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Done | Read):
                    self._end()
                yield event
        finally:
            if not self._ended:
                self.cancel()

    async def _next(self, seconds: float) -> Event:
        left = self.made + seconds - time.monotonic()
        try:
            async with asyncio.timeout(max(left, 0)):
                return await self._events.get()
        except TimeoutError:
            raise timed_out(seconds) from None

    def cancel(self) -> None:
        """Give the request up; whoever waits for it gets an error."""
        if self._ended or self.cancelled:
            return
        self.cancelled = True
        call, self._on_cancel = self._on_cancel, None
        if call is not None:
            call()
        self._events.put_nowait(Failed(client_gone()))

    def _end(self) -> None:
        """Nothing can be cancelled any more. What would do it knows the request, which knows this ticket: a circle."""
        self._ended, self._on_cancel = True, None
