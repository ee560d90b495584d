"""The engine that runs models with ``transformers``, in this process: one thread, one batch at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Thread

import torch

from c2c.generation import DEFAULT_NEW_TOKENS
from c2c.model import C2CModel
from c2c.serving.answers import Answers
from c2c.serving.batch import write
from c2c.serving.engine import Ask, AskToRead, Description, SharerState, Way
from c2c.serving.errors import internal, invalid
from c2c.serving.logs import log_failure
from c2c.serving.queue import Job, JobQueue
from c2c.serving.readings import Readings
from c2c.serving.served import describe, sharer_states
from c2c.serving.ticket import Ticket
from c2c.serving.ways import Ways


class HuggingFaceEngine:
    """Answers with a :class:`~c2c.model.C2CModel`. An :class:`~c2c.serving.engine.Engine`.

    Requests of the same way that arrive within the window are read and decoded as one batch, each row with settings of
    its own. A batch runs until its last answer is done; what arrives meanwhile waits.

    Args:
        model: receiver, sharers and fusers, all with tokenizers.
        max_queue: requests that may wait.
        max_batch: answers per batch.
        window: seconds that a request waits for others to go with it.
        max_tokens: new tokens at most, for requests that do not say.
        message_tokens: the same for the sharer's text, in text-to-text.
    """

    def __init__(
        self,
        model: C2CModel,
        *,
        max_queue: int = 64,
        max_batch: int = 16,
        window: float = 0.01,
        max_tokens: int = DEFAULT_NEW_TOKENS,
        message_tokens: int = 128,
    ) -> None:
        self._model, self._ways, self._readings = model, Ways(model, message_tokens), Readings(model)
        self._max_batch, self._max_tokens = max_batch, max_tokens
        self._queue = JobQueue(max_queue, max_batch, window)
        self._thread = Thread(target=self._work, name="c2c-engine", daemon=True)
        self.on_batch: Callable[[Way, int], object] = lambda way, rows: None

    @property
    def description(self) -> Description:
        """What it serves."""
        return describe(self._model, self._ways.known)

    @property
    def sharers(self) -> tuple[SharerState, ...]:
        """Whether the sharers can be asked."""
        return sharer_states(self._model)

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, ask: Ask | AskToRead) -> Ticket:
        """Accept a request; see :class:`~c2c.serving.engine.Engine`."""
        self._check(ask)
        ticket = Ticket()
        job = Job(ask, ticket)
        ticket.on_cancel(lambda: self._queue.remove(job))
        self._queue.put(job)
        return ticket

    def close(self) -> None:
        """Finish what was accepted, and stop."""
        self._queue.close()
        if self._thread.is_alive():
            self._thread.join()

    def _check(self, ask: Ask | AskToRead) -> None:
        if isinstance(ask, AskToRead):
            self._readings.check(ask)
            return
        if not 1 <= ask.n <= self._max_batch:
            raise invalid(f"n is {ask.n}; this server writes 1 to {self._max_batch} answers at once.", "n")
        self._ways.check(ask)

    # -- the worker ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _work(self) -> None:
        while self._next():  # a loop here would hold the last batch, handoffs included, while it waits for another
            pass

    def _next(self) -> bool:
        """Wait for a batch and answer it; False if there will be none."""
        jobs = self._queue.take()
        began = time.monotonic()
        try:
            if jobs:
                self._run(jobs)
        except Exception as error:
            log_failure("batch_failed", error)
            for job in jobs:
                job.ticket.fail(internal())
        self._queue.took(time.monotonic() - began)
        return bool(jobs)

    def _run(self, jobs: list[Job]) -> None:
        if isinstance(jobs[0].ask, AskToRead):
            self._readings.read(jobs[0], jobs[0].ask)
            return
        way = jobs[0].way
        batch = self._ways.read(way, jobs)
        if batch is None:
            return
        counts = [prompted.job.rows for prompted in batch.prompted]
        self.on_batch(way, sum(counts))
        answers = [Answers(prompted, batch, self._max_tokens, sum(counts)) for prompted in batch.prompted]
        write(batch.model, batch.prefilled.spread(counts), [writer for one in answers for writer in one.writers])
