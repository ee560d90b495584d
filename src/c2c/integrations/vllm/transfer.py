"""The worker half of the connector: entries from snapshots into the paged cache, and back."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from c2c.integrations.vllm.errors import SnapshotError, UnsupportedError
from c2c.integrations.vllm.plan import Load, Save
from c2c.integrations.vllm.snapshot import Snapshot
from c2c.integrations.vllm.store import SnapshotStore
from c2c.integrations.vllm.views import KVView, self_test, view_of

_LOG = logging.getLogger("c2c.vllm")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class Transfers:
    """Moves entries. What goes wrong with one request is noted for that one, and nothing is raised in a step.

    Args:
        store: where snapshots lie.
        model: key of the model whose cache it is.
    """

    def __init__(self, store: SnapshotStore, model: str) -> None:
        self._store, self._model = store, model
        self._views: list[KVView] = []
        self._failed: set[int] = set()

    def register(self, caches: Mapping[str, Any], layers: Mapping[str, Any], groups: Sequence[Any]) -> None:
        """Take the caches of all layers, and test that they are understood.

        Args:
            caches: cache by layer name.
            layers: attention layer by name.
            groups: the groups of vLLM's cache manager.

        Raises:
            UnsupportedError: they are not.
        """
        if len(groups) != 1:
            raise UnsupportedError(
                f"this model has {len(groups)} kinds of KV cache (sliding windows, or layers without a cache per "
                "token); c2c was tested with one. Use c2c serve without --engine vllm for this model."
            )
        names = _in_order(caches)
        self._views = [view_of(name, layers[name], caches[name], groups[0].kv_cache_spec) for name in names]
        for name, view in zip(names, self._views, strict=True):
            self_test(name, view)

    def load(self, loads: Sequence[Load]) -> None:
        """Put snapshots into the cache, and leave receipts."""
        for load in loads:
            try:
                self._load(load)
                if load.receipt is not None:
                    self._store.acknowledge(load.receipt)
            except Exception as error:
                _note("a snapshot could not be loaded", error)
                self._failed |= load.place.touched(self._views[0].block_size)

    def save(self, saves: Sequence[Save]) -> None:
        """Make snapshots of the cache."""
        for save in saves:
            try:
                self._store.put(save.name, self._taken(save))
            except Exception as error:
                _note("a snapshot could not be saved", error)
                self._store.fail(save.name, str(error) if isinstance(error, SnapshotError) else "it was not saved.")

    def take_failed(self) -> set[int]:
        """Blocks whose load has failed since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def _load(self, load: Load) -> None:
        if load.refusal is not None:
            raise SnapshotError(load.refusal)
        snapshot = self._store.get(load.name)
        snapshot.facts.check(self._model, load.ids)
        view, (layers, heads, _, dim) = self._views[0], snapshot.keys.shape
        if (layers, heads, dim) != (len(self._views), view.heads, view.dim):
            raise SnapshotError(
                f"the snapshot has {layers} layers, {heads} heads and {dim} channels; the cache {len(self._views)}, "
                f"{view.heads} and {view.dim}."
            )
        slots, wanted = torch.tensor(load.place.slots(view.block_size)), slice(load.place.start, load.place.stop)
        for layer, keys, values in zip(self._views, snapshot.keys, snapshot.values, strict=True):
            layer.write(slots, keys[:, wanted].transpose(0, 1), values[:, wanted].transpose(0, 1))

    def _taken(self, save: Save) -> Snapshot:
        slots = torch.tensor(save.place.slots(self._views[0].block_size))
        read = [view.read(slots) for view in self._views]
        keys, values = (torch.stack([pair[side].transpose(0, 1) for pair in read]) for side in (0, 1))
        return Snapshot.of(keys, values, save.ids, self._model)


def _in_order(names: Mapping[str, Any]) -> list[str]:
    """Layer names by their numbers, which are those of the layers of ``transformers``."""
    found = {}
    for name in names:
        match = _LAYER.search(name)
        if match is None or int(match[1]) in found:
            raise UnsupportedError(f"the cache layer {name!r} has no number of its own; expected '...layers.N....'.")
        found[int(match[1])] = name
    if sorted(found) != list(range(len(found))):
        raise UnsupportedError(f"the cache has the layers {sorted(found)}; expected all from 0 on.")
    return [found[number] for number in sorted(found)]


def _note(what: str, error: Exception) -> None:
    """Log without quoting anything of a prompt."""
    said = str(error) if isinstance(error, SnapshotError) else type(error).__name__
    _LOG.warning("%s: %s", what, said)
