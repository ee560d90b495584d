"""Worker half of the connector: entries from snapshots into the paged cache, and back."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from c2c.integrations.vllm.errors import SnapshotError, UnsupportedError
from c2c.integrations.vllm.kv_layout import KVLayout, layout_of, self_test
from c2c.integrations.vllm.snapshot import Snapshot
from c2c.integrations.vllm.store import SnapshotStore
from c2c.integrations.vllm.transfers import Load, Save

_LOG = logging.getLogger("c2c.vllm")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class TransferWorker:
    """Copy entries. What goes wrong with one request is recorded for that one, and nothing is raised in a step.

    Args:
        store: where snapshots lie.
        model: key of the model whose cache it is.
    """

    def __init__(self, store: SnapshotStore, model: str) -> None:
        self._store, self._model = store, model
        self._layouts: list[KVLayout] = []
        self._failed: set[int] = set()

    def register(self, caches: Mapping[str, Any], layers: Mapping[str, Any], groups: Sequence[Any]) -> None:
        """Take the caches of all layers, and test that their layout is known.

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
        self._layouts = [layout_of(name, layers[name], caches[name], groups[0].kv_cache_spec) for name in names]
        for name, layout in zip(names, self._layouts, strict=True):
            self_test(name, layout)

    def load(self, loads: Sequence[Load]) -> None:
        """Copy snapshots into the cache, and write receipts."""
        for load in loads:
            try:
                self._load(load)
                if load.receipt is not None:
                    self._store.acknowledge(load.receipt)
            except Exception as error:
                _warn("a snapshot could not be loaded", error)
                self._failed |= load.span.block_ids(self._layouts[0].block_size)

    def save(self, saves: Sequence[Save]) -> None:
        """Copy the cache into snapshots."""
        for save in saves:
            try:
                self._store.put(save.name, self._snapshot(save))
            except Exception as error:
                _warn("a snapshot could not be saved", error)
                self._store.fail(save.name, str(error) if isinstance(error, SnapshotError) else "it was not saved.")

    def take_failed(self) -> set[int]:
        """Return the blocks whose load has failed since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def _load(self, load: Load) -> None:
        if load.refusal is not None:
            raise SnapshotError(load.refusal)
        snapshot = self._store.get(load.name)
        snapshot.info.check(self._model, load.ids)
        layout, (layers, heads, _, dim) = self._layouts[0], snapshot.keys.shape
        if (layers, heads, dim) != (len(self._layouts), layout.heads, layout.dim):
            raise SnapshotError(
                f"the snapshot has {layers} layers, {heads} heads and {dim} channels; the cache {len(self._layouts)}, "
                f"{layout.heads} and {layout.dim}."
            )
        slots, wanted = torch.tensor(load.span.slots(layout.block_size)), slice(load.span.start, load.span.stop)
        for layer, keys, values in zip(self._layouts, snapshot.keys, snapshot.values, strict=True):
            layer.write(slots, keys[:, wanted].transpose(0, 1), values[:, wanted].transpose(0, 1))

    def _snapshot(self, save: Save) -> Snapshot:
        slots = torch.tensor(save.span.slots(self._layouts[0].block_size))
        read = [layout.read(slots) for layout in self._layouts]
        keys, values = (torch.stack([pair[side].transpose(0, 1) for pair in read]) for side in (0, 1))
        return Snapshot.of(keys, values, save.ids, self._model)


def _in_order(names: Mapping[str, Any]) -> list[str]:
    """Sort layer names by their numbers, which are those of the layers of ``transformers``."""
    found = {}
    for name in names:
        match = _LAYER.search(name)
        if match is None or int(match[1]) in found:
            raise UnsupportedError(f"the cache layer {name!r} has no number of its own; expected '...layers.N....'.")
        found[int(match[1])] = name
    if sorted(found) != list(range(len(found))):
        raise UnsupportedError(f"the cache has the layers {sorted(found)}; expected all from 0 on.")
    return [found[number] for number in sorted(found)]


def _warn(what: str, error: Exception) -> None:
    """Log without quoting anything of a prompt."""
    reason = str(error) if isinstance(error, SnapshotError) else type(error).__name__
    _LOG.warning("%s: %s", what, reason)
