"""Systems for private context: only the sharer has read the passage, and the receiver is asked about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from c2c.baselines.summary import summary_request, summary_to_text, with_passage
from c2c.evaluation.config import EvalConfig
from c2c.evaluation.costs import Cost, arguments, cost_of, text_cost
from c2c.evaluation.messages import Messages
from c2c.evaluation.pair import Pair
from c2c.evaluation.systems import Answers, System, decoding, read_answers
from c2c.handoff import Handoff, Packed
from c2c.language_model import LanguageModel
from c2c.messages import Conversation
from c2c.model import C2CModel
from c2c.prompting import RenderOptions
from c2c.training.objective import Message
from c2c.training.private import PrivateExample, asked
from c2c.training.rows import Row

Given = Literal["prompt", "passage", "sharer"]
SUMMARIES = (50, 100, 200)


class HandedOver(System):
    """The receiver with what a sharer has read, through a memory fuser.

    Args:
        pair: who reads and who answers.
        model: the pair through the fuser in question.
        message: the own passage, another item's, zeros in its place; ``none`` is the receiver alone.
        draft: tokens of an answer that the sharer writes first, and hands over as well.
    """

    def __init__(self, pair: Pair, model: C2CModel, message: Message, draft: int = 0) -> None:
        self.pair, self.model, self.message, self.draft = pair, model, message, draft

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], config: EvalConfig) -> Answers:
        """Answers from stored caches of the passages."""
        handoffs = self._handoffs(rows)
        results = self.model.generate(
            [row.messages for row in rows],
            sharer_messages=handoffs,
            options=RenderOptions(answer_prefix=rows[0].answer_prefix),
            **decoding(config),
        )
        return read_answers([result.text for result in results], rows)

    def cost(self, row: Row, config: EvalConfig) -> Cost:
        """From text to text: the passage is read, projected, and the question answered."""
        handoff: Any = row.sharer_messages
        if self.draft:
            handoff = self.pair.sharer.read(asked(row), draft_tokens=self.draft)
        return cost_of(self.model.generate(row.messages, sharer_messages=handoff, **arguments(row, config)))

    def _handoffs(self, rows: Sequence[Row]) -> list[Handoff]:
        if self.draft:
            return [self.pair.sharer.read(asked(row), draft_tokens=self.draft) for row in rows]
        examples: list[PrivateExample] = list(self.pair.batch(rows).examples)
        if self.message == "deranged":
            examples = [*examples[1:], examples[0]]
        handoffs = [self._stored(example) for example in examples]
        return [_zeros(handoff) for handoff in handoffs] if self.message == "zero" else handoffs

    def _stored(self, example: PrivateExample) -> Handoff:
        """What ``sharer.read`` returns, from the store."""
        sharer = self.pair.sharer
        [entry] = self.pair.stores[1].get([example.sharer_ids])
        layers = [entry.layers[index] for index in range(sharer.geometry.layers)]
        return Handoff.from_cache(sharer.identity, torch.tensor(example.sharer_ids), torch.tensor(example.kept), layers)


class Reader(System):
    """A model alone: the receiver with its own prompt, the receiver with the passage in it, or the sharer.

    Args:
        model: the model.
        given: what it reads: ``prompt``, ``passage`` for both, or ``sharer``: the passage and the bare question,
            without what the receiver alone knows.
        stage: what its prefill is counted as.
    """

    def __init__(self, model: LanguageModel, given: Given, stage: str = "receiver_prefill") -> None:
        self.model, self.given, self.stage = model, given, stage

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], config: EvalConfig) -> Answers:
        """The model's own answers."""
        tokens = self.model.encode([self._conversation(row) for row in rows])
        cache = self.model.prefill(tokens, tokens.length - 1)
        return read_answers(self.model.texts(self.model.generate(tokens, cache, **decoding(config))), rows)

    def cost(self, row: Row, config: EvalConfig) -> Cost:
        """Prefill and decoding."""
        result = self.model.answer(self._conversation(row), **arguments(row, config))
        return cost_of(result, prefill=self.stage)

    def _conversation(self, row: Row) -> Conversation:
        if self.given == "prompt":
            return row.messages
        return asked(row) if self.given == "sharer" else with_passage(_bare(row), _passage(row))


class Summary(System):
    """Text-to-text: the sharer sums the passage up, not knowing the question, and the receiver reads the summary.

    Args:
        pair: who writes and who reads.
        tokens: the longest summary.
    """

    def __init__(self, pair: Pair, tokens: int) -> None:
        self.pair, self.tokens, self.messages = pair, tokens, Messages(pair)

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], config: EvalConfig) -> Answers:
        """The receiver's answers, with the sharer's summaries."""
        receiver = self.pair.model.receiver
        summaries = self.messages.write([summary_request(_passage(row), self.tokens) for row in rows], self.tokens)
        told = [with_passage(_bare(row), text) for row, text in zip(rows, summaries, strict=True)]
        tokens = receiver.encode(told)
        ids = receiver.generate(tokens, receiver.prefill(tokens, tokens.length - 1), **decoding(config))
        answers = read_answers(receiver.texts(ids), rows)
        answers.message = summaries
        return answers

    def cost(self, row: Row, config: EvalConfig) -> Cost:
        """Both models' prefills and decoding."""
        result = summary_to_text(
            self.pair.model.receiver,
            self.pair.sharer,
            _bare(row),
            _passage(row),
            message_tokens=self.tokens,
            **arguments(row, config),
        )
        return text_cost(result)


def make_private_system(name: str, pair: Pair, config: EvalConfig) -> System:
    """The system of a name."""
    receiver, sharer = pair.model.receiver, pair.sharer
    messages: dict[str, Message] = {"matched": "matched", "deranged": "deranged", "zero": "zero"}
    if name in messages:
        return HandedOver(pair, pair.model, messages[name])
    if name == "receiver":
        return Reader(receiver, "prompt")
    if name == "reader":
        return Reader(receiver, "passage")
    if name == "sharer":
        return Reader(sharer, "sharer", stage="sharer_prefill")
    if name == "draft":
        return HandedOver(pair, pair.model, "matched", draft=config.draft_tokens)
    if name.startswith("summary_"):
        return Summary(pair, int(name.removeprefix("summary_")))
    _, training = pair.with_fuser(config.fusers[name])
    return HandedOver(pair, training.model, "matched")


def _passage(row: Row) -> str:
    assert row.sharer_messages is not None
    return row.sharer_messages[-1]["content"]


def _bare(row: Row) -> Conversation:
    """What the receiver is asked, for a prompt that holds the passage."""
    asked = f"{row.known} {row.question}".strip()
    return [*row.messages[:-1], {"role": "user", "content": f"Question: {asked}"}]


def _zeros(handoff: Handoff) -> Handoff:
    layers = [(Packed(torch.zeros_like(k.data)), Packed(torch.zeros_like(v.data))) for k, v in handoff.layers]
    return replace(handoff, layers=layers)
