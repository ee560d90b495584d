"""What each system answers to a batch of items. All systems stand behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from c2c.data.formats import Row
from c2c.data.prompts import choice_tokens
from c2c.evaluation.answers import read_letter
from c2c.evaluation.config import EvalConfig, EvaluationError
from c2c.evaluation.costs import Cost, arguments, cost_of, text_cost
from c2c.evaluation.messages import Messages
from c2c.evaluation.pair import Pair
from c2c.evaluation.text_scores import exact, f1
from c2c.language_model import LanguageModel
from c2c.messages import Conversation
from c2c.prompting import RenderOptions
from c2c.systems.text_to_text import Variant, hand_over, request, text_to_text
from c2c.tokens import TokenBatch
from c2c.training.objective import FuserObjective, Message
from c2c.training.prefill_store import PrefillStore, stack
from c2c.training.shared_context import SharedContextObjective


@dataclass
class Answers:
    """One system's answers to a batch.

    Attributes:
        chosen: index of the chosen option of each item, None where none was named.
        scores: log-probability of each option among the options, in ``logits`` mode.
        text: what was generated, in ``generate`` mode.
        message: what the sharer wrote, in text-to-text.
        nll: nats per token of the reference answer, in ``nll`` mode.
        f1: overlap with the references, 0 to 1, in ``answers`` mode.
        exact: 1 where a reference was met, in ``answers`` mode.
    """

    chosen: list[int | None] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    message: list[str] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)

    def records(self, count: int) -> list[dict[str, Any]]:
        """One record for each of the first ``count`` items."""
        columns = {name: values for name, values in vars(self).items() if values}
        return [{name: values[row] for name, values in columns.items()} for row in range(count)]


class System(ABC):
    """Something that answers items."""

    @abstractmethod
    def answer(self, rows: Sequence[Row], config: EvalConfig) -> Answers:
        """Answers to a batch of items."""

    @abstractmethod
    def cost(self, row: Row, config: EvalConfig) -> Cost:
        """Answer one item as a user would, from its text, and say what it took."""


class Fused(System):
    """The receiver with a message: the sharer's cache of the same item, of another one, zeros, or none at all.

    Args:
        pair: whose batches are read.
        training: the pair through the fuser in question.
        message: what the fuser gets.
    """

    def __init__(self, pair: Pair, training: FuserObjective, message: Message) -> None:
        self.pair, self.training, self.message = pair, training, message

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], config: EvalConfig) -> Answers:
        """Answers from stored caches."""
        batch = self.pair.batch(rows)
        if config.mode == "nll":
            return Answers(nll=self._nll(batch))
        receiver = self.training.model.receiver
        if config.mode in ("generate", "answers"):
            cache = _shared(self.training).fused(batch, self.message)
            ids = receiver.generate(batch.receiver, cache, **decoding(config))
            return read_answers(receiver.texts(ids), rows)
        width = 1 + max(example.decisive for example in batch.examples)
        logits = self.training.logits(batch, self.message, width=width)
        picked = [logits[row, e.decisive, e.choice_ids] for row, e in enumerate(batch.examples)]
        return _choose(picked)

    def cost(self, row: Row, config: EvalConfig) -> Cost:
        """From text to text: both prefills, fusion, decoding; the receiver alone without a message."""
        model = self.training.model
        if self.message == "none":
            return cost_of(model.receiver.answer(row.messages, **arguments(row, config)))
        return cost_of(model.generate(row.messages, **arguments(row, config)))

    def _nll(self, batch: Any) -> list[float]:
        losses = self.training.token_losses(batch, self.message)
        lengths = (batch.responses != -100).sum(-1)
        means: list[float] = (losses.sum(-1) / lengths).tolist()
        return means


class Alone(System):
    """A model alone, from the same messages through its own template.

    Args:
        model: the model.
        store: its prefills, if it has a store.
    """

    def __init__(self, model: LanguageModel, store: PrefillStore | None = None) -> None:
        self.model, self.store = model, store

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], config: EvalConfig) -> Answers:
        """The model's own answers."""
        return _answers(self.model, [row.messages for row in rows], rows, config, self.store)

    def cost(self, row: Row, config: EvalConfig) -> Cost:
        """Prefill and decoding."""
        prefill = "sharer_prefill" if self.store is not None else "receiver_prefill"
        return cost_of(self.model.answer(row.messages, **arguments(row, config)), prefill)


class Text(System):
    """Text-to-text: the sharer writes about the question, and the receiver answers after reading it.

    Args:
        pair: who writes and who reads.
        variant: whether the sharer may say the answer.
    """

    def __init__(self, pair: Pair, variant: Variant) -> None:
        self.pair, self.variant, self.messages = pair, variant, Messages(pair)

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], config: EvalConfig) -> Answers:
        """The receiver's answers, with the sharer's messages."""
        asked = [request(row.messages, self.variant) for row in rows]
        messages = self.messages.write(asked, config.message_tokens)
        told = [hand_over(row.messages, self.variant, text) for row, text in zip(rows, messages, strict=True)]
        answers = _answers(self.pair.model.receiver, told, rows, config)
        answers.message = messages
        return answers

    def cost(self, row: Row, config: EvalConfig) -> Cost:
        """Both models' prefills and decoding."""
        result = text_to_text(
            self.pair.model.receiver,
            self.pair.sharer,
            row.messages,
            variant=self.variant,
            message_tokens=config.message_tokens,
            **arguments(row, config),
        )
        return text_cost(result)


def make_system(name: str, pair: Pair, config: EvalConfig) -> System:
    """The system of a name; loads what it needs."""
    if pair.model.private and config.mode in ("generate", "answers"):
        from c2c.evaluation.private import make_private_system

        return make_private_system(name, pair, config)
    messages: dict[str, Message] = {"receiver": "none", "matched": "matched", "deranged": "deranged", "zero": "zero"}
    if name in messages:
        return Fused(pair, pair.training, messages[name])
    if name == "sharer":
        return Alone(pair.sharer, pair.stores[1])
    if name == "untrained":
        return Fused(pair, pair.untrained(), "matched")
    if name in ("text", "text_published"):
        return Text(pair, "fair" if name == "text" else "published")
    if name == "adapter":
        from c2c.systems.lora import load_adapter

        return Alone(load_adapter(config.adapter or "", dtype=config.dtype, device_map=config.device_map))
    return Fused(*pair.with_fuser(config.fusers[name]), "matched")


def _shared(training: FuserObjective) -> SharedContextObjective:
    """Generation from stored caches is for shared context; private context goes through the public path."""
    assert isinstance(training, SharedContextObjective)
    return training


def _answers(
    model: LanguageModel,
    conversations: Sequence[Conversation],
    rows: Sequence[Row],
    config: EvalConfig,
    store: PrefillStore | None = None,
) -> Answers:
    """A model's answers to conversations that end with the questions of ``rows``, all put in one form."""
    first = rows[0]
    if config.mode in ("generate", "answers"):
        tokens = model.encode(list(conversations), RenderOptions(answer_prefix=first.answer_prefix))
        return read_answers(model.texts(model.generate(tokens, _cache(model, store, tokens), **decoding(config))), rows)
    tokens = model.encode(list(conversations), RenderOptions(answer_prefix=first.answer_prefix + first.lead))
    model.check_prompt(tokens)
    logits = model.next_logits(tokens, _cache(model, store, tokens))
    choices = [choice_tokens(model.tokenizer, "", row.choices) for row in rows]
    if any(at > 0 for at, _ in choices):
        raise EvaluationError(
            f"{model.name} spells the options {first.choices} with a common first token, so that its next token does "
            "not tell which it chooses. Use mode 'generate'."
        )
    return _choose([scores[ids] for scores, (_, ids) in zip(logits, choices, strict=True)])


def _cache(model: LanguageModel, store: PrefillStore | None, tokens: TokenBatch) -> Cache:
    """The cache of all but the last token of each prompt, from a store's prefills of whole prompts."""
    if store is None:
        return model.prefill(tokens, tokens.length - 1)
    prompts = [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]
    entries = [entry.first(len(ids) - 1) for ids, entry in zip(prompts, store.get(prompts), strict=True)]
    return stack(entries, model.geometry.layers, model.dtype, model.device)


def _choose(logits: Sequence[Tensor]) -> Answers:
    """The best of each item's options."""
    scores = [row.float().log_softmax(-1) for row in logits]
    return Answers(
        chosen=[int(row.argmax()) for row in scores],
        scores=[[round(float(value), 4) for value in row] for row in scores],
    )


def decoding(config: EvalConfig) -> dict[str, Any]:
    """How answers are generated."""
    return {"max_new_tokens": config.max_new_tokens, "do_sample": False}


def read_answers(texts: list[str], rows: Sequence[Row]) -> Answers:
    """Generated texts with what they say: the letter of an option, or how close they are to the references."""
    if rows[0].choices:
        full = [row.answer_prefix + text for text, row in zip(texts, rows, strict=True)]
        chosen = [read_letter(text, len(row.choices)) for text, row in zip(full, rows, strict=True)]
        return Answers(chosen=chosen, text=texts)
    pairs = [(text, row.references) for text, row in zip(texts, rows, strict=True)]
    return Answers(text=texts, f1=[f1(*pair) for pair in pairs], exact=[exact(*pair) for pair in pairs])
