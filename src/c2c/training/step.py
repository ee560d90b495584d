"""A training step: the fuser over stored prompt caches, then the receiver over the response tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from c2c import kv_cache
from c2c.alignment import Alignment, Chunk
from c2c.alignment.base import derange_columns
from c2c.fusion import Source, fuse
from c2c.prefill import continued_logits
from c2c.tokens import TokenBatch, left_pad
from c2c.training.examples import Example
from c2c.training.objective import Message, Objective, right_pad
from c2c.training.store import stack


@dataclass(frozen=True)
class Batch:
    """Examples with their stored caches, left-padded.

    Attributes:
        examples: the examples, in order.
        receiver: the receiver's prompts.
        sharer: the sharer's prompts.
        receiver_cache: clean cache of all receiver tokens but the last of each prompt.
        sharer_cache: the sharer's cache; layers that the layer map does not use are empty.
        matched: alignment with each row's own sharer cache.
        deranged: alignment with another row's.
        responses: ids to learn, ``[batch, response]``, right-padded with -100.
        weights: what each of them counts in the loss, ``[batch, response]``, 0 on padding.
    """

    examples: Sequence[Example]
    receiver: TokenBatch
    sharer: TokenBatch
    receiver_cache: DynamicCache
    sharer_cache: DynamicCache
    matched: Alignment
    deranged: Alignment
    responses: Tensor
    weights: Tensor


class FuserTraining(Objective):
    """Shared context: the fuser over stored prompt caches, then the receiver over the response tokens."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Fetch the caches and pad."""
        model, receiver_store, sharer_store = self._frozen
        device = model.receiver.device
        ours = receiver_store.get([example.receiver_ids[:-1] for example in examples])
        theirs = sharer_store.get([example.sharer_ids for example in examples])
        receiver = left_pad([example.receiver_ids for example in examples], 0)
        sharer = left_pad([example.sharer_ids for example in examples], 0)
        dtype = model.receiver.dtype
        return Batch(
            examples,
            receiver.to(device),
            sharer.to(device),
            stack(ours, model.receiver.geometry.layers, dtype, device),
            stack(theirs, model.sharers[0].geometry.layers, dtype, device),
            _batch_alignment(examples, receiver.length, sharer.length, shift=0),
            _batch_alignment(examples, receiver.length, sharer.length, shift=1),
            right_pad([example.response_ids for example in examples], -100).to(device),
            right_pad([example.weights for example in examples], 0.0).to(device),
        )

    def logits(self, batch: Batch, message: Message, width: int | None = None) -> Tensor:
        """The receiver's predictions of the response tokens, ``[batch, response, vocab]``."""
        read = batch.responses[:, :width][:, :-1]
        receiver, cache = self.model.receiver, self.fused(batch, message)
        return continued_logits(receiver.model, batch.receiver, read.clamp_min(0), read != -100, cache)

    def fused(self, batch: Batch, message: Message) -> DynamicCache:
        """The receiver's cache of all but the last prompt token, fused with a message; ``batch`` stays clean."""
        model = self._frozen[0]
        cache = kv_cache.from_layers(kv_cache.layers(batch.receiver_cache))  # fusion replaces or overwrites these
        if message == "none":
            return cache
        theirs = batch.sharer_cache
        if message == "zero":
            theirs = kv_cache.from_layers(
                (torch.zeros_like(k), torch.zeros_like(v)) for k, v in kv_cache.layers(theirs)
            )
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in self.fuser.parameters())):
            cache = kv_cache.copy(cache)  # without gradients fusion writes in place
        alignment, sharer = batch.matched, batch.sharer
        if message == "deranged":
            alignment = batch.deranged
            rows = torch.arange(len(batch.examples)).roll(-1)
            theirs, sharer = kv_cache.select_rows(theirs, rows), sharer.select(rows.tolist())
        source = Source(model.sharers[0], sharer, theirs, self.fuser)
        fuse(cache, model.receiver, batch.receiver, [source], Chunk(batch.receiver.length - 1, (alignment,)))
        return cache


def _batch_alignment(examples: Sequence[Example], width: int, sharer_width: int, shift: int) -> Alignment:
    """Alignment of a left-padded batch, each row with the sharer cache ``shift`` rows further on."""
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
