"""Scheduler half of the connector: which request loads or saves what, and when."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from c2c.integrations.vllm.errors import SnapshotError
from c2c.integrations.vllm.snapshot import SnapshotStore, check_name

FIELD = "c2c"  # ours, in the parameters that vLLM hands through to connectors
_KEYS = {"load", "save", "receipt"}
_NO_SNAPSHOT = "0" * 32


@dataclass(frozen=True)
class TransferParams:
    """Parameters of one request for the connector.

    Attributes:
        load: snapshot from which it begins.
        save: snapshot that its prompt's entries become.
        receipt: file that the worker writes when the load is done.
    """

    load: str | None = None
    save: str | None = None
    receipt: str | None = None

    def to_params(self) -> dict[str, Any]:
        """Return them as ``kv_transfer_params`` of a request."""
        return {FIELD: {key: value for key, value in vars(self).items() if value is not None}}

    @classmethod
    def from_params(cls, params: Any) -> TransferParams:
        """Read ``kv_transfer_params``, which a client may have written. Empty where they are not for us.

        Raises:
            SnapshotError: something else than names.
        """
        given = params.get(FIELD) if isinstance(params, dict) else None
        if given is None:
            return cls()
        if not isinstance(given, dict) or not set(given) <= _KEYS:
            raise SnapshotError(f"kv_transfer_params.{FIELD} takes {', '.join(sorted(_KEYS))} and nothing else.")
        return cls(**{key: check_name(value) for key, value in given.items()})


@dataclass(frozen=True)
class Transfer:
    """A copy between a snapshot and a range of a prompt's tokens in the paged cache.

    Attributes:
        name: of the snapshot.
        ids: the prompt.
        blocks: block table of the request.
        start: first position.
        stop: position after the last.
        receipt: file to write when a load is done.
        refusal: why a load must not be done; the request then fails as a damaged snapshot makes it fail.
    """

    name: str
    ids: Sequence[int]
    blocks: Sequence[int]
    start: int
    stop: int
    receipt: str | None = None
    refusal: str | None = None

    def slots(self, block_size: int) -> list[int]:
        """Return the slots of these positions."""
        return [self.blocks[at // block_size] * block_size + at % block_size for at in range(self.start, self.stop)]

    def block_ids(self, block_size: int) -> set[int]:
        """Return the blocks that hold these positions."""
        return {self.blocks[at // block_size] for at in range(self.start, self.stop)}


@dataclass
class _Tracked:
    """A request with its parameters, and what became of it."""

    request: Any
    params: TransferParams
    since: float
    refusal: str | None = None
    count: int = 0
    load: Transfer | None = None
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
        self._due: list[Transfer] = []

    def add(self, request: Any) -> None:
        """Add a new request; nothing may be raised here, since that would end the engine."""
        try:
            params, refusal = TransferParams.from_params(request.kv_transfer_params), None
        except SnapshotError as error:
            params, refusal = TransferParams(load=_NO_SNAPSHOT), str(error)
        if params == TransferParams():
            return
        if params.load is not None and refusal is None:
            refusal = _refusal(request)
        self._tracked[request.request_id] = _Tracked(request, params, time.monotonic(), refusal)
        if refusal is not None:
            # with it vLLM drops the load that is to fail, and answers plainly
            request.skip_reading_prefix_cache = False

    def match(self, request: Any, local: int) -> int | None:
        """Return how many tokens a snapshot has after the ``local`` first ones; None to be called again next step."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.params.load is None:
            return 0
        tracked.count = len(tracked.prompt) - 1  # of a load that fails
        if tracked.refusal is None:
            try:
                info = self._store.info(tracked.params.load)
                if info is not None:
                    info.check(self._model, tracked.prompt)
                    tracked.count = info.count
                elif time.monotonic() - tracked.since < self._wait:
                    return None
                else:
                    tracked.refusal = f"the snapshot did not arrive within {self._wait:g} s."
            except SnapshotError as error:
                tracked.refusal = str(error)
        return max(tracked.count - local, 0)

    def allocate(self, request: Any, blocks: list[int], external: int) -> None:
        """Plan the load of ``external`` tokens of a request into its blocks, in this step."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.params.load is None or external == 0:
            return
        params, stop = tracked.params, tracked.count
        tracked.load = Transfer(
            tracked.params.load, tracked.prompt, blocks, stop - external, stop, params.receipt, tracked.refusal
        )
        tracked.loaded = 0 if tracked.refusal else stop
        self._due.append(tracked.load)

    def step(self, scheduled: Any) -> tuple[list[Transfer], list[Transfer]]:
        """Return the loads and the saves of the step that vLLM has scheduled."""
        loads, self._due = self._due, []
        saves = []
        for name, tokens in scheduled.num_scheduled_tokens.items():
            tracked = self._tracked.get(name)
            if tracked is None or tracked.params.save is None or tracked.saved or tracked.refusal is not None:
                continue
            length = len(tracked.prompt)
            if tracked.request.num_computed_tokens + tokens >= length:
                groups = scheduled.kv_connector_block_state.get_block_ids(name)
                saves.append(Transfer(tracked.params.save, tracked.prompt, list(groups[0]), 0, length))
                tracked.saved = True
        return loads, saves

    def fail(self, blocks: Collection[int]) -> None:
        """Record that loads into these blocks did not succeed."""
        for tracked in self._tracked.values():
            if tracked.load is not None and not set(tracked.load.blocks).isdisjoint(blocks):
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
