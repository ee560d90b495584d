"""How a sharer on another machine stands with whoever asks it: whether it answers, and when it may be asked again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from c2c.errors import RemoteError, SharerChanged

_COSTLY = frozenset({"unreachable", "timeout", "busy", "rate"})  # found out only after attempts or a long wait


@dataclass(frozen=True)
class Loss:
    """Why a sharer did not answer.

    Attributes:
        code: the reason in one word; ``mismatch`` where another model is served.
        message: the reason in full.
        status: the HTTP status, None where there was no answer.
        since: seconds since 1970.
    """

    code: str
    message: str
    status: int | None
    since: float


class Standing:
    """What became of the last call. A sharer that costs time to be found lost is left in peace for a while.

    Args:
        rest: seconds at least in which it is not asked after such a loss, and at least as long as the lost call took,
            so that no more than half of the time is spent on waiting for it. 0 always asks.
        clock: seconds that only grow.

    Attributes:
        lost: why the last call was not answered; None if it was.
    """

    def __init__(self, rest: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.lost: Loss | None = None
        self._rest, self._clock, self._until = rest, clock, 0.0

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call.

        Raises:
            RemoteError: it is not made, since the last one was lost a short while ago.
        """
        self._check_rest()
        began = self._clock()
        try:
            yield
        except RemoteError as error:
            if error.about_request:
                self.lost = None
            else:
                self._lose(Loss(error.code, str(error), error.status, time.time()), began)
            raise
        except SharerChanged as error:
            self._lose(Loss("mismatch", str(error), None, time.time()), began)
            raise
        self.lost = None

    def _check_rest(self) -> None:
        lost, left = self.lost, self._until - self._clock()
        if lost is not None and left > 0:
            raise RemoteError(f"{lost.message} It will be asked again in {left:.0f} s.", lost.code, lost.status)

    def _lose(self, loss: Loss, began: float) -> None:
        self.lost, now = loss, self._clock()
        if self._rest and loss.code in _COSTLY:
            self._until = now + max(self._rest, now - began)
