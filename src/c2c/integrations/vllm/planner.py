"""The scheduler half of the connector: which request loads or saves what, and when."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from c2c.integrations.vllm.errors import SnapshotError
from c2c.integrations.vllm.plan import FIELD, Load, Place, Plan, Save, Wish
from c2c.integrations.vllm.store import SnapshotStore

_NOWHERE = "0" * 32  # the name of a snapshot that is not looked for


@dataclass
class _Followed:
    """A request with its wish, and what became of it."""

    request: Any
    wish: Wish
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


class Planner:
    """Follows the requests that have a wish.

    A request that may not be served as it asks is made to fail: it is given a load that the worker half refuses, which
    ends it with an error. Where vLLM leaves no way to do that, its report says that nothing was loaded.

    Args:
        store: where snapshots lie.
        model: key of the model whose entries may be loaded.
        wait: seconds that a request waits for its snapshot.
    """

    def __init__(self, store: SnapshotStore, model: str, wait: float) -> None:
        self._store, self._model, self._wait = store, model, wait
        self._followed: dict[str, _Followed] = {}
        self._due: list[_Followed] = []

    def arrived(self, request: Any) -> None:
        """A new request; nothing may be raised here, since that would end the engine."""
        try:
            wish, refusal = Wish.of_params(request.kv_transfer_params), None
        except SnapshotError as error:
            wish, refusal = Wish(load=_NOWHERE), str(error)
        if wish == Wish():
            return
        followed = _Followed(request, wish, time.monotonic(), refusal)
        self._followed[request.request_id] = followed
        if wish.load is not None and refusal is None:
            followed.refusal = _refused(request)
        if followed.refusal is not None:
            # with it vLLM drops the load that is to fail, and answers plainly
            request.skip_reading_prefix_cache = False

    def matched(self, request: Any, local: int) -> int | None:
        """How many tokens after the ``local`` first ones a snapshot brings; None to ask again in the next step."""
        followed = self._followed.get(request.request_id)
        if followed is None or followed.wish.load is None:
            return 0
        if followed.refusal is None:
            try:
                facts = self._store.facts(followed.wish.load)
                if facts is not None:
                    facts.check(self._model, followed.prompt)
                    followed.count = facts.count
                    return max(facts.count - local, 0)
                if time.monotonic() - followed.since < self._wait:
                    return None
                followed.refusal = f"the snapshot did not arrive within {self._wait:g} s."
            except SnapshotError as error:
                followed.refusal = str(error)
        followed.count = len(followed.prompt) - 1
        return max(followed.count - local, 0)

    def placed(self, request: Any, blocks: list[int], external: int) -> None:
        """A request got its blocks, and ``external`` of its tokens are to be loaded in this step."""
        followed = self._followed.get(request.request_id)
        if followed is None or followed.wish.load is None or external == 0:
            return
        place = Place(blocks, followed.count - external, followed.count)
        followed.load = Load(followed.wish.load, followed.prompt, place, followed.wish.receipt, followed.refusal)
        followed.loaded = 0 if followed.refusal else followed.count
        self._due.append(followed)

    def plan(self, scheduled: Any) -> Plan:
        """What the worker half does in the step that vLLM has scheduled."""
        due, self._due = self._due, []
        plan = Plan(loads=[followed.load for followed in due if followed.load is not None])
        for name, tokens in scheduled.num_scheduled_tokens.items():
            followed = self._followed.get(name)
            if followed is None or followed.wish.save is None or followed.saved or followed.refusal is not None:
                continue
            length = len(followed.prompt)
            if followed.request.num_computed_tokens + tokens >= length:
                groups = scheduled.kv_connector_block_state.get_block_ids(name)
                plan.saves.append(Save(followed.wish.save, followed.prompt, Place(list(groups[0]), 0, length)))
                followed.saved = True
        return plan

    def failed(self, blocks: Collection[int]) -> None:
        """Loads into these blocks did not succeed."""
        for followed in self._followed.values():
            if followed.load is not None and not set(followed.load.place.blocks).isdisjoint(blocks):
                followed.loaded = 0
                followed.refusal = followed.refusal or "the snapshot could not be loaded; the engine's log says why."

    def report(self, request_id: str) -> dict[str, Any] | None:
        """What became of a request that has ended, for its response."""
        followed = self._followed.pop(request_id, None)
        if followed is None:
            return None
        why = followed.refusal
        if followed.wish.load is not None and not followed.loaded and why is None:
            why = "vLLM did not ask for the load."
        return {FIELD: {"loaded_tokens": followed.loaded, "saved": followed.saved, "why": why}}


def _refused(request: Any) -> str | None:
    """Why a request may not load anything; None if it may."""
    params = request.sampling_params
    if params is not None and params.prompt_logprobs is not None:
        return "prompt_logprobs need the prompt to be read again, and a loaded one is not: leave them out."
    if request.skip_reading_prefix_cache:
        return "skip_reading_prefix_cache would drop the load: leave it out."
    if not request.cache_salt:
        return "a request that loads needs a cache_salt of its own, or its entries would be given to other requests."
    return None
