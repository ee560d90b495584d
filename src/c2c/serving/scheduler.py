"""Scheduler of the transformers engine: a bounded queue, taken in batches of requests that can run together."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass
from threading import Condition

from c2c.serving.engine import HandoffRequest, Request, RequestHandle
from c2c.serving.errors import queue_full, shutting_down


@dataclass(frozen=True, eq=False)
class Job:
    """An accepted request with what it takes of a batch."""

    request: Request
    handle: RequestHandle  # where its events go
    key: Hashable = None  # jobs with equal keys can share a batch
    rows: int = 1  # of the batch, one for each answer
    prompt_tokens: int = 0  # KV-cache entries of the prompt, at most
    new_tokens: int = 0  # to generate, at most
    notes: tuple[str, ...] = ()  # on the prompt, for the client


class Scheduler:
    """Hold waiting jobs for one worker, first come first served.

    Args:
        max_queue: jobs that may wait.
        max_rows: rows of a batch at most.
        max_tokens: KV-cache entries of a batch at most: its rows times its longest prompt and longest answer, since
            rows are padded to one length.
        window: seconds that the first job of a batch waits for others.
    """

    def __init__(self, max_queue: int, max_rows: int, max_tokens: int, window: float) -> None:
        self._max_queue, self._max_rows, self._max_tokens, self._window = max_queue, max_rows, max_tokens, window
        self._jobs: list[Job] = []
        self._changed = Condition()
        self._closed = False
        self.last_batch = 1.0  # seconds that the last batch took: the Retry-After of a refusal

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> None:
        """Append a job.

        Raises:
            ApiError: the queue is full, or closed.
        """
        with self._changed:
            if self._closed:
                raise shutting_down()
            if len(self._jobs) >= self._max_queue:
                raise queue_full(len(self._jobs), self.last_batch)
            self._jobs.append(job)
            self._changed.notify_all()

    def remove(self, job: Job) -> None:
        """Remove a job that was cancelled while it waited."""
        with self._changed:
            self._jobs = [other for other in self._jobs if other is not job]
            self._changed.notify_all()

    def close(self) -> None:
        """Accept no more jobs; those that wait are still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self) -> list[Job]:
        """Wait for a batch; empty when the scheduler is closed and nothing is left."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return []
                self._wait_for_others()
                if batch := self._batch():
                    self._jobs = [job for job in self._jobs if job not in batch]
                    return batch

    def _wait_for_others(self) -> None:
        """Wait until the batch is full, or its first job has waited for the window."""
        until = self._jobs[0].handle.created + self._window
        while not self._closed and self._jobs and not self._full():
            left = until - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _full(self) -> bool:
        alone = isinstance(self._jobs[0].request, HandoffRequest)
        return alone or sum(job.rows for job in self._batch()) >= self._max_rows

    def _batch(self) -> list[Job]:
        """Return the first job and those after it that can run with it, in order, as long as there is room."""
        batch = self._jobs[:1]
        for job in self._jobs[1:]:
            if job.key == batch[0].key and self._fits([*batch, job]):
                batch.append(job)
        return batch

    def _fits(self, jobs: list[Job]) -> bool:
        rows = sum(job.rows for job in jobs)
        columns = max(job.prompt_tokens for job in jobs) + max(job.new_tokens for job in jobs)
        return rows <= self._max_rows and rows * columns <= self._max_tokens
