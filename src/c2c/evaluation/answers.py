"""Answers of one system: a record for each item of a batch, or the cost of one item from text to text."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from c2c.data.formats import Row
from c2c.data.prompts import choice_tokens, passage_with_question, response_tokens
from c2c.evaluation.config import THINKING_SYSTEMS, EvalConfig, EvaluationError, system_kind
from c2c.evaluation.metrics import exact, f1, read_letter
from c2c.evaluation.pair import Pair
from c2c.generation import GenerationResult, PrefilledPrompt
from c2c.handoff import Handoff
from c2c.messages import Conversation
from c2c.prefill import continued_logits
from c2c.prompting import RenderOptions
from c2c.systems import System, SystemOptions, make_system

# Drafts and thoughts are handed over as what the sharer has read, so that both systems share them.
_HANDED_OVER = {
    "draft": "matched",
    "draft_deranged": "deranged",
    "think": "matched",
    "think_deranged": "deranged",
    "think_filler": "matched",
    "think_zero": "matched",
}
_WITH_TEXT = ("reader", "summary", "draft_text")  # the receiver's own prompt holds the passage, or a text in its place

# seconds (all), first_token (seconds until the answer's first token), seconds of each stage, tokens (generated, by both
# models), bytes (that cross from one model to the other), memory (bytes on top of the weights)
Cost = dict[str, float]


class Answerer:
    """One system under evaluation; ``name`` is that of the system, or of a further fuser."""

    def __init__(self, name: str, pair: Pair, config: EvalConfig) -> None:
        self.name, self.kind, self.pair, self.config = name, system_kind(name), pair, config
        model = pair.with_fuser(config.fusers[name]) if name in config.fusers else pair.model
        longest = config.draft_tokens if name == "draft_text" else config.message_tokens
        options = SystemOptions(message_tokens=longest, adapter=config.adapter, seed=config.seed)
        system = "matched" if name in config.fusers else _HANDED_OVER.get(name, name)
        self.system: System = make_system(system, model, options)
        self.private = bool(pair.model.private)
        self._decoding = {"max_new_tokens": config.max_new_tokens, "do_sample": False}

    @torch.no_grad()
    def answer(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Answer items; returns a record for each, without its id."""
        # prompts that hold a generated text are not worth keeping
        keeps = self.kind not in ("text", "text_published", "summary", "draft_text")
        with self.pair.stores(prefills=keeps):
            options = RenderOptions(answer_prefix=rows[0].answer_prefix)
            messages, context = [self._messages(row) for row in rows], self._context(rows)
            if self.config.mode in ("generate", "answers"):
                results = self.system.generate(messages, context, options=options, **self._decoding)
                return [_score(result, row, self.config.mode) for result, row in zip(results, rows, strict=True)]
            prompt = self.system.prefill(messages, context, options=options)
            return _losses(prompt, rows) if self.config.mode == "nll" else _choices(prompt, rows)

    @torch.no_grad()
    def measure(self, row: Row) -> Cost:
        """Answer one item without any store, and return its cost, with the peak of memory where it is reported."""
        device = self.pair.receiver.device
        before = _memory(device)
        read = self._read_cost if self.name in ("draft", "think") else None
        cost = read(row) if read else self._cost(row, self._context([row]))
        peak = _memory(device, peak=True)
        return cost if before is None or peak is None else cost | {"memory": max(0, peak - before)}

    def _cost(self, row: Row, context: Any) -> Cost:
        options = RenderOptions(answer_prefix=row.answer_prefix)
        (result,) = self.system.generate([self._messages(row)], context, options=options, **self._decoding)
        return _cost(result, "sharer_prefill" if self.name == "sharer" else "receiver_prefill")

    def _read_cost(self, row: Row) -> Cost:
        """Measure the sharer's reading and its draft or thoughts apart, and add them to the answer from its handoff."""
        sharer, asked = self.pair.sharer, passage_with_question(row)
        began = time.perf_counter()
        read = sharer.read(asked)
        prefilled = time.perf_counter()
        draft = sharer.read(asked, reuse=read, **self._more())
        drafted = time.perf_counter()
        cost = self._cost(row, [draft])
        cost["tokens"] += len(draft.ids) - len(read.ids)
        cost["sharer_prefill"] += prefilled - began
        cost["sharer_decode"] = drafted - prefilled
        return cost | {name: cost[name] + drafted - began for name in ("seconds", "first_token")}

    def _messages(self, row: Row) -> Conversation:
        """Return what the system's answering model is asked.

        With private context the question is the bare one for a sharer, and for a receiver whose prompt holds a text,
        together with what the receiver alone has read.

        Raises:
            EvaluationError: one prompt would have to serve a sharer and a receiver that have read different things.
        """
        if not self.private or self.kind not in ("sharer", *_WITH_TEXT):
            return row.messages
        if self.kind == "draft_text" and row.known:
            raise EvaluationError("draft_text can't be asked for rows with 'known': its sharer would read it too.")
        question = row.question if self.kind == "sharer" else f"{row.known} {row.question}".strip()
        return [*row.messages[:-1], {"role": "user", "content": f"Question: {question}"}]

    def _context(self, rows: Sequence[Row]) -> list[Conversation] | list[Handoff] | None:
        """Return what only the sharer has read: passages, or handoffs of passage, question and draft or thoughts."""
        if not self.private:
            return None
        if self.name in _HANDED_OVER:
            sharer, more = self.pair.sharer, self._more()
            asked = [passage_with_question(row) for row in rows]
            if drafted := more.get("draft_tokens"):  # all at once; stored for the next line
                sharer.answer(asked, max_new_tokens=drafted, do_sample=False)
            handoffs = [sharer.read(conversation, **more) for conversation in asked]
            zeros = self.name == "think_zero"
            return [handoff.zeros_like(handoff.thoughts) if zeros else handoff for handoff in handoffs]
        return [row.sharer_messages or [] for row in rows]

    def _more(self) -> dict[str, Any]:
        """Return what the sharer does beyond reading: it drafts or thinks."""
        if self.name not in THINKING_SYSTEMS:
            return {"draft_tokens": self.config.draft_tokens}
        return {"think": self.config.think, "realign": "filler" if self.name == "think_filler" else self.config.realign}


def describe(row: Row) -> dict[str, Any]:
    """Return what a reader needs to judge an answer to an item: its prompt and what is right, as in the data.

    Of multiple choice ``answer`` is the index of the right one of ``choices``, else the first of ``references``; where
    there are none, it is the text whose loss is measured.
    """
    facts: dict[str, Any] = {"id": row.id, "prompt": row.messages[-1]["content"]}
    if row.choices:
        right = row.options[row.answer]
        return facts | {"choices": list(row.options), "references": [right], "answer": row.answer}
    return facts | {"references": list(row.references), "answer": row.references[0] if row.references else row.response}


def compare(text: str, row: Row) -> dict[str, float]:
    """Compare a text with the references of an item."""
    return {"f1": f1(text, row.references), "exact": exact(text, row.references)}


def _score(result: GenerationResult, row: Row, mode: str) -> dict[str, Any]:
    """Score a generated answer: the letter of an option, or how close it is to the references."""
    text, message = result.text, result.message
    record = {"text": text} | ({} if message is None else {"message": message.text})
    if mode == "generate":
        return {"chosen": read_letter(row.answer_prefix + text, len(row.choices))} | record
    return record | compare(text, row)


def _choices(prompt: PrefilledPrompt, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Compare the options' tokens at the place where the answer names one."""
    tokenizer = prompt.model.tokenizer
    named = [choice_tokens(tokenizer, row.lead, row.choices) for row in rows]
    spelled = [tokenizer.encode(row.lead + row.choices[0], add_special_tokens=False) for row in rows]
    logits = _continued(prompt, [ids[:at] for ids, (at, _) in zip(spelled, named, strict=True)])
    scores = [logits[index, at, ids].float().log_softmax(-1).tolist() for index, (at, ids) in enumerate(named)]
    records: list[dict[str, Any]] = [
        {"chosen": int(np.argmax(one)), "scores": [round(value, 4) for value in one]} for one in scores
    ]
    for record, message in zip(records, prompt.messages, strict=False):
        record["message"] = message.text
    return records


def _losses(prompt: PrefilledPrompt, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Measure the mean loss of the reference's tokens, in nats."""
    responses = [response_tokens(prompt.model.tokenizer, row) for row in rows]
    likelihoods, _ = score_tokens(prompt, responses)
    return [{"nll": -total / len(ids)} for total, ids in zip(likelihoods.tolist(), responses, strict=True)]


def score_tokens(prompt: PrefilledPrompt, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Score a text after each prompt, whose cache is used up.

    Args:
        prompt: prefilled to the last token or before.
        texts: token ids for each row, at least one.

    Returns:
        The log-likelihood of each text, ``[rows]``, and whether all its tokens are the likeliest, ``[rows]``.
    """
    targets = _right_pad(texts, -1).to(prompt.model.device)
    logits, real = _continued(prompt, [text[:-1] for text in texts]).float(), targets >= 0
    tokens = logits.log_softmax(-1).gather(2, targets.clamp_min(0).unsqueeze(2)).squeeze(2)
    return (tokens * real).sum(1), ((logits.argmax(-1) == targets) | ~real).all(1)


def _continued(prompt: PrefilledPrompt, continuations: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits after each prompt and after each token that follows it, ``[rows, 1 + longest, vocab]``."""
    model = prompt.model
    tokens = prompt.tokens.to(model.device)
    cache = model.prefill(tokens, tokens.length - 1, prompt.cache)
    ids = _right_pad(continuations, -1).to(model.device)
    return continued_logits(model.model, tokens, ids.clamp_min(0), ids >= 0, cache)


def _right_pad(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=filler)


def _cost(result: GenerationResult, prefill: str) -> Cost:
    """Return the cost of one answer; ``prefill`` is the stage that the prefill of a model alone counts as."""
    first, total, message = result.seconds_to_first_token, result.seconds_total, result.message
    cost: Cost = {"seconds": total, "first_token": first, "tokens": result.new_tokens}
    if message is not None:
        return cost | {
            "sharer_prefill": message.seconds_to_first_token,
            "sharer_decode": message.seconds_total - message.seconds_to_first_token,
            "receiver_prefill": first - message.seconds_total,
            "decode": total - first,
            "tokens": result.new_tokens + message.new_tokens,
            "bytes": len(message.text.encode()),
        }
    if result.report is None:
        return cost | {prefill: first, "decode": total - first, "bytes": 0}
    seconds = {"sharer_prefill": 0.0, "receiver_prefill": 0.0, "fuse": 0.0} | result.report.seconds
    seconds["receiver_prefill"] += seconds.pop("first_token")  # reads the last prompt token
    return cost | seconds | {"bytes": result.report.sharer_bytes}


def _memory(device: torch.device, *, peak: bool = False) -> int | None:
    """Return the bytes in use, or their peak since the last call without ``peak``; None where it is not reported."""
    if device.type == "cuda":
        if peak:
            return torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        if not peak:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the highest resident size
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
