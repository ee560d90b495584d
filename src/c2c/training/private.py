"""Training for private context: the sharer has read a passage, the receiver answers a question about it.

What does not depend on the fuser is stored: the sharer's cache of each passage, once for all its questions, and the
receiver's cache of the template before the question. A step projects the passage, lays it into the receiver's cache,
and runs the question and the response on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache

from c2c import kv_cache
from c2c.data.formats import Row
from c2c.errors import PromptError
from c2c.fusers.base import Entries
from c2c.handoff import reading
from c2c.messages import Conversation
from c2c.model import C2CModel
from c2c.prefill import logits_after
from c2c.private_context import first_user_column
from c2c.prompting import RenderOptions, encode, render
from c2c.systems.base import with_passage
from c2c.tokens import TokenBatch, left_pad
from c2c.training.examples import choice_tokens, response_tokens, response_weights
from c2c.training.objective import Message, Objective, right_pad
from c2c.training.store import stack


@dataclass(frozen=True)
class PrivateExample:
    """One row of private context, ready to train on.

    Attributes:
        row: where it came from.
        receiver_ids: the receiver's prompt, which does not hold the passage.
        column: before which of its tokens the handed-over entries stand.
        sharer_ids: the sharer's prompt.
        kept: the sharer's columns that are handed over.
        response_ids: the receiver's tokens to learn.
        weights: what each of them counts in the loss.
        decisive: index of the response token that names the choice; 0 without choices.
        choice_ids: for multiple choice, the token that names each choice.
        passage_ids: the receiver's tokens of the passage, cut to the longest response allowed; what is learned while
            reconstructing.
    """

    row: Row
    receiver_ids: list[int]
    column: int
    sharer_ids: list[int]
    kept: list[int]
    response_ids: list[int]
    weights: list[float]
    decisive: int
    choice_ids: list[int]
    passage_ids: list[int]

    @property
    def receiver_prefix(self) -> list[int]:
        """What of the receiver's prompt is prefilled and stored."""
        return self.receiver_ids[: self.column]

    def reconstructing(self) -> PrivateExample:
        """The same, with the passage as the response."""
        length = len(self.passage_ids)
        return replace(self, response_ids=self.passage_ids, weights=[1 / length] * length, decisive=0, choice_ids=[])


@dataclass(frozen=True)
class PrivateBatch:
    """Examples with their stored caches.

    Attributes:
        examples: the examples, in order.
        prefix: the receiver's tokens before the entries, left-padded.
        prefix_cache: their cache.
        question: the receiver's tokens after them, left-padded.
        sharer: the sharer's prompts, left-padded.
        sharer_cache: their cache; layers that the fuser does not read are empty.
        kept: handed-over columns of ``sharer``, ``[batch, kept]``, left-padded with 0.
        kept_mask: False on that padding.
        responses: ids to learn, ``[batch, response]``, right-padded with -100.
        weights: what each of them counts in the loss, 0 on padding.
    """

    examples: Sequence[PrivateExample]
    prefix: TokenBatch
    prefix_cache: DynamicCache
    question: TokenBatch
    sharer: TokenBatch
    sharer_cache: DynamicCache
    kept: Tensor
    kept_mask: Tensor
    responses: Tensor
    weights: Tensor


class PrivateTraining(Objective):
    """Private context: entries of a memory fuser, then the receiver over the question and the response tokens."""

    def collate(self, examples: Sequence[PrivateExample]) -> PrivateBatch:
        """Fetch the caches and pad."""
        model, receiver_store, sharer_store = self._frozen
        ours, theirs, device, dtype = model.receiver, model.sharers[0], model.receiver.device, model.receiver.dtype
        sharer = left_pad([example.sharer_ids for example in examples], 0)
        kept, kept_mask = _kept(examples, sharer.length)
        prefixes = [example.receiver_prefix for example in examples]
        return PrivateBatch(
            examples,
            left_pad(prefixes, 0).to(device),
            stack(receiver_store.get(prefixes), ours.geometry.layers, dtype, device),
            left_pad([example.receiver_ids[example.column :] for example in examples], 0).to(device),
            sharer.to(device),
            stack(sharer_store.get([e.sharer_ids for e in examples]), theirs.geometry.layers, dtype, device),
            kept.to(device),
            kept_mask.to(device),
            right_pad([example.response_ids for example in examples], -100).to(device),
            right_pad([example.weights for example in examples], 0.0).to(device),
        )

    def logits(self, batch: PrivateBatch, message: Message, width: int | None = None) -> Tensor:
        """The receiver's predictions of the response tokens, ``[batch, response, vocab]``."""
        responses = batch.responses[:, :width]
        read = responses[:, :-1]
        cache, mask = self.laid_down(batch, message)
        ids = torch.cat([batch.question.ids, read.clamp_min(0)], dim=1)
        new = torch.cat([batch.question.mask, read != -100], dim=1)
        first = mask.sum(-1, keepdim=True)  # positions count what is real
        positions = (first + new.long().cumsum(-1) - 1).clamp_min(0)
        whole = torch.cat([mask, new], dim=1)
        return logits_after(self.model.receiver.model, ids, whole, positions, cache, keep=responses.shape[1])

    def laid_down(self, batch: PrivateBatch, message: Message) -> tuple[DynamicCache, Tensor]:
        """The receiver's cache of its prefix and the entries of a message, and its mask, ``[batch, columns]``."""
        cache = kv_cache.from_layers(kv_cache.layers(batch.prefix_cache))  # appending makes new tensors
        if message == "none":
            return cache, batch.prefix.mask
        entries, mask = self.memory(batch, message)
        if entries[0][0].shape[2] == 0:
            return cache, batch.prefix.mask
        first = batch.prefix.mask.sum(-1, keepdim=True)
        tables = self.model.receiver.rotary((first + mask.long().cumsum(-1) - 1).clamp_min(0))
        if tables is not None:
            entries = [(tables[i].apply(keys), values) for i, (keys, values) in enumerate(entries)]
        kv_cache.append(cache, entries)
        return cache, torch.cat([batch.prefix.mask, mask], dim=1)

    def memory(self, batch: PrivateBatch, message: Message) -> tuple[list[kv_cache.KeyValue], Tensor]:
        """What the fuser makes of a message, keys without rotation, and which of it is real, ``[batch, slots]``."""
        theirs, rows = self.entries(batch), torch.arange(len(batch.examples))
        mask = batch.kept_mask
        if message == "zero":
            theirs = Entries(
                [torch.zeros_like(x) for x in theirs.keys], [torch.zeros_like(x) for x in theirs.values], theirs.rotary
            )
        entries = self.fuser(theirs, mask=mask)
        if entries[0][0].shape[2] != mask.shape[1]:  # pooled
            mask = torch.ones(mask.shape[0], entries[0][0].shape[2], dtype=torch.bool, device=mask.device)
        if message == "deranged":
            rows = rows.roll(-1)
            entries, mask = [(keys[rows], values[rows]) for keys, values in entries], mask[rows]
        return entries, mask

    def entries(self, batch: PrivateBatch) -> Entries:
        """The sharer's handed-over entries, padding included."""
        sharer, layers = self.model.sharers[0], self.fuser.config.source_layers

        def take(x: Tensor) -> Tensor:
            index = batch.kept[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            return x.gather(2, index)

        pairs = [kv_cache.layer(batch.sharer_cache, layer) for layer in layers]
        tables = sharer.rotary(batch.sharer.positions.gather(1, batch.kept))
        rotary = None if tables is None else [tables[layer] for layer in layers]
        return Entries([take(keys) for keys, _ in pairs], [take(values) for _, values in pairs], rotary)


def build_private_examples(
    model: C2CModel, rows: Sequence[Row], max_prompt: int, max_response: int
) -> tuple[list[PrivateExample], Counter[str]]:
    """Encode rows; those that do not fit are dropped and counted by reason."""
    dropped: Counter[str] = Counter()
    examples = []
    for row in rows:
        try:
            example = _build(model, row, max_response)
        except PromptError as error:
            dropped[type(error).__name__] += 1
            continue
        if max(len(example.receiver_ids), len(example.sharer_ids) + row.draft) > max_prompt:
            dropped["prompt too long"] += 1
        elif len(example.response_ids) > max_response:
            dropped["response too long"] += 1
        else:
            examples.append(example)
    return examples, dropped


def asked(row: Row) -> Conversation:
    """The sharer's prompt where it is asked itself: the passage and the bare question."""
    assert row.sharer_messages is not None
    question = [*row.messages[:-1], {"role": "user", "content": f"Question: {row.question}"}]
    return with_passage(question, row.sharer_messages[-1]["content"])


def _build(model: C2CModel, row: Row, max_response: int) -> PrivateExample:
    if row.sharer_messages is None:
        raise PromptError(f"row {row.id} has no private context")
    options, tokenizer = RenderOptions(answer_prefix=row.answer_prefix), model.receiver.tokenizer
    given = asked(row) if row.draft else row.sharer_messages
    theirs = reading(model.sharers[0].tokenizer, given, RenderOptions())
    response = response_tokens(tokenizer, row)
    decisive, choices = choice_tokens(tokenizer, row.lead, row.choices)
    return PrivateExample(
        row,
        encode(tokenizer, render(tokenizer, row.messages, options)).ids,
        first_user_column(tokenizer, row.messages, options),
        theirs.ids,
        theirs.kept,
        response,
        response_weights(len(response), decisive if choices else None),
        decisive,
        choices,
        tokenizer.encode(row.sharer_messages[-1]["content"], add_special_tokens=False)[:max_response],
    )


def _kept(examples: Sequence[PrivateExample], width: int) -> tuple[Tensor, Tensor]:
    """Handed-over columns of a left-padded batch, and which of them are real."""
    longest = max(len(example.kept) for example in examples)
    columns = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        shift = width - len(example.sharer_ids)
        columns[row, longest - len(example.kept) :] = torch.tensor(example.kept) + shift
        mask[row, longest - len(example.kept) :] = True
    return columns, mask
