"""What a server takes from a client, and how often."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one server.

    Attributes:
        tokens: most tokens of one request, padding and drafts included.
        body_bytes: longest request.
        requests_per_minute: per token, or per address where no token is asked for; 0 for no limit.
        seconds: longest time that a request may take, transfer included.
        waiting: most requests under way; the model reads for one at a time.
    """

    tokens: int = 8192
    body_bytes: int = 1 << 20
    requests_per_minute: int = 60
    seconds: float = 120.0
    waiting: int = 8


class RateLimiter:
    """Counts requests over the last minute.

    Args:
        per_minute: most of one caller; 0 for no limit.
        clock: seconds that only grow.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._times: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def wait(self, caller: str) -> int | None:
        """Count a request, or say in how many whole seconds one would be taken."""
        if self._per_minute <= 0:
            return None
        now = self._clock()
        with self._lock:
            self._forget(now)
            times = self._times.setdefault(caller, deque())
            if len(times) >= self._per_minute:
                return max(1, math.ceil(times[0] + 60 - now))
            times.append(now)
        return None

    def _forget(self, now: float) -> None:
        for caller in list(self._times):
            times = self._times[caller]
            while times and times[0] <= now - 60:
                times.popleft()
            if not times:
                del self._times[caller]
