"""Fusion: sharer entries and receiver entries through the fusers, into the receiver's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import Cache

from c2c import kv
from c2c.alignment.plan import Alignment, Chunk
from c2c.fusers.base import Entries, Fuser
from c2c.kv import KeyValue
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

    Returns:
        Bytes of the sharers' entries that were read.
    """
    clean = kv.layers(cache) if mode == "parallel" and len(sources) > 1 else None
    if clean is not None:
        clean = [(keys.clone(), values.clone()) for keys, values in clean]
    read = 0
    for source, alignment in zip(sources, chunk.alignments, strict=True):
        if source is not None and alignment is not None:
            read += _fuse_one(cache, clean, receiver, tokens, source, alignment)
    return read


def _fuse_one(
    cache: Cache,
    clean: list[KeyValue] | None,
    receiver: LanguageModel,
    tokens: TokenBatch,
    source: Source,
    alignment: Alignment,
) -> int:
    config, device = source.fuser.config, source.fuser.device
    ours = [clean[i] if clean is not None else kv.layer(cache, i) for i in config.fused_layers]
    theirs = [kv.layer(source.cache, i) for i in config.source_layers]
    pick_ours = _Picker(alignment, alignment.receiver, 0)
    pick_theirs = _Picker(alignment, alignment.sharer, 1)
    mine = _entries(ours, pick_ours, device, _rotary(receiver, tokens, pick_ours, source.fuser, config.fused_layers))
    other = _entries(
        theirs,
        pick_theirs,
        device,
        _rotary(source.sharer, source.tokens, pick_theirs, source.fuser, config.source_layers),
    )
    fused = source.fuser(other, mine)
    for place, layer in enumerate(config.fused_layers):
        new_keys, new_values = fused[place]
        keys, values = kv.layer(cache, layer)
        if clean is not None:
            new_keys = pick_ours.take(keys).to(device) + (new_keys - mine.keys[place])
            new_values = pick_ours.take(values).to(device) + (new_values - mine.values[place])
        kv.set_layer(cache, layer, pick_ours.put(keys, new_keys), pick_ours.put(values, new_values))
    return sum(entry.nbytes for entry in (*other.keys, *other.values))


class _Picker:
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
    layers: Sequence[KeyValue], picker: _Picker, device: torch.device, rotary: Sequence[Rotary] | None
) -> Entries:
    keys = [picker.take(keys).to(device) for keys, _ in layers]
    values = [picker.take(values).to(device) for _, values in layers]
    return Entries(keys, values, rotary)


def _rotary(
    model: LanguageModel, tokens: TokenBatch, picker: _Picker, fuser: Fuser, layers: Sequence[int]
) -> list[Rotary] | None:
    if not fuser.needs_rotary:
        return None
    tables = model.rotary(picker.take_positions(tokens.positions).to(fuser.device))
    return None if tables is None else [tables[layer] for layer in layers]
