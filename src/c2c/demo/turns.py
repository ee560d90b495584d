"""Whose turn it is: the models answer one run at a time, and a new run of a visitor ends that visitor's last one."""

from __future__ import annotations

from threading import Lock

_POLL = 0.25  # seconds between two looks at whether a run that waits is still wanted


class Turn:
    """One run of a visitor.

    Attributes:
        stopped: whether the visitor stopped it and began no other.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.replaced = False

    @property
    def over(self) -> bool:
        """Whether it should end."""
        return self.stopped or self.replaced


class Turns:
    """Runs of all visitors."""

    def __init__(self) -> None:
        self._latest: dict[str, Turn] = {}
        self._guard, self._models = Lock(), Lock()

    def begin(self, visitor: str) -> Turn:
        """A new run; the visitor's last one is over."""
        with self._guard:
            if visitor in self._latest:
                self._latest[visitor].replaced = True
            turn = self._latest[visitor] = Turn()
        return turn

    def stop(self, visitor: str) -> None:
        """End the visitor's run, if there is one."""
        with self._guard:
            if visitor in self._latest:
                self._latest[visitor].stopped = True

    def forget(self, visitor: str) -> None:
        """The visitor has left."""
        self.stop(visitor)
        with self._guard:
            self._latest.pop(visitor, None)

    def take_models(self, turn: Turn) -> bool:
        """Wait for the models; False where the run is over before they are free."""
        while not turn.over:
            if self._models.acquire(timeout=_POLL):
                return True
        return False

    def give_models_back(self) -> None:
        """Let the next run have them."""
        self._models.release()
