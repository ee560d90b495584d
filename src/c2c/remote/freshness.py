"""What keeps a signed request from counting twice: a clock window, and the nonces seen within it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

WINDOW = 60.0


class StaleError(ValueError):
    """A message that is too old, from the future, or was seen before."""


class Freshness:
    """Knows every nonce for as long as a message with it could pass the clock.

    Args:
        window: seconds by which the sender's clock may differ.
        clock: seconds since 1970.
    """

    def __init__(self, window: float = WINDOW, clock: Callable[[], float] = time.time) -> None:
        self._window, self._clock = window, clock
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def check_time(self, sent: float) -> None:
        """Refuse what was sent outside the window.

        Raises:
            StaleError: too old, or too far in the future.
        """
        apart = self._clock() - sent
        if not abs(apart) <= self._window:
            raise StaleError(
                f"it was sent {abs(apart):.0f} seconds {'ago' if apart > 0 else 'in the future'}, and at most "
                f"{self._window:.0f} are allowed. Was it replayed? If not, set the clocks of both machines."
            )

    def check(self, nonce: str, sent: float) -> None:
        """Accept a message once.

        Raises:
            StaleError: outside the window, or seen before.
        """
        self.check_time(sent)
        now = self._clock()
        with self._lock:
            while self._seen and next(iter(self._seen.values())) < now:
                self._seen.popitem(last=False)
            if nonce in self._seen:
                raise StaleError("its nonce was seen before: it is a replay. Send a new request instead.")
            self._seen[nonce] = now + 2 * self._window
