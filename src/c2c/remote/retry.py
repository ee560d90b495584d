"""When to try again, and how long to wait before: growing pauses with jitter, within one time limit."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

STATUSES = frozenset({429, 502, 503, 504})


class TransientError(Exception):
    """A failure that may not happen again.

    Attributes:
        status: the HTTP status, None where the connection failed.
        retry_after: what the server asks to wait.
    """

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass
class Backoff:
    """Pauses between attempts.

    Attributes:
        retries: attempts after the first.
        base: longest first pause, in seconds; it doubles every time.
        cap: longest pause.
    """

    retries: int = 3
    base: float = 0.25
    cap: float = 8.0
    draw: random.Random = field(default_factory=random.SystemRandom, repr=False)

    def pause(self, failures: int, retry_after: float | None = None) -> float | None:
        """Seconds to wait after so many failures, at least what the server asks for; None to give up."""
        if failures > self.retries:
            return None
        longest = min(self.cap, self.base * 2 ** (failures - 1))
        return max(self.draw.uniform(longest / 2, longest), retry_after or 0.0)
