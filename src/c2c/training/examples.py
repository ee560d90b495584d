"""Examples: rows rendered, aligned and tokenised for a pair of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from c2c.alignment import Alignment
from c2c.data.formats import Row
from c2c.errors import PromptError
from c2c.model import C2CModel
from c2c.prompting import RenderOptions


@dataclass(frozen=True)
class Example:
    """One row, ready to train on.

    Attributes:
        row: where it came from.
        receiver_ids: the receiver's prompt.
        sharer_ids: what of the sharer's prompt is read.
        alignment: which entries are fused; of one row.
        response_ids: the receiver's tokens to learn.
        weights: what each of them counts in the loss; they add up to 1, or to 2 for multiple choice, where the token
            that names the choice counts 1 and the others share 1.
        decisive: index of the response token that names the choice; 0 without choices.
        choice_ids: for multiple choice, the token that names each choice.
        passage_ids: the receiver's tokens of the last message, cut to the longest response allowed; what is learned
            while reconstructing.
        beliefs: how probable the sharer finds each choice, where that is a target as well.
    """

    row: Row
    receiver_ids: list[int]
    sharer_ids: list[int]
    alignment: Alignment
    response_ids: list[int]
    weights: list[float]
    decisive: int
    choice_ids: list[int]
    passage_ids: list[int]
    beliefs: tuple[float, ...] | None = None

    @property
    def receiver_prefix(self) -> list[int]:
        """What of the receiver's prompt is prefilled and stored: all but the last token."""
        return self.receiver_ids[:-1]

    def reconstructing(self) -> Example:
        """The same prompt, with its last message as the response."""
        length = len(self.passage_ids)
        return replace(
            self, response_ids=self.passage_ids, weights=[1 / length] * length, decisive=0, choice_ids=[], beliefs=None
        )


def build_examples(
    model: C2CModel, rows: Sequence[Row], max_prompt: int, max_response: int
) -> tuple[list[Example], Counter[str]]:
    """Encode rows; those that do not fit are dropped and counted by reason."""
    dropped: Counter[str] = Counter()
    examples = []
    for row in rows:
        try:
            example = _build(model, row, max_response)
        except PromptError as error:
            dropped[type(error).__name__] += 1
            continue
        if max(len(example.receiver_ids), len(example.sharer_ids)) > max_prompt:
            dropped["prompt too long"] += 1
        elif len(example.response_ids) > max_response:
            dropped["response too long"] += 1
        else:
            examples.append(example)
    return examples, dropped


def _build(model: C2CModel, row: Row, max_response: int) -> Example:
    options = RenderOptions(answer_prefix=row.answer_prefix)
    tokenizer = model.receiver.tokenizer
    prompt = model.aligner.align(tokenizer, [s.tokenizer for s in model.sharers], [row.messages], options)[0]
    alignment = prompt.chunks[0].alignments[0]
    if len(prompt.chunks) != 1 or alignment is None:
        raise PromptError("training needs an aligner with a single chunk, such as 'spans'")
    stop = int(alignment.sharer.max()) + 1
    response = response_tokens(tokenizer, row)
    decisive, choices = choice_tokens(tokenizer, row.lead, row.choices)
    return Example(
        row,
        prompt.receiver.ids[0].tolist(),
        prompt.sharers[0].ids[0, :stop].tolist(),
        alignment,
        response,
        response_weights(len(response), decisive if choices else None),
        decisive,
        choices,
        tokenizer.encode(row.messages[-1]["content"], add_special_tokens=False)[:max_response],
    )


def response_tokens(tokenizer: Any, row: Row) -> list[int]:
    """The receiver's tokens of a row's response, with the end token where it belongs to it.

    Raises:
        PromptError: there are none.
    """
    response: list[int] = tokenizer.encode(row.response, add_special_tokens=False)
    if row.ends and tokenizer.eos_token_id is not None:
        response = [*response, tokenizer.eos_token_id]
    if not response:
        raise PromptError(f"row {row.id} has an empty response")
    return response


def choice_tokens(tokenizer: Any, lead: str, choices: Sequence[str]) -> tuple[int, list[int]]:
    """Where in ``lead + choice`` the choice is named, and the token that names each choice there.

    Raises:
        PromptError: two choices are spelled alike.
    """
    spelled = [tokenizer.encode(lead + choice, add_special_tokens=False) for choice in choices]
    if not spelled:
        return 0, []
    for at in range(min(map(len, spelled))):
        ids = [tokens[at] for tokens in spelled]
        if len(set(ids)) == len(ids):
            return at, ids
        if len(set(ids)) > 1:
            break
    raise PromptError(f"no single token tells the choices {list(choices)} apart in the receiver's or sharer's words")


def response_weights(length: int, decisive: int | None) -> list[float]:
    """Loss weights: a letter must not drown among the words around it."""
    if decisive is None:
        return [1 / length] * length
    return [1.0 if index == decisive else 1 / (length - 1) for index in range(length)]
