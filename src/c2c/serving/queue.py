"""The requests that wait: bounded, first come first served, taken in batches of those that can run together."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable
from dataclasses import dataclass
from threading import Condition

from c2c.serving.engine import Ask, AskToRead, Way
from c2c.serving.errors import queue_full, shutting_down
from c2c.serving.ticket import Ticket

_LONGEST_RETRY = 60


@dataclass(frozen=True, eq=False)
class Job:
    """A request and its ticket."""

    ask: Ask | AskToRead
    ticket: Ticket

    @property
    def rows(self) -> int:
        """How many rows of a batch it takes."""
        return self.ask.n if isinstance(self.ask, Ask) else 1

    @property
    def key(self) -> Hashable:
        """Jobs with equal keys can run together; a reading runs alone."""
        if isinstance(self.ask, AskToRead):
            return id(self)
        return self.ask.way, isinstance(self.ask.prompt, str)

    @property
    def way(self) -> Way:
        """Who answers."""
        return self.ask.way if isinstance(self.ask, Ask) else Way.SHARER


class JobQueue:
    """Waiting jobs, for one worker.

    Args:
        limit: how many may wait.
        rows: how many rows a batch may have.
        window: seconds that the first job of a batch waits for others.
    """

    def __init__(self, limit: int, rows: int, window: float) -> None:
        self._limit, self._rows, self._window = limit, rows, window
        self._jobs: list[Job] = []
        self._changed = Condition()
        self._closed = False
        self._last_batch = 1.0  # seconds

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> None:
        """Add a job at the end.

        Raises:
            ApiError: full, or closed.
        """
        with self._changed:
            if self._closed:
                raise shutting_down()
            if len(self._jobs) >= self._limit:
                raise queue_full(len(self._jobs), min(max(math.ceil(self._last_batch), 1), _LONGEST_RETRY))
            self._jobs.append(job)
            self._changed.notify_all()

    def remove(self, job: Job) -> None:
        """Take a job out that nobody waits for any more."""
        with self._changed:
            self._jobs = [other for other in self._jobs if other is not job]
            self._changed.notify_all()

    def took(self, seconds: float) -> None:
        """Note how long a batch took, which is what the next one is told to wait."""
        self._last_batch = seconds

    def close(self) -> None:
        """Take no more jobs; those that are there are still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self) -> list[Job]:
        """Wait for a job, and for others to go with it; empty when the queue is closed and nothing is left."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return []
                self._wait_for_company()
                batch = self._together()
                if batch:
                    taken = set(map(id, batch))
                    self._jobs = [job for job in self._jobs if id(job) not in taken]
                    return batch

    def _wait_for_company(self) -> None:
        """Until the batch is full, or its first job has waited for the window."""
        until = self._jobs[0].ticket.made + self._window
        while not self._closed and self._jobs and not self._full():
            left = until - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _full(self) -> bool:
        return isinstance(self._jobs[0].ask, AskToRead) or sum(job.rows for job in self._together()) >= self._rows

    def _together(self) -> list[Job]:
        """The first job, and those after it that can run with it, in order, as long as there is room."""
        batch: list[Job] = []
        rows = 0
        for job in self._jobs:
            if job.key == self._jobs[0].key and rows + job.rows <= self._rows:
                batch.append(job)
                rows += job.rows
        return batch
