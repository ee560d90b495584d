"""Scheduler half of the connector: which request loads or saves what, and when."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from c2c.integrations.vllm.errors import SnapshotError
from c2c.integrations.vllm.store import SnapshotStore
from c2c.integrations.vllm.transfers import FIELD, Load, Save, Span, StepTransfers, TransferParams

_NO_SNAPSHOT = "0" * 32


@dataclass
class _Tracked:
    """A request with its parameters, and what became of it."""

    request: Any
    params: TransferParams
    since: float
    refusal: str | None = None
    count: int = 0
    load: Load | None = None
    loaded: int = 0
    saved: bool = False

    @property
    def prompt(self) -> list[int]:
        ids: list[int] = list(self.request.prompt_token_ids or ())
        return ids


class TransferScheduler:
    """Track the requests that load or save, and plan their transfers.

    A request that must not be served as requested is made to fail: it gets a load that the worker half refuses, which
    ends it with an error. Where vLLM leaves no way to do that, its report says that nothing was loaded.

    Args:
        store: where snapshots lie.
        model: key of the model whose entries may be loaded.
        wait: seconds that a request waits for its snapshot.
    """

    def __init__(self, store: SnapshotStore, model: str, wait: float) -> None:
        self._store, self._model, self._wait = store, model, wait
        self._tracked: dict[str, _Tracked] = {}
        self._due: list[_Tracked] = []

    def add(self, request: Any) -> None:
        """Add a new request; nothing may be raised here, since that would end the engine."""
        try:
            params, refusal = TransferParams.from_params(request.kv_transfer_params), None
        except SnapshotError as error:
            params, refusal = TransferParams(load=_NO_SNAPSHOT), str(error)
        if params == TransferParams():
            return
        tracked = _Tracked(request, params, time.monotonic(), refusal)
        self._tracked[request.request_id] = tracked
        if params.load is not None and refusal is None:
            tracked.refusal = _refusal(request)
        if tracked.refusal is not None:
            # with it vLLM drops the load that is to fail, and answers plainly
            request.skip_reading_prefix_cache = False

    def match(self, request: Any, local: int) -> int | None:
        """Return how many tokens a snapshot has after the ``local`` first ones; None to be called again next step."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.params.load is None:
            return 0
        if tracked.refusal is None:
            try:
                info = self._store.info(tracked.params.load)
                if info is not None:
                    info.check(self._model, tracked.prompt)
                    tracked.count = info.count
                    return max(info.count - local, 0)
                if time.monotonic() - tracked.since < self._wait:
                    return None
                tracked.refusal = f"the snapshot did not arrive within {self._wait:g} s."
            except SnapshotError as error:
                tracked.refusal = str(error)
        tracked.count = len(tracked.prompt) - 1
        return max(tracked.count - local, 0)

    def allocate(self, request: Any, blocks: list[int], external: int) -> None:
        """Plan the load of ``external`` tokens of a request into its blocks, in this step."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.params.load is None or external == 0:
            return
        span = Span(blocks, tracked.count - external, tracked.count)
        tracked.load = Load(tracked.params.load, tracked.prompt, span, tracked.params.receipt, tracked.refusal)
        tracked.loaded = 0 if tracked.refusal else tracked.count
        self._due.append(tracked)

    def step(self, scheduled: Any) -> StepTransfers:
        """Return the transfers of the step that vLLM has scheduled."""
        due, self._due = self._due, []
        step = StepTransfers(loads=[tracked.load for tracked in due if tracked.load is not None])
        for name, tokens in scheduled.num_scheduled_tokens.items():
            tracked = self._tracked.get(name)
            if tracked is None or tracked.params.save is None or tracked.saved or tracked.refusal is not None:
                continue
            length = len(tracked.prompt)
            if tracked.request.num_computed_tokens + tokens >= length:
                groups = scheduled.kv_connector_block_state.get_block_ids(name)
                step.saves.append(Save(tracked.params.save, tracked.prompt, Span(list(groups[0]), 0, length)))
                tracked.saved = True
        return step

    def fail(self, blocks: Collection[int]) -> None:
        """Record that loads into these blocks did not succeed."""
        for tracked in self._tracked.values():
            if tracked.load is not None and not set(tracked.load.span.blocks).isdisjoint(blocks):
                tracked.loaded = 0
                tracked.refusal = tracked.refusal or "the snapshot could not be loaded; the engine's log says why."

    def report(self, request_id: str) -> dict[str, Any] | None:
        """Remove a request that has ended; return what became of it, for its response."""
        tracked = self._tracked.pop(request_id, None)
        if tracked is None:
            return None
        why = tracked.refusal
        if tracked.params.load is not None and not tracked.loaded and why is None:
            why = "vLLM did not ask for the load."
        return {FIELD: {"loaded_tokens": tracked.loaded, "saved": tracked.saved, "why": why}}


def _refusal(request: Any) -> str | None:
    """Return why a request may not load anything; None if it may."""
    params = request.sampling_params
    if params is not None and params.prompt_logprobs is not None:
        return "prompt_logprobs need the prompt to be read again, and a loaded one is not: leave them out."
    if request.skip_reading_prefix_cache:
        return "skip_reading_prefix_cache would drop the load: leave it out."
    if not request.cache_salt:
        return "a request that loads needs a cache_salt of its own, or its entries would be given to other requests."
    return None
