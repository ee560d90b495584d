"""How many answers are written at a time; who comes later waits, first come first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Places:
    """Places for answers. For one event loop.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def taken(self) -> int:
        """Places that are in use."""
        return self._count - self._free

    @asynccontextmanager
    async def take(self, rows: int) -> AsyncIterator[None]:
        """Wait for so many places, and give them back in the end."""
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((rows, turn))
        self._serve()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._free += rows
            else:
                self._queue = deque(entry for entry in self._queue if entry[1] is not turn)
            self._serve()

    def _serve(self) -> None:
        while self._queue and (self._queue[0][0] <= self._free or self._queue[0][1].cancelled()):
            rows, turn = self._queue.popleft()
            if not turn.cancelled():
                self._free -= rows
                turn.set_result(None)
