"""Fusion: sharer entries and receiver entries through the fusers, into the receiver's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import Cache

from c2c import kv_cache
from c2c.alignment.base import Alignment, Chunk
from c2c.fusers.base import Entries, Fuser
from c2c.kv_cache import KeyValue
from c2c.language_model import LanguageModel
from c2c.rope import Rotary
from c2c.tokens import TokenBatch

FusionMode = Literal["sequential", "parallel"]


@dataclass(frozen=True)
class Source:
    """One sharer's side of a fusion: who it is, what it read, its cache, and the fuser made for it."""

    sharer: LanguageModel
    tokens: TokenBatch
    cache: Cache
    fuser: Fuser


def fuse(
    cache: Cache,
    receiver: LanguageModel,
    tokens: TokenBatch,
    sources: Sequence[Source | None],
    chunk: Chunk,
    mode: FusionMode = "sequential",
    blend: float = 1.0,
) -> int:
    """Fuse the entries of one chunk into the receiver's cache, in place of its own.

    The cache must be clean at these positions: a fused entry is never fused again. With gradients on, new tensors take
    the place of the cache's, so that they flow to the fusers.

    Args:
        cache: the receiver's cache, at least ``chunk.stop`` tokens long.
        receiver: the receiver.
        tokens: the receiver's tokens.
        sources: one per sharer; None where it has no part in this chunk.
        chunk: which entries take which.
        mode: ``sequential``: each sharer's fuser reads what the one before wrote; ``parallel``: all read the clean
            cache and their differences are added up.
        blend: how much of what a fuser adds is taken: 0 leaves the receiver's entries, 1 takes the fuser's.

    Returns:
        Bytes of the sharers' entries that were read.
    """
    active = [
        (source, alignment)
        for source, alignment in zip(sources, chunk.alignments, strict=True)
        if source is not None and alignment is not None
    ]
    if mode == "parallel" and len(active) > 1:
        outcomes = [_run(cache, receiver, tokens, *part, blend) for part in active]  # all on the clean cache
        for (source, _), outcome in zip(active, [_difference(outcome) for outcome in outcomes], strict=True):
            _write(cache, source, outcome, add=True)
        return sum(outcome.read for outcome in outcomes)
    read = 0
    for source, alignment in active:
        outcome = _run(cache, receiver, tokens, source, alignment, blend)
        _write(cache, source, outcome)
        read += outcome.read
    return read


@dataclass(frozen=True)
class _Outcome:
    """What a fuser made of aligned entries, and where it goes."""

    picker: Picker
    ours: Entries
    fused: list[KeyValue]
    read: int


def aligned_entries(
    cache: Cache, receiver: LanguageModel, tokens: TokenBatch, source: Source, alignment: Alignment
) -> tuple[Entries, Entries]:
    """What a fuser reads: the sharer's and the receiver's entries at aligned positions, one item per fused layer.

    Args:
        cache: the receiver's cache.
        receiver: the receiver.
        tokens: the receiver's tokens.
        source: the sharer's side.
        alignment: which entries belong together.
    """
    fuser, config, device = source.fuser, source.fuser.config, source.fuser.device
    pick_ours, pick_theirs = Picker(alignment, alignment.receiver, 0), Picker(alignment, alignment.sharer, 1)
    ours = _entries(
        [kv_cache.layer(cache, i) for i in config.fused_layers],
        pick_ours,
        device,
        _rotary(receiver, tokens, pick_ours, fuser, config.fused_layers),
    )
    theirs = _entries(
        [kv_cache.layer(source.cache, i) for i in config.source_layers],
        pick_theirs,
        device,
        _rotary(source.sharer, source.tokens, pick_theirs, fuser, config.source_layers),
    )
    return theirs, ours


def _run(
    cache: Cache, receiver: LanguageModel, tokens: TokenBatch, source: Source, alignment: Alignment, blend: float
) -> _Outcome:
    """Run one fuser on the cache as it is now; nothing is written."""
    theirs, ours = aligned_entries(cache, receiver, tokens, source, alignment)
    read = sum(entry.nbytes for entry in (*theirs.keys, *theirs.values))
    fused: list[KeyValue] = source.fuser(theirs, ours)
    if blend != 1:  # at 1 the fuser's own tensors are taken, bit for bit
        pairs = zip(fused, ours.keys, ours.values, strict=True)
        fused = [(_between(keys, new[0], blend), _between(values, new[1], blend)) for new, keys, values in pairs]
    return _Outcome(Picker(alignment, alignment.receiver, 0), ours, fused, read)


def _between(own: Tensor, fused: Tensor, blend: float) -> Tensor:
    """A point on the line from the receiver's entries to the fused ones."""
    return own + blend * (fused - own)


def _difference(outcome: _Outcome) -> _Outcome:
    """What was added to the clean entries. Taken before anything is written, since entries may be views."""
    pairs = zip(outcome.fused, outcome.ours.keys, outcome.ours.values, strict=True)
    added = [(fused[0] - keys, fused[1] - values) for fused, keys, values in pairs]
    return _Outcome(outcome.picker, outcome.ours, added, outcome.read)


def _write(cache: Cache, source: Source, outcome: _Outcome, add: bool = False) -> None:
    """Put fused entries in the place of the receiver's, or add differences to them."""
    for layer, (new_keys, new_values) in zip(source.fuser.config.fused_layers, outcome.fused, strict=True):
        keys, values = kv_cache.layer(cache, layer)
        if add:
            new_keys = outcome.picker.take(keys).to(new_keys.device) + new_keys
            new_values = outcome.picker.take(values).to(new_values.device) + new_values
        kv_cache.set_layer(cache, layer, outcome.picker.put(keys, new_keys), outcome.picker.put(values, new_values))


class Picker:
    """Takes aligned positions out of a cache tensor and puts new ones back."""

    def __init__(self, alignment: Alignment, columns: Tensor, side: int) -> None:
        self.rows, self.columns = alignment.rows, columns
        self.block = None
        if alignment.block is not None:
            start, length = alignment.block[side], alignment.block[2]
            self.block = slice(start, start + length)

    def take(self, x: Tensor) -> Tensor:
        """``[batch, heads, tokens, dim]`` to the aligned ``[batch or 1, heads, pairs, dim]``."""
        if self.block is not None:
            return x[:, :, self.block]
        if x.shape[0] == 1:
            return x.index_select(2, self.columns.to(x.device))
        return x[self.rows.to(x.device), :, self.columns.to(x.device)].transpose(0, 1).unsqueeze(0)

    def take_positions(self, positions: Tensor) -> Tensor:
        """``[batch, tokens]`` to the aligned ``[batch or 1, pairs]``."""
        if self.block is not None:
            return positions[:, self.block]
        return positions[self.rows.to(positions.device), self.columns.to(positions.device)].unsqueeze(0)

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """``x`` with the aligned positions replaced; written in place unless gradients must flow."""
        new = new.to(device=x.device, dtype=x.dtype)
        target = x.clone() if new.requires_grad else x
        if self.block is not None:
            target[:, :, self.block] = new
        else:
            rows, columns = self.rows.to(x.device), self.columns.to(x.device)
            target[rows, :, columns] = new.squeeze(0).transpose(0, 1)
        return target


def _entries(
    layers: Sequence[KeyValue], picker: Picker, device: torch.device, rotary: Sequence[Rotary] | None
) -> Entries:
    keys = [picker.take(keys).to(device) for keys, _ in layers]
    values = [picker.take(values).to(device) for _, values in layers]
    return Entries(keys, values, rotary)


def _rotary(
    model: LanguageModel, tokens: TokenBatch, picker: Picker, fuser: Fuser, layers: Sequence[int]
) -> list[Rotary] | None:
    if not fuser.needs_rotary:
        return None
    tables = model.rotary(picker.take_positions(tokens.positions).to(fuser.device))
    return None if tables is None else [tables[layer] for layer in layers]
