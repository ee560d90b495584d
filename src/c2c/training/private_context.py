"""Private context: the sharer has read a passage, and the receiver answers a question about it.

What does not depend on the fuser is stored: the sharer's cache of each passage, once for all its questions, and the
receiver's cache of the template before the question. A step projects the passage, adds the memory entries to the
receiver's cache, and runs the question and the response on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache

from c2c import kv_cache
from c2c.alignment import Alignment, SpanAligner
from c2c.errors import PromptError
from c2c.fusers.base import AlignedEntries, Entries
from c2c.fusion import Source, aligned_entries
from c2c.prompting import Encoded, RenderOptions, encode, render, text_tokens
from c2c.tokens import TokenBatch, left_pad
from c2c.training.examples import Example
from c2c.training.objective import FuserBatch, FuserObjective, Message, positions_after
from c2c.training.prefill_store import stack


@dataclass(frozen=True)
class PrivateBatch(FuserBatch):
    """Examples with their stored caches.

    Attributes:
        kept: handed-over columns of ``sharer``, left-padded with 0.
    """

    kept: TokenBatch


class PrivateContextObjective(FuserObjective):
    """Objective for fusers whose entries are added to the receiver's cache."""

    def collate(self, examples: Sequence[Example]) -> PrivateBatch:
        """Fetch the caches and pad."""
        stored = self.stored(examples)
        shifts = [stored["sharer"].length - len(example.sharer_ids) for example in examples]
        columns = [[column + shift for column in e.kept] for e, shift in zip(examples, shifts, strict=True)]
        return PrivateBatch(**stored, kept=left_pad(columns, 0).to(self.device))

    def prompt_cache(self, batch: PrivateBatch, message: Message) -> tuple[DynamicCache, Tensor]:
        """Append the memory entries to the prefix's cache; see :meth:`FuserObjective.prompt_cache`."""
        cache = kv_cache.view(batch.receiver_cache)  # appending makes new tensors
        if message == "none" or self.fuser.output_length(batch.kept.length) == 0:
            return cache, batch.prefix.mask
        entries, mask = self._memory(batch, message)
        lengths = torch.cat([batch.prefix.mask, mask, batch.question.mask], dim=1).sum(-1, keepdim=True)
        if self.receiver_store.depends(int(lengths.max())):  # with the entries the prompt is longer
            prompts = [example.receiver_prefix for example in batch.examples]
            cache = self.receiver_cache(prompts, lengths.flatten().tolist())
        tables = self.receiver.rotary(positions_after(batch.prefix.mask, mask), lengths)
        if tables is not None:
            entries = [(tables[i].apply(keys), values) for i, (keys, values) in enumerate(entries)]
        kv_cache.append(cache, entries)
        return cache, torch.cat([batch.prefix.mask, mask], dim=1)

    def observe(self, examples: Sequence[Example], weighting: str = "none") -> Iterator[AlignedEntries]:
        """Yield, for each passage, both models' entries of its tokens; the receiver reads it too.

        Raises:
            PromptError: the passage is not found in both prompts.
        """
        sharer, receiver = self.model.sharers[0], self.receiver
        for example in examples:
            theirs, ours = (
                encode(m.tokenizer, render(m.tokenizer, example.row.sharer_messages or [], RenderOptions()))
                for m in (sharer, receiver)
            )
            tokens = left_pad([ours.ids], 0)
            stored = self.sharer_store.get([example.sharer_ids])
            cache = stack(stored, sharer.geometry.layers, torch.float32, receiver.device)
            source = Source(sharer, left_pad([example.sharer_ids], 0), cache, self.fuser)
            own = receiver.prefill(tokens)
            yield AlignedEntries(*aligned_entries(own, receiver, tokens, source, _align(theirs, ours)))

    def _memory(self, batch: PrivateBatch, message: Message) -> tuple[list[kv_cache.KeyValue], Tensor]:
        """Project what is handed over: keys without rotation and values, and their mask, ``[batch, slots]``."""
        if message == "zero":
            batch = replace(batch, sharer_cache=kv_cache.zeros_like(batch.sharer_cache))
        kept, mask, layers = batch.kept.ids, batch.kept.mask, self.fuser.config.source_layers

        def take(x: Tensor) -> Tensor:
            return x.gather(2, kept[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        pairs = [kv_cache.layer(batch.sharer_cache, layer) for layer in layers]
        tables = self.model.sharers[0].rotary(batch.sharer.positions.gather(1, kept), batch.sharer.lengths)
        rotary = None if tables is None else [tables[layer] for layer in layers]
        theirs = Entries([take(keys) for keys, _ in pairs], [take(values) for _, values in pairs], rotary)
        entries = self.fuser(theirs, mask=mask)
        slots = self.fuser.output_length(mask.shape[1])
        if slots != mask.shape[1]:  # pooled: padding is not in it any more
            mask = mask.new_ones(mask.shape[0], slots)
        if message == "deranged":
            entries, mask = [(keys.roll(-1, 0), values.roll(-1, 0)) for keys, values in entries], mask.roll(-1, 0)
        return entries, mask


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
