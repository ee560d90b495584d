"""Cache entries of both models at aligned positions, before and after fusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from c2c import kv_cache
from c2c.analysis.inputs import Subject
from c2c.fusion import Picker
from c2c.language_model import LanguageModel
from c2c.rope import Rotary
from c2c.tokens import TokenBatch
from c2c.training.shared_context import SharedBatch


@dataclass(frozen=True)
class Side:
    """Entries of one model's layer, heads side by side, each ``[pairs, kv_heads * head_dim]`` in float32.

    Attributes:
        keys: as they lie in the cache, after the rotary embedding.
        unrotated: the same keys with the rotary embedding taken off; as they are for a model without one.
        values: the values.
    """

    keys: Tensor
    unrotated: Tensor
    values: Tensor

    def kinds(self) -> dict[str, Tensor]:
        """All tensors by name: ``keys``, ``keys_unrotated``, ``values``."""
        return {"keys": self.keys, "keys_unrotated": self.unrotated, "values": self.values}


@dataclass(frozen=True)
class LayerEntries:
    """The aligned entries of one fused receiver layer over a batch; row ``i`` of all sides belongs together.

    Attributes:
        layer: the receiver's layer.
        source: the sharer's layer that it reads.
        sharer: the sharer's entries. Several receiver positions may read the same one.
        receiver: the receiver's own entries, clean.
        fused: what the fuser made of them.
        first: True where a sharer entry is read for the first time, ``[pairs]``.
    """

    layer: int
    source: int
    sharer: Side
    receiver: Side
    fused: Side
    first: Tensor


@torch.no_grad()
def layer_entries(subject: Subject, batch: SharedBatch, layers: Sequence[int] | None = None) -> Iterator[LayerEntries]:
    """The entries of a batch, one fused layer after the other.

    Args:
        subject: the fuser and its models.
        batch: items with their caches.
        layers: receiver layers; by default all that are fused.
    """
    receiver, sharer, alignment = subject.model.receiver, subject.model.sharers[0], batch.matched
    ours, theirs = Picker(alignment, alignment.receiver, 0), Picker(alignment, alignment.sharer, 1)
    our_tables, their_tables = _tables(receiver, batch.receiver, ours), _tables(sharer, batch.sharer, theirs)
    fused = subject.training.fused(batch, "matched")
    first = _first(alignment.rows, alignment.sharer)
    for layer, source in enumerate(subject.fuser.config.layer_map):
        if source is None or (layers is not None and layer not in layers):
            continue
        ours_here = None if our_tables is None else our_tables[layer]
        yield LayerEntries(
            layer,
            source,
            _side(batch.sharer_cache, source, theirs, None if their_tables is None else their_tables[source]),
            _side(batch.receiver_cache, layer, ours, ours_here),
            _side(fused, layer, ours, ours_here),
            first,
        )


def _tables(model: LanguageModel, tokens: TokenBatch, picker: Picker) -> list[Rotary] | None:
    return model.rotary(picker.take_positions(tokens.positions))


def _side(cache: Cache, layer: int, picker: Picker, table: Rotary | None) -> Side:
    keys, values = (picker.take(entry).float() for entry in kv_cache.layer(cache, layer))
    if table is None:
        return Side(flat(keys), flat(keys), flat(values))
    here = Rotary(table.cos.to(keys.device), table.sin.to(keys.device))
    return Side(flat(keys), flat(here.undo(keys)), flat(values))


def flat(entries: Tensor) -> Tensor:
    """``[1, kv_heads, pairs, head_dim]`` to ``[pairs, kv_heads * head_dim]``, head 0 first."""
    return entries.transpose(1, 2).flatten(2).flatten(0, 1)


def _first(rows: Tensor, columns: Tensor) -> Tensor:
    """True at the first occurrence of each (row, column)."""
    seen: set[tuple[int, int]] = set()
    first = []
    for pair in zip(rows.tolist(), columns.tolist(), strict=True):
        first.append(pair not in seen)
        seen.add(pair)
    return torch.tensor(first, dtype=torch.bool)
