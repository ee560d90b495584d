"""Shared context: the fuser over stored prompt caches, then the receiver over the response tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from c2c import kv_cache
from c2c.alignment import Alignment, Chunk
from c2c.alignment.base import derange_columns
from c2c.fusers.base import AlignedEntries
from c2c.fusion import AlignedIndex, Source, aligned_entries, fuse
from c2c.prefill import continued_logits
from c2c.tokens import TokenBatch, left_pad
from c2c.training.attention import attention_received
from c2c.training.examples import SharedExample
from c2c.training.objective import Batch, FuserObjective, Message, targets
from c2c.training.prefill_store import stack


@dataclass(frozen=True)
class SharedBatch(Batch):
    """Examples with their stored caches, left-padded.

    Attributes:
        receiver: the receiver's prompts.
        sharer: the sharer's prompts.
        receiver_cache: clean cache of all receiver tokens but the last of each prompt.
        sharer_cache: the sharer's cache; layers that the layer map does not use are empty.
        matched: alignment with each row's own sharer cache.
        deranged: alignment with another row's.
    """

    receiver: TokenBatch
    sharer: TokenBatch
    receiver_cache: DynamicCache
    sharer_cache: DynamicCache
    matched: Alignment
    deranged: Alignment


class SharedContextObjective(FuserObjective):
    """Objective for fusers that merge the entries of a prompt that both models read."""

    def collate(self, examples: Sequence[SharedExample]) -> SharedBatch:
        """Fetch the caches and pad."""
        ours, theirs, device = self.model.receiver, self.model.sharers[0], self.device
        receiver = left_pad([example.receiver_ids for example in examples], 0)
        sharer = left_pad([example.sharer_ids for example in examples], 0)
        own = self.receiver_store.get([example.receiver_prefix for example in examples])
        shared = self.sharer_store.get([example.sharer_ids for example in examples])
        return SharedBatch(
            **targets(examples, device),
            receiver=receiver.to(device),
            sharer=sharer.to(device),
            receiver_cache=stack(own, ours.geometry.layers, ours.dtype, device),
            sharer_cache=stack(shared, theirs.geometry.layers, ours.dtype, device),
            matched=_align(examples, receiver.length, sharer.length, shift=0),
            deranged=_align(examples, receiver.length, sharer.length, shift=1),
        )

    def logits(self, batch: SharedBatch, message: Message, width: int | None = None) -> Tensor:
        """Compute the receiver's logits of the response tokens, ``[batch, response, vocab]``."""
        read = batch.responses[:, :width][:, :-1]
        receiver, cache = self.model.receiver, self.fused(batch, message)
        return continued_logits(receiver.model, batch.receiver, read.clamp_min(0), read != -100, cache)

    def fused(self, batch: SharedBatch, message: Message) -> DynamicCache:
        """Fuse the receiver's cache of all but the last prompt token with a message; ``batch`` is not changed."""
        cache = kv_cache.from_layers(kv_cache.layers(batch.receiver_cache))  # fusion replaces or overwrites these
        if message == "none":
            return cache
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in self.fuser.parameters())):
            cache = kv_cache.copy(cache)  # without gradients fusion writes in place
        shared, alignment, sharer = batch.sharer_cache, batch.matched, batch.sharer
        if message == "zero":
            shared = kv_cache.zeros_like(shared)
        if message == "deranged":
            rows = torch.arange(len(batch.examples)).roll(-1)
            alignment = batch.deranged
            shared, sharer = kv_cache.select_rows(shared, rows), sharer.select(rows.tolist())
        source = Source(self.model.sharers[0], sharer, shared, self.fuser)
        chunk = Chunk(batch.receiver.length - 1, (alignment,))
        fuse(cache, self.model.receiver, batch.receiver, [source], chunk)
        return cache

    def observe(self, examples: Sequence[SharedExample], weighting: str = "none") -> Iterator[AlignedEntries]:
        """Yield the aligned entries of the prompts, see :meth:`FuserObjective.observe`."""
        model, batch = self.model, self.collate(examples)
        source = Source(model.sharers[0], batch.sharer, batch.sharer_cache, self.fuser)
        theirs, ours = aligned_entries(batch.receiver_cache, model.receiver, batch.receiver, source, batch.matched)
        yield AlignedEntries(theirs, ours, self._attention(batch) if weighting == "attention" else None)

    def _attention(self, batch: SharedBatch) -> Tensor:
        """Compute the attention that aligned entries receive, ``[layers, pairs]``."""
        aligned = AlignedIndex(batch.matched, "receiver")
        received = attention_received(self.model.receiver, batch.receiver, batch.receiver_cache, batch.responses)
        layers = self.fuser.config.fused_layers
        return torch.stack([aligned.gather_positions(received[layer]).flatten() for layer in layers])


def _align(examples: Sequence[SharedExample], width: int, sharer_width: int, shift: int) -> Alignment:
    """Align a left-padded batch, each row with the sharer cache ``shift`` rows further on."""
    pairs: list[tuple[int, int, int]] = []
    for row, example in enumerate(examples):
        other = examples[(row + shift) % len(examples)]
        columns = example.alignment.sharer.tolist()
        if shift:
            columns = derange_columns(columns, other.alignment.sharer.tolist())
        ours, theirs = width - len(example.receiver_ids), sharer_width - len(other.sharer_ids)
        pairs += [
            (row, t + ours, s + theirs) for t, s in zip(example.alignment.receiver.tolist(), columns, strict=True)
        ]
    return Alignment.from_pairs(pairs)
