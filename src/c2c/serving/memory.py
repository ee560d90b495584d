"""Memory that answers have freed, handed back to the system."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from c2c.heap import hand_back

_EVERY = 30.0  # seconds


async def hand_back_now_and_then(ended: Callable[[], int], every: float = _EVERY) -> None:
    """Call :func:`c2c.heap.hand_back` again and again, where something happened since the last time; until cancelled.

    Args:
        ended: how many requests have ended.
        every: seconds from one time to the next.
    """
    known = ended()
    while True:
        await asyncio.sleep(every)
        now = ended()
        if now != known:
            known = now
            await asyncio.to_thread(hand_back)
