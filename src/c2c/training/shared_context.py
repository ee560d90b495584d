"""Shared context: the fuser over stored prompt caches, then the receiver over the response tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from c2c import kv_cache
from c2c.alignment import Alignment, Chunk
from c2c.alignment.base import derange_columns
from c2c.errors import FuserError
from c2c.fusers.base import AlignedEntries
from c2c.fusion import AlignedIndex, Source, aligned_entries, fuse
from c2c.language_model import LanguageModel
from c2c.tokens import TokenBatch, left_pad
from c2c.training.examples import Example
from c2c.training.objective import FuserBatch, FuserObjective, Message


@dataclass(frozen=True)
class SharedBatch(FuserBatch):
    """Examples with their stored caches; that of the receiver is clean, and of all tokens but the last of a prompt.

    Attributes:
        receiver: the receiver's prompts, left-padded.
        matched: alignment with each row's own sharer cache.
    """

    receiver: TokenBatch
    matched: Alignment

    def deranged(self) -> SharedBatch:
        """Return the batch with the next row's message in each row."""
        rows = torch.arange(len(self.examples)).roll(-1)
        cache, sharer = kv_cache.select_rows(self.sharer_cache, rows), self.sharer.select(rows.tolist())
        alignment = _align(self.examples, self.receiver.length, self.sharer.length, shift=1)
        return replace(self, sharer_cache=cache, sharer=sharer, matched=alignment)


class SharedContextObjective(FuserObjective):
    """Objective for fusers that merge the entries of a prompt that both models read."""

    def collate(self, examples: Sequence[Example]) -> SharedBatch:
        """Fetch the caches and pad."""
        receiver, stored = left_pad([example.receiver_ids for example in examples], 0), self.stored(examples)
        matched = _align(examples, receiver.length, stored["sharer"].length)
        return SharedBatch(**stored, receiver=receiver.to(self.device), matched=matched)

    def prompt_cache(self, batch: SharedBatch, message: Message) -> tuple[DynamicCache, Tensor]:
        """Return the fused cache and its mask; see :meth:`FuserObjective.prompt_cache`."""
        return self.fused(batch, message), batch.prefix.mask

    def fused(self, batch: SharedBatch, message: Message) -> DynamicCache:
        """Fuse the receiver's cache of all but the last prompt token with a message; ``batch`` is not changed."""
        cache = kv_cache.view(batch.receiver_cache)  # fusion replaces or overwrites these
        if message == "none":
            return cache
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in self.fuser.parameters())):
            cache = kv_cache.copy(cache)  # without gradients fusion writes in place
        if message == "zero":
            batch = replace(batch, sharer_cache=kv_cache.zeros_like(batch.sharer_cache))
        elif message == "deranged":
            batch = batch.deranged()
        chunk = Chunk(batch.receiver.length - 1, (batch.matched,))
        fuse(cache, self.receiver, batch.receiver, [self._source(batch)], chunk)
        return cache

    def observe(self, examples: Sequence[Example], weighting: str = "none") -> Iterator[AlignedEntries]:
        """Yield the aligned entries of the prompts, see :meth:`FuserObjective.observe`."""
        batch, weight = self.collate(examples), None
        theirs, ours = aligned_entries(
            batch.receiver_cache, self.receiver, batch.receiver, self._source(batch), batch.matched
        )
        if weighting == "attention":
            aligned = AlignedIndex(batch.matched, "receiver")
            received = attention_received(self.receiver, batch.receiver, batch.receiver_cache, batch.responses)
            layers = self.fuser.config.fused_layers
            weight = torch.stack([aligned.gather_positions(received[layer]).flatten() for layer in layers])
        yield AlignedEntries(theirs, ours, weight)

    def _source(self, batch: SharedBatch) -> Source:
        return Source(self.model.sharers[0], batch.sharer, batch.sharer_cache, self.fuser)


def _align(examples: Sequence[Example], width: int, sharer_width: int, shift: int = 0) -> Alignment:
    """Align a left-padded batch, each row with the sharer cache ``shift`` rows further on."""
    pairs: list[tuple[int, int, int]] = []
    for row, example in enumerate(examples):
        other = examples[(row + shift) % len(examples)]
        columns = example.alignment.sharer.tolist()
        if shift:
            columns = derange_columns(columns, other.alignment.sharer.tolist())
        ours, theirs = width - len(example.receiver_ids), sharer_width - len(other.sharer_ids)
        matched = zip(example.alignment.receiver.tolist(), columns, strict=True)
        pairs += [(row, target + ours, source + theirs) for target, source in matched]
    return Alignment.from_pairs(pairs)


@torch.no_grad()
def attention_received(receiver: LanguageModel, prompt: TokenBatch, cache: Cache, responses: Tensor) -> list[Tensor]:
    """Compute how much attention each prompt entry gets from the tokens that will read the fused cache.

    These are the last prompt token and the response: the receiver reads the rest of the prompt before it is fused. A
    head with attention ``a`` that reads values with errors ``e`` is off by at most ``sum_i a_i |e_i|^2``, squared. So
    with this weight ridge regression minimises a bound on the error of the attention output, as far as values go; for
    keys it is a heuristic.

    Costs one pass of the receiver over last prompt token and responses, with eager attention, since no other returns
    probabilities. ``cache`` holds all but the last prompt token and is not changed; ``responses`` are as in a batch.

    Returns:
        For every receiver layer ``[batch, tokens]``: attention on the clean cache, mean over readers and heads.

    Raises:
        FuserError: the receiver's eager attention returns no probabilities.
    """
    ids = torch.cat([prompt.ids[:, -1:], responses[:, :-1].clamp_min(0)], dim=1)
    mask = torch.cat([prompt.mask, responses[:, :-1] != -100], dim=1)
    decoder = receiver.model.get_decoder()
    implementation = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        out = decoder(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=prompt.positions[:, -1:] + torch.arange(ids.shape[1], device=ids.device),
            past_key_values=kv_cache.view(cache),  # a copy: it grows
            use_cache=True,
            output_attentions=True,
        )
    finally:
        decoder.set_attn_implementation(implementation)
    if not out.attentions or any(layer is None for layer in out.attentions):
        raise FuserError(f"{receiver.name} returns no attention probabilities: fit with linear_weight 'none'.")
    reads = (responses != -100).unsqueeze(-1)  # tokens that predict a token of the response
    share = reads / reads.sum(1, keepdim=True)
    return [(layer.float().mean(1) * share).sum(1)[:, : prompt.length - 1] for layer in out.attentions]
