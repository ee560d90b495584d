"""Worker half of the connector: entries from snapshots into the paged cache, and back."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from c2c.integrations.vllm.errors import SnapshotError, UnsupportedError
from c2c.integrations.vllm.kv_layout import CPULayout
from c2c.integrations.vllm.scheduler import Transfer
from c2c.integrations.vllm.snapshot import Snapshot, SnapshotStore

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
        self._layouts: list[CPULayout] = []
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
        spec = groups[0].kv_cache_spec
        self._layouts = [CPULayout(name, layers[name], caches[name], spec) for name in _in_order(caches)]
        for layout in self._layouts:
            layout.self_test()

    def load(self, loads: Sequence[Transfer]) -> None:
        """Copy snapshots into the cache, and write receipts."""
        for load in loads:
            try:
                self._load(load)
                if load.receipt is not None:
                    self._store.acknowledge(load.receipt)
            except Exception as error:
                _warn("a snapshot could not be loaded", error)
                self._failed |= load.block_ids(self._layouts[0].block_size)

    def save(self, saves: Sequence[Transfer]) -> None:
        """Copy the cache into snapshots."""
        for save in saves:
            try:
                self._save(save)
            except Exception as error:
                _warn("a snapshot could not be saved", error)
                self._store.fail(save.name, str(error) if isinstance(error, SnapshotError) else "it was not saved.")

    def take_failed(self) -> set[int]:
        """Return the blocks whose load has failed since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def _load(self, load: Transfer) -> None:
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
        slots, wanted = torch.tensor(load.slots(layout.block_size)), slice(load.start, load.stop)
        for layer, keys, values in zip(self._layouts, snapshot.keys, snapshot.values, strict=True):
            layer.write(slots, keys[:, wanted].transpose(0, 1), values[:, wanted].transpose(0, 1))

    def _save(self, save: Transfer) -> None:
        slots = torch.tensor(save.slots(self._layouts[0].block_size))
        read = [layout.read(slots) for layout in self._layouts]
        keys, values = (torch.stack([pair[side].transpose(0, 1) for pair in read]) for side in (0, 1))
        self._store.put(save.name, Snapshot.of(keys, values, save.ids, self._model))


def _in_order(names: Iterable[str]) -> list[str]:
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
