"""Examples: rows rendered, aligned and tokenised for a pair of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from c2c.alignment import Alignment
from c2c.errors import PromptError
from c2c.model import C2CModel
from c2c.prompting import RenderOptions
from c2c.training.rows import Row


@dataclass(frozen=True)
class Example:
    """One row, ready to train on.

    Attributes:
        row: where it came from.
        receiver_ids: the receiver's prompt.
        sharer_ids: what of the sharer's prompt is read.
        alignment: which entries are fused; of one row.
        response_ids: the receiver's tokens to learn.
        choice_ids: for multiple choice, the first token of each choice.
    """

    row: Row
    receiver_ids: list[int]
    sharer_ids: list[int]
    alignment: Alignment
    response_ids: list[int]
    choice_ids: list[int]


def build_examples(
    model: C2CModel, rows: Sequence[Row], max_prompt: int, max_response: int
) -> tuple[list[Example], Counter[str]]:
    """Encode rows; those that do not fit are dropped and counted by reason."""
    dropped: Counter[str] = Counter()
    examples = []
    for row in rows:
        try:
            example = _build(model, row)
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


def _build(model: C2CModel, row: Row) -> Example:
    options = RenderOptions(answer_prefix=row.answer_prefix)
    tokenizer = model.receiver.tokenizer
    prompt = model.aligner.align(tokenizer, [s.tokenizer for s in model.sharers], [row.messages], options)[0]
    alignment = prompt.chunks[0].alignments[0]
    if len(prompt.chunks) != 1 or alignment is None:
        raise PromptError("training needs an aligner with a single chunk, such as 'spans'")
    stop = int(alignment.sharer.max()) + 1
    response = tokenizer.encode(row.response, add_special_tokens=False)
    if not row.choices and tokenizer.eos_token_id is not None:
        response = [*response, tokenizer.eos_token_id]
    return Example(
        row,
        prompt.receiver.ids[0].tolist(),
        prompt.sharers[0].ids[0, :stop].tolist(),
        alignment,
        response,
        [tokenizer.encode(choice, add_special_tokens=False)[0] for choice in row.choices],
    )
