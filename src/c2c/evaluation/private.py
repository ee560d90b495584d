"""Systems for private context: only the sharer has read the passage, and the receiver is asked about it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from c2c.data.formats import Row
from c2c.data.prompts import passage_with_question
from c2c.evaluation.config import EvalConfig
from c2c.evaluation.costs import Cost, arguments, cost_of, text_cost
from c2c.evaluation.messages import Messages
from c2c.evaluation.pair import Pair
from c2c.evaluation.systems import Answers, System, decoding, read_answers
from c2c.handoff import Handoff, Packed, Reading, reading
from c2c.language_model import LanguageModel
from c2c.messages import Conversation
from c2c.model import C2CModel
from c2c.prompting import RenderOptions
from c2c.systems.base import with_passage
from c2c.systems.text_to_text import passage_to_text, summary_request
from c2c.training.examples import PrivateExample
from c2c.training.objective import Message

Given = Literal["prompt", "passage", "sharer"]
SUMMARIES = (50, 100, 200)


class HandedOver(System):
    """The receiver with what a sharer has read, through a memory fuser.

    Args:
        pair: who reads and who answers.
        model: the pair through the fuser in question.
        message: the own passage, another item's, zeros in its place; ``none`` is the receiver alone.
        draft: tokens of an answer that the sharer, asked too, writes first, and hands over as well.
    """

    def __init__(self, pair: Pair, model: C2CModel, message: Message, draft: int = 0) -> None:
        self.pair, self.model, self.message, self.draft = pair, model, message, draft

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], config: EvalConfig) -> Answers:
        """Answers from stored caches of the passages."""
        read = drafts(self.pair, rows, self.draft) if self.draft else self._passages(rows)
        if self.message == "deranged":
            read = [*read[1:], read[0]]
        handoffs = [_handoff(self.pair, one) for one in read]
        if self.message == "zero":
            handoffs = [_zeros(handoff) for handoff in handoffs]
        results = self.model.generate(
            [row.messages for row in rows],
            sharer_messages=handoffs,
            options=RenderOptions(answer_prefix=rows[0].answer_prefix),
            **decoding(config),
        )
        return read_answers([result.text for result in results], rows)

    def cost(self, row: Row, config: EvalConfig) -> Cost:
        """From text to text: the passage is read, projected, and the question answered."""
        if self.draft:
            return self._draft_cost(row, config)
        answer = self.model.generate(row.messages, sharer_messages=row.sharer_messages, **arguments(row, config))
        return cost_of(answer)

    def _draft_cost(self, row: Row, config: EvalConfig) -> Cost:
        """The same, after the sharer has read the question too and drafted its answer."""
        sharer, began = self.pair.sharer, time.perf_counter()
        read = sharer.read(passage_with_question(row))
        prefilled = time.perf_counter()
        drafted = sharer.read(passage_with_question(row), draft_tokens=self.draft, reuse=read)
        written = time.perf_counter()
        cost = cost_of(self.model.generate(row.messages, sharer_messages=drafted, **arguments(row, config)))
        before = {
            "seconds": written - began,
            "first_token": written - began,
            "sharer_prefill": prefilled - began,
            "sharer_decode": written - prefilled,
            "tokens": len(drafted.ids) - len(read.ids),
        }
        return cost | {name: cost.get(name, 0) + value for name, value in before.items()}

    def _passages(self, rows: Sequence[Row]) -> list[Reading]:
        examples: Sequence[PrivateExample] = self.pair.batch(rows).examples
        return [Reading(example.sharer_ids, example.kept) for example in examples]


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
        return passage_with_question(row) if self.given == "sharer" else with_passage(_bare(row), _passage(row))


class Told(System):
    """Text-to-text: the sharer writes, and the receiver reads that in place of the passage.

    Args:
        pair: who writes and who reads.
        tokens: the longest text.
        draft: whether the sharer is asked the question, and drafts an answer; else it sums the passage up, not knowing
            the question.
    """

    def __init__(self, pair: Pair, tokens: int, *, draft: bool = False) -> None:
        self.pair, self.tokens, self.draft, self.messages = pair, tokens, draft, Messages(pair)

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], config: EvalConfig) -> Answers:
        """The receiver's answers, with the sharer's texts."""
        receiver = self.pair.model.receiver
        texts = self.messages.write([self._request(row) for row in rows], self.tokens)
        told = [with_passage(_bare(row), text) for row, text in zip(rows, texts, strict=True)]
        tokens = receiver.encode(told)
        ids = receiver.generate(tokens, receiver.prefill(tokens, tokens.length - 1), **decoding(config))
        answers = read_answers(receiver.texts(ids), rows)
        answers.message = texts
        return answers

    def cost(self, row: Row, config: EvalConfig) -> Cost:
        """Both models' prefills and decoding."""
        result = passage_to_text(
            self.pair.model.receiver,
            self.pair.sharer,
            _bare(row),
            self._request(row),
            message_tokens=self.tokens,
            **arguments(row, config),
        )
        return text_cost(result)

    def _request(self, row: Row) -> Conversation:
        return passage_with_question(row) if self.draft else summary_request(_passage(row), self.tokens)


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
    if name in ("draft", "draft_deranged"):
        return HandedOver(pair, pair.model, "matched" if name == "draft" else "deranged", draft=config.draft_tokens)
    if name == "draft_text":
        return Told(pair, config.draft_tokens, draft=True)
    if name.startswith("summary_"):
        return Told(pair, int(name.removeprefix("summary_")))
    _, training = pair.with_fuser(config.fusers[name])
    return HandedOver(pair, training.model, "matched")


def drafts(pair: Pair, rows: Sequence[Row], tokens: int) -> list[Reading]:
    """What the asked sharer reads and writes, ``tokens`` of it at most; its cache is then in the store."""
    plans = [reading(pair.sharer.tokenizer, passage_with_question(row), RenderOptions()) for row in rows]
    written = pair.drafts.write([plan.ids for plan in plans], tokens)
    return [plan.followed_by(draft) for plan, draft in zip(plans, written, strict=True)]


def _handoff(pair: Pair, read: Reading) -> Handoff:
    """What ``sharer.read`` returns, from the store."""
    [entry] = pair.stores[1].get([read.ids])
    layers = [entry.layers[index] for index in range(pair.sharer.geometry.layers)]
    return Handoff.from_cache(pair.sharer.identity, torch.tensor(read.ids), torch.tensor(read.kept), layers)


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
