"""Fusion: gather aligned entries of both caches, run the fuser, scatter the result into the receiver's cache."""

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
    """Hold one sharer's side of a fusion: the model, its tokens, its cache, and the fuser made for it."""

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
) -> None:
    """Fuse the entries of one chunk into the receiver's cache, in place of its own.

    The cache must be clean at these positions: a fused entry is never fused again. With gradients on, new tensors take
    the place of the cache's, so that they flow to the fusers.

    Args:
        cache: the receiver's cache, at least ``chunk.stop`` tokens long; changed.
        receiver: the receiver.
        tokens: its tokens.
        sources: one per sharer; None where it has no part in this chunk.
        chunk: which entries are fused with which.
        mode: ``sequential``: each sharer's fuser reads what the one before wrote; ``parallel``: all read the clean
            cache and their differences are added up.
        blend: how much of what a fuser adds is taken: 0 leaves the receiver's entries, 1 takes the fuser's.
    """
    pairs = zip(sources, chunk.alignments, strict=True)
    active = [(source, alignment) for source, alignment in pairs if source is not None and alignment is not None]
    if mode == "parallel" and len(active) > 1:
        # all differences are taken before anything is written, since entries may be views
        added = [
            [(new_keys - keys, new_values - values) for (new_keys, new_values), (keys, values) in result]
            for result in (_run(cache, receiver, tokens, *pair, blend) for pair in active)
        ]
        for pair, difference in zip(active, added, strict=True):
            _write(cache, *pair, difference, add=True)
        return
    for pair in active:
        _write(cache, *pair, [fused for fused, _ in _run(cache, receiver, tokens, *pair, blend)])


def aligned_entries(
    cache: Cache, receiver: LanguageModel, tokens: TokenBatch, source: Source, alignment: Alignment
) -> tuple[Entries, Entries]:
    """Gather a fuser's input at aligned positions of the receiver's ``cache`` and the sharer's.

    Returns:
        Entries of the sharer and of the receiver, one item per fused layer, on the fuser's device.
    """
    fuser, config = source.fuser, source.fuser.config
    ours = _entries(cache, receiver, tokens, config.fused_layers, AlignedIndex(alignment, "receiver"), fuser)
    theirs = _entries(
        source.cache, source.sharer, source.tokens, config.source_layers, AlignedIndex(alignment, "sharer"), fuser
    )
    return theirs, ours


class AlignedIndex:
    """Gather one side's aligned positions from a cache tensor, and scatter new entries to them."""

    def __init__(self, alignment: Alignment, side: Literal["receiver", "sharer"]) -> None:
        self.rows = alignment.rows
        self.columns = alignment.receiver if side == "receiver" else alignment.sharer
        self.block: slice | None = None
        if alignment.block is not None:
            ours, theirs, length = alignment.block
            start = ours if side == "receiver" else theirs
            self.block = slice(start, start + length)

    def gather(self, x: Tensor) -> Tensor:
        """Gather ``[batch, heads, tokens, dim]`` to the aligned ``[batch or 1, heads, pairs, dim]``."""
        if self.block is not None:
            return x[:, :, self.block]
        if x.shape[0] == 1:
            return x.index_select(2, self.columns.to(x.device))
        return x[self.rows.to(x.device), :, self.columns.to(x.device)].transpose(0, 1).unsqueeze(0)

    def gather_positions(self, positions: Tensor) -> Tensor:
        """Gather ``[batch, tokens]`` to the aligned ``[batch or 1, pairs]``."""
        if self.block is not None:
            return positions[:, self.block]
        return positions[self.rows.to(positions.device), self.columns.to(positions.device)].unsqueeze(0)

    def rotary(self, model: LanguageModel, tokens: TokenBatch, device: torch.device) -> list[Rotary] | None:
        """Return the rotary tables of all KV layers of ``model`` at the aligned positions of ``tokens``."""
        lengths = tokens.lengths.expand_as(tokens.positions) if tokens.rows > 1 else tokens.length
        if isinstance(lengths, Tensor):
            lengths = self.gather_positions(lengths)
        return model.rotary(self.gather_positions(tokens.positions).to(device), lengths)

    def scatter(self, x: Tensor, new: Tensor) -> Tensor:
        """Scatter ``new`` to the aligned positions of ``x``; in place unless gradients must flow."""
        new = new.to(device=x.device, dtype=x.dtype)
        target = x.clone() if new.requires_grad else x
        if self.block is not None:
            target[:, :, self.block] = new
        else:
            rows, columns = self.rows.to(x.device), self.columns.to(x.device)
            target[rows, :, columns] = new.squeeze(0).transpose(0, 1)
        return target


def _run(
    cache: Cache, receiver: LanguageModel, tokens: TokenBatch, source: Source, alignment: Alignment, blend: float
) -> list[tuple[KeyValue, KeyValue]]:
    """Run one fuser on the cache as it is now, without writing; per layer the fused entries and the receiver's own."""
    theirs, ours = aligned_entries(cache, receiver, tokens, source, alignment)
    fused: list[KeyValue] = source.fuser(theirs, ours)
    own = list(zip(ours.keys, ours.values, strict=True))
    if blend != 1:  # at 1 the fuser's own tensors are taken, bit for bit
        fused = [
            (keys + blend * (new_keys - keys), values + blend * (new_values - values))
            for (new_keys, new_values), (keys, values) in zip(fused, own, strict=True)
        ]
    return list(zip(fused, own, strict=True))


def _write(cache: Cache, source: Source, alignment: Alignment, entries: list[KeyValue], add: bool = False) -> None:
    """Write fused entries in the place of the receiver's, or add differences to them."""
    aligned = AlignedIndex(alignment, "receiver")
    for layer, (new_keys, new_values) in zip(source.fuser.config.fused_layers, entries, strict=True):
        keys, values = kv_cache.layer(cache, layer)
        if add:
            new_keys = aligned.gather(keys).to(new_keys.device) + new_keys
            new_values = aligned.gather(values).to(new_values.device) + new_values
        kv_cache.set_layer(cache, layer, aligned.scatter(keys, new_keys), aligned.scatter(values, new_values))


def _entries(
    cache: Cache, model: LanguageModel, tokens: TokenBatch, layers: Sequence[int], aligned: AlignedIndex, fuser: Fuser
) -> Entries:
    """Gather one model's entries in ``layers``, with their rotary tables where the fuser reads bare keys."""
    pairs = [kv_cache.layer(cache, layer) for layer in layers]
    keys = [aligned.gather(keys).to(fuser.device) for keys, _ in pairs]
    values = [aligned.gather(values).to(fuser.device) for _, values in pairs]
    rotary: list[Rotary] | None = None
    if fuser.needs_rotary:
        tables = aligned.rotary(model, tokens, fuser.device)
        rotary = None if tables is None else [tables[layer] for layer in layers]
    return Entries(keys, values, rotary)
