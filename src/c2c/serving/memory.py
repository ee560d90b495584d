"""Memory that answers have freed, handed back to the system."""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections.abc import Callable

_EVERY = 30.0  # seconds


def hand_back() -> bool:
    """Let the C library return what it keeps of freed memory.

    Caches of all lengths are made and freed around small things that stay. glibc keeps the holes, finds them too small
    for the next cache, and takes more from the system: without this a server grows although it holds no more than
    before.

    Returns:
        Whether anything was handed back; only glibc can be told.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim is not None and bool(trim(0))


async def hand_back_now_and_then(ended: Callable[[], int], every: float = _EVERY) -> None:
    """Call :func:`hand_back` again and again, where something happened since the last time; until it is cancelled.

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
