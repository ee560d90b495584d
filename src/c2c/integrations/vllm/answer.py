"""One request while a vLLM engine answers it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

from c2c import kv_cache
from c2c.integrations.vllm.errors import EngineError
from c2c.integrations.vllm.hosted import Hosted, row_of
from c2c.integrations.vllm.plan import Wish
from c2c.integrations.vllm.settings import ToldSampler, vllm_settings
from c2c.integrations.vllm.store import SnapshotStore, new_name
from c2c.serving.answers import Answers
from c2c.serving.reading import Batch, ask_of
from c2c.serving.sampling import Sampling
from c2c.serving.writer import Writer


class Answering:
    """Answers one request, from its prompt or from a fused cache. Nothing is told before a load is proven.

    Args:
        batch: the request, its prompt read.
        store: where fused caches go.
        default_tokens: new tokens at most where the request does not say.
        running: how many answers are written at this time.

    Attributes:
        begun: whether anything was told.
    """

    def __init__(self, batch: Batch, store: SnapshotStore, default_tokens: int, running: Callable[[], int]) -> None:
        self._batch, self._store, self._default, self._running = batch, store, default_tokens, running
        self._answers: Answers | None = None

    @property
    def begun(self) -> bool:
        """Whether anything was told."""
        return self._answers is not None

    async def run(self) -> None:
        """Write all answers.

        Raises:
            LoadError: the engine did not take the fused cache. SnapshotError: no room for it. EngineError: it broke.
        """
        tokens, cache = self._batch.prefilled.tokens, self._batch.prefilled.cache
        ids, name = row_of(tokens), None
        model = self._batch.model
        if not isinstance(model, Hosted):
            raise TypeError("this model is in no engine")
        try:
            if cache.layers and kv_cache.length(cache):
                name = new_name()
                await asyncio.to_thread(self._store.put, name, model.snapshot(ids, cache))
            choices = range(ask_of(self._batch.prompted[0].job).n)
            async with asyncio.TaskGroup() as group:
                for choice in choices:
                    group.create_task(self._write(model, ids, choice, name))
        except* Exception as failures:
            raise _first(failures) from failures
        finally:
            if name is not None:  # not before: a pre-empted request loads it again
                self._store.delete(name)

    async def _write(self, model: Hosted, ids: list[int], choice: int, name: str | None) -> None:
        wish = None if name is None else Wish(load=name, receipt=new_name())
        try:
            await write(model, ids, lambda: self._writer(choice), self._sampling(), choice, wish)
        finally:
            if wish is not None and wish.receipt is not None:
                self._store.delete(wish.receipt)

    def _sampling(self) -> Sampling:
        prompted = self._batch.prompted[0]
        sampling = ask_of(prompted.job).sampling
        limit = sampling.max_tokens or min(self._default, prompted.room or self._default)
        return replace(sampling, max_tokens=limit)

    def _writer(self, choice: int) -> Writer:
        """The writer of an answer; the first one says that the request has begun."""
        if self._answers is None:
            self._answers = Answers(self._batch.prompted[0], self._batch, self._default, self._running())
        return self._answers.writers[choice]


async def write(
    model: Hosted,
    ids: list[int],
    writer: Callable[[], Writer],
    sampling: Sampling,
    choice: int = 0,
    wish: Wish | None = None,
) -> None:
    """Let an engine write one answer, on its loop.

    Args:
        model: who answers.
        ids: the prompt.
        writer: called at the first token; takes the tokens.
        sampling: how; ``max_tokens`` must be set.
        choice: which answer of its request it is.
        wish: what is to be loaded.
    """
    settings = vllm_settings(model, sampling, sampling.max_tokens or 1, choice)
    told = ToldSampler(sampling, choice)
    async with aclosing(model.host.stream(ids, settings, wish)) as steps:
        async for step in steps:
            if not step.tokens:
                continue
            taker = writer()
            taker.sampler = told
            for at, token in enumerate(step.tokens):
                told.scored = step.scored[at] if step.scored else None
                taker.take(token)
                if taker.done:
                    return
    raise EngineError("vLLM ended an answer before it was whole.")


def _first(failures: BaseExceptionGroup) -> BaseException:
    """The first failure of a group; the others are of the same cause."""
    found: BaseException = failures
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
