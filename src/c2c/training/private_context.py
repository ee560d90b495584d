"""Private context: the sharer has read a passage, and the receiver answers a question about it.

What does not depend on the fuser is stored: the sharer's cache of each passage, once for all its questions, and the
receiver's cache of the template before the question. A step projects the passage, adds the memory entries to the
receiver's cache, and runs the question and the response on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from c2c import kv_cache
from c2c.alignment import Alignment, SpanAligner
from c2c.errors import PromptError
from c2c.fusers.base import AlignedEntries, Entries
from c2c.fusion import Source, aligned_entries
from c2c.prefill import logits_after
from c2c.prompting import Encoded, RenderOptions, encode, render, text_tokens
from c2c.tokens import TokenBatch, left_pad
from c2c.training.examples import PrivateExample
from c2c.training.objective import FuserBatch, FuserObjective, Message
from c2c.training.prefill_store import stack


@dataclass(frozen=True)
class PrivateBatch(FuserBatch):
    """Examples with their stored caches.

    Attributes:
        prefix: the receiver's tokens before the memory entries, left-padded.
        question: the receiver's tokens after them, left-padded.
        kept: handed-over columns of ``sharer``, ``[batch, kept]``, left-padded with 0.
        kept_mask: False on that padding.
    """

    prefix: TokenBatch
    question: TokenBatch
    kept: Tensor
    kept_mask: Tensor


class PrivateContextObjective(FuserObjective):
    """Objective for fusers whose entries are added to the receiver's cache."""

    def collate(self, examples: Sequence[PrivateExample]) -> PrivateBatch:
        """Fetch the caches and pad."""
        stored, device = self.stored(examples), self.device
        shifts = [stored["sharer"].length - len(example.sharer_ids) for example in examples]
        columns = [[column + shift for column in e.kept] for e, shift in zip(examples, shifts, strict=True)]
        kept = left_pad(columns, 0).to(device)
        return PrivateBatch(
            **stored,
            prefix=left_pad([example.receiver_prefix for example in examples], 0).to(device),
            question=left_pad([example.receiver_ids[example.prefix :] for example in examples], 0).to(device),
            kept=kept.ids,
            kept_mask=kept.mask,
        )

    def logits(self, batch: PrivateBatch, message: Message, width: int | None = None) -> Tensor:
        """Compute the receiver's logits of the response tokens, ``[batch, response, vocab]``."""
        responses = batch.responses[:, :width]
        read = responses[:, :-1]
        cache, mask = self._cache_with_memory(batch, message)
        ids = torch.cat([batch.question.ids, read.clamp_min(0)], dim=1)
        new = torch.cat([batch.question.mask, read != -100], dim=1)
        positions = _positions_after(mask, new)
        whole = torch.cat([mask, new], dim=1)
        return logits_after(self.receiver.model, ids, whole, positions, cache, keep=responses.shape[1])

    def observe(self, examples: Sequence[PrivateExample], weighting: str = "none") -> Iterator[AlignedEntries]:
        """Yield, for each passage, both models' entries of its tokens; the receiver reads it too.

        Raises:
            PromptError: the passage is not found in both prompts.
        """
        sharer, receiver = self.model.sharers[0], self.model.receiver
        for example in examples:
            theirs, ours = (
                encode(m.tokenizer, render(m.tokenizer, example.row.sharer_messages or [], RenderOptions()))
                for m in (sharer, receiver)
            )
            tokens = left_pad([ours.ids], 0)
            (stored,) = self.sharer_store.get([example.sharer_ids])
            cache = stack([stored], sharer.geometry.layers, torch.float32, receiver.device)
            source = Source(sharer, left_pad([example.sharer_ids], 0), cache, self.fuser)
            own = receiver.prefill(tokens)
            yield AlignedEntries(*aligned_entries(own, receiver, tokens, source, _align(theirs, ours)))

    def _cache_with_memory(self, batch: PrivateBatch, message: Message) -> tuple[DynamicCache, Tensor]:
        """Append the memory entries to the prefix's cache: the cache, and its mask ``[batch, columns]``."""
        cache = kv_cache.from_layers(kv_cache.layers(batch.receiver_cache))  # appending makes new tensors
        if message == "none" or self.fuser.output_length(batch.kept.shape[1]) == 0:
            return cache, batch.prefix.mask
        entries, mask = self._memory(batch, message)
        tables = self.model.receiver.rotary(_positions_after(batch.prefix.mask, mask))
        if tables is not None:
            entries = [(tables[i].apply(keys), values) for i, (keys, values) in enumerate(entries)]
        kv_cache.append(cache, entries)
        return cache, torch.cat([batch.prefix.mask, mask], dim=1)

    def _memory(self, batch: PrivateBatch, message: Message) -> tuple[list[kv_cache.KeyValue], Tensor]:
        """Project what is handed over: keys without rotation and values, and their mask, ``[batch, slots]``."""
        cache, layers, mask = batch.sharer_cache, self.fuser.config.source_layers, batch.kept_mask
        if message == "zero":
            cache = kv_cache.zeros_like(cache)

        def take(x: Tensor) -> Tensor:
            return x.gather(2, batch.kept[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        pairs = [kv_cache.layer(cache, layer) for layer in layers]
        tables = self.model.sharers[0].rotary(batch.sharer.positions.gather(1, batch.kept))
        rotary = None if tables is None else [tables[layer] for layer in layers]
        theirs = Entries([take(keys) for keys, _ in pairs], [take(values) for _, values in pairs], rotary)
        entries = self.fuser(theirs, mask=mask)
        slots = self.fuser.output_length(mask.shape[1])
        if slots != mask.shape[1]:  # pooled: padding is not in it any more
            mask = mask.new_ones(mask.shape[0], slots)
        if message == "deranged":
            rows = torch.arange(len(batch.examples)).roll(-1)
            entries, mask = [(keys[rows], values[rows]) for keys, values in entries], mask[rows]
        return entries, mask


def _positions_after(mask: Tensor, new: Tensor) -> Tensor:
    """Count the positions of new tokens after those of a cache: only what is no padding, ``[batch, new]``."""
    return (mask.sum(-1, keepdim=True) + new.long().cumsum(-1) - 1).clamp_min(0)


def _align(theirs: Encoded, ours: Encoded) -> Alignment:
    """Pair each of the sharer's text tokens with the receiver's token that covers its last character."""
    owners = text_tokens(theirs)
    pairs = [
        (0, target, column)
        for column, target in enumerate(SpanAligner().pairs(theirs, ours))
        if target is not None and owners[column] is not None
    ]
    if not pairs:
        raise PromptError(f"no text of {theirs.rendered.text!r} was found in {ours.rendered.text!r}.")
    return Alignment.from_pairs(pairs)
