"""Examples: rows rendered, aligned and tokenised for a pair of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from c2c.alignment import Alignment
from c2c.data.formats import Row
from c2c.data.prompts import choice_tokens, passage_with_question, response_tokens
from c2c.errors import PromptError
from c2c.handoff import sharer_prompt
from c2c.private_context import first_user_column
from c2c.prompting import RenderOptions, encode, render


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row, ready to train on: its messages are shared, or its passage is private to the sharer.

    Attributes:
        row: the row.
        receiver_ids: the receiver's prompt.
        prefix: how many of these tokens are prefilled and stored: all but the last, or those before the memory entries.
        sharer_ids: the sharer's prompt.
        response_ids: the receiver's tokens to learn.
        weights: loss weight of each of them; they add up to 1, or to 2 for multiple choice, where the token that names
            the choice has 1 and the others share 1.
        decisive: index of the response token that names the choice; 0 without choices.
        choice_ids: for multiple choice, the token that names each choice.
        message_ids: the receiver's tokens of the message, cut to the longest response allowed; the response while the
            receiver learns to reconstruct it.
        soft_target: the sharer's probability of each choice, where that is part of the target.
        alignment: shared context: the token pairs that are fused, of one row.
        kept: private context: the sharer's columns that are handed over.
    """

    row: Row
    receiver_ids: list[int]
    prefix: int
    sharer_ids: list[int]
    response_ids: list[int]
    weights: list[float]
    decisive: int
    choice_ids: list[int]
    message_ids: list[int]
    soft_target: tuple[float, ...] | None = None
    alignment: Alignment = field(default_factory=lambda: Alignment.from_pairs([]))
    kept: list[int] = field(default_factory=list)

    @property
    def receiver_prefix(self) -> list[int]:
        """The part of the receiver's prompt that is prefilled and stored."""
        return self.receiver_ids[: self.prefix]

    def reconstructing(self) -> Example:
        """Return the same prompt with its message as the response."""
        ids = self.message_ids
        weights = [1 / len(ids)] * len(ids)
        return replace(self, response_ids=ids, weights=weights, decisive=0, choice_ids=[], soft_target=None)


def build_examples(
    pair: Any, rows: Sequence[Row], max_prompt: int, max_response: int
) -> tuple[list[Example], Counter[str]]:
    """Encode rows; those that do not fit are dropped and counted by reason.

    Args:
        pair: a :class:`~c2c.model.C2CModel`, or anything with its ``receiver``, ``sharers``, ``aligner``, ``private``.
        rows: the rows.
        max_prompt: in tokens, of either model.
        max_response: in tokens.
    """
    prompts = _private_prompts if pair.private else _shared_prompts
    dropped: Counter[str] = Counter()
    examples = []
    for row in rows:
        try:
            encoded = prompts(pair, row)
            message = row.sharer_messages if pair.private and row.sharer_messages else row.messages
            target = _target(pair.receiver.tokenizer, row, message[-1]["content"], max_response)
            example = Example(row=row, **encoded, **target)
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


def _shared_prompts(pair: Any, row: Row) -> dict[str, Any]:
    options = RenderOptions(answer_prefix=row.answer_prefix)
    tokenizers = [sharer.tokenizer for sharer in pair.sharers]
    prompt = pair.aligner.align(pair.receiver.tokenizer, tokenizers, [row.messages], options)[0]
    alignment = prompt.chunks[0].alignments[0]
    if len(prompt.chunks) != 1 or alignment is None:
        raise PromptError("training needs an aligner with a single chunk, such as 'spans'")
    return {
        "receiver_ids": prompt.receiver.ids[0].tolist(),
        "prefix": prompt.receiver.length - 1,
        "sharer_ids": prompt.sharers[0].ids[0].tolist(),
        "alignment": alignment,
    }


def _private_prompts(pair: Any, row: Row) -> dict[str, Any]:
    if row.sharer_messages is None:
        raise PromptError(f"row {row.id} has no private context")
    options, tokenizer = RenderOptions(answer_prefix=row.answer_prefix), pair.receiver.tokenizer
    messages = passage_with_question(row) if row.draft else row.sharer_messages
    theirs = sharer_prompt(pair.sharers[0].tokenizer, messages, RenderOptions())
    return {
        "receiver_ids": encode(tokenizer, render(tokenizer, row.messages, options)).ids,
        "prefix": first_user_column(tokenizer, row.messages, options),
        "sharer_ids": theirs.ids,
        "kept": theirs.kept,
    }


def _target(tokenizer: Any, row: Row, message: str, max_response: int) -> dict[str, Any]:
    """Encode the response, its loss weights, and the message to reconstruct."""
    response = response_tokens(tokenizer, row)
    decisive, choices = choice_tokens(tokenizer, row.lead, row.choices)
    weights = [1 / len(response)] * len(response)
    if choices:  # the token that names the choice weighs as much as all others together
        weights = [1.0 if index == decisive else 1 / (len(response) - 1) for index in range(len(response))]
    return {
        "response_ids": response,
        "weights": weights,
        "decisive": decisive,
        "choice_ids": choices,
        "message_ids": tokenizer.encode(message, add_special_tokens=False)[:max_response],
    }
