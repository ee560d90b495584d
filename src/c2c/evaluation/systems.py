"""What each system answers to a batch of items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from c2c.evaluation.answers import read_letter
from c2c.evaluation.config import EvalConfig, EvaluationError
from c2c.language_model import LanguageModel
from c2c.prompting import RenderOptions
from c2c.tokens import TokenBatch
from c2c.training.examples import Example, choice_tokens
from c2c.training.step import Batch, FuserTraining, Message
from c2c.training.store import PrefillStore, stack

# The system's name to the message that the fuser gets.
MESSAGES: dict[str, Message] = {"receiver": "none", "matched": "matched", "deranged": "deranged", "zero": "zero"}


@dataclass
class Answers:
    """One system's answers to a batch.

    Attributes:
        chosen: index of the chosen option of each item, None where none was named.
        texts: what was generated, in ``generate`` mode.
        losses: nats per token of the reference answer, in ``nll`` mode.
    """

    chosen: list[int | None] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@torch.no_grad()
def answer(system: str, training: FuserTraining, batch: Batch, config: EvalConfig) -> Answers:
    """One system's answers to the examples of a batch."""
    if system == "sharer":
        return _sharer(training.sharer_store, batch.examples, config)
    message = MESSAGES[system]
    if config.mode == "nll":
        return Answers(losses=_nll(training, batch, message))
    if config.mode == "generate":
        receiver = training.model.receiver
        ids = receiver.generate(batch.receiver, training.fused(batch, message), **_decoding(config))
        return _read(receiver, ids, batch.examples)
    width = 1 + max(example.decisive for example in batch.examples)
    logits = training.logits(batch, message, width=width)
    rows = [logits[row, example.decisive] for row, example in enumerate(batch.examples)]
    return Answers([_best(row, example.choice_ids) for row, example in zip(rows, batch.examples, strict=True)])


def _nll(training: FuserTraining, batch: Batch, message: Message) -> list[float]:
    losses = training.token_losses(batch, message)
    lengths = (batch.responses != -100).sum(-1)
    means: list[float] = (losses.sum(-1) / lengths).tolist()
    return means


def _sharer(store: PrefillStore, examples: Sequence[Example], config: EvalConfig) -> Answers:
    """The sharer alone, from the same messages through its own template."""
    sharer = store.model
    if config.mode == "generate":
        options = RenderOptions(answer_prefix=examples[0].row.answer_prefix)
        tokens = sharer.encode([example.row.messages for example in examples], options)
        ids = sharer.generate(tokens, _cache(store, tokens), **_decoding(config))
        return _read(sharer, ids, examples)
    row = examples[0].row  # the items of a batch are put in one form
    tokens = sharer.encode(
        [example.row.messages for example in examples], RenderOptions(answer_prefix=row.answer_prefix + row.lead)
    )
    logits = sharer.next_logits(tokens, _cache(store, tokens))
    choices = [choice_tokens(sharer.tokenizer, "", example.row.choices) for example in examples]
    if any(at > 0 for at, _ in choices):
        raise EvaluationError(
            f"the sharer {sharer.name} spells the options {row.choices} with a common first token, so that its next "
            "token does not tell which it chooses. Use mode 'generate'."
        )
    return Answers([_best(scores, ids) for scores, (_, ids) in zip(logits, choices, strict=True)])


def _cache(store: PrefillStore, tokens: TokenBatch) -> DynamicCache:
    """The cache of all but the last token of each prompt, from the store's prefills of the whole prompts."""
    model = store.model
    prompts = [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]
    entries = [entry.first(len(ids) - 1) for ids, entry in zip(prompts, store.get(prompts), strict=True)]
    return stack(entries, model.geometry.layers, model.dtype, model.device)


def _best(logits: Tensor, ids: Sequence[int]) -> int:
    return int(logits[list(ids)].argmax())


def _decoding(config: EvalConfig) -> dict[str, Any]:
    return {"max_new_tokens": config.max_new_tokens, "do_sample": False}


def _read(model: LanguageModel, ids: Tensor, examples: Sequence[Example]) -> Answers:
    texts = [str(text) for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    full = [example.row.answer_prefix + text for text, example in zip(texts, examples, strict=True)]
    chosen = [read_letter(text, len(example.row.choices)) for text, example in zip(full, examples, strict=True)]
    return Answers(chosen, texts)
