"""Cost of an answer, measured one item at a time from text to text, as a user would run it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import torch

from c2c.data.formats import Row
from c2c.data.prompts import passage_with_question
from c2c.evaluation.answers import Answerer
from c2c.generation import GenerationResult
from c2c.prompting import RenderOptions

# seconds (all), first_token (seconds until the answer's first token), seconds of each stage, tokens (generated, by both
# models), bytes (that cross from one model to the other), memory (bytes on top of the weights)
Cost = dict[str, float]


def measure(answerer: Answerer, row: Row) -> Cost:
    """Answer one item without any store, and return its cost, with the peak of memory where the system reports it."""
    device = answerer.pair.receiver.device
    before = _memory(device)
    if answerer.name == "draft":
        cost = _measure_draft(answerer, row)
    else:
        cost = _measure(answerer, row, row.sharer_messages if answerer.private else None)
    peak = _memory(device, peak=True)
    return cost if before is None or peak is None else cost | {"memory": max(0, peak - before)}


def _measure(answerer: Answerer, row: Row, context: Any) -> Cost:
    options = RenderOptions(answer_prefix=row.answer_prefix)
    result = answerer.system.generate(answerer.messages(row), context, options=options, **answerer.decoding)
    return _cost(result, "sharer_prefill" if answerer.name == "sharer" else "receiver_prefill")


def _measure_draft(answerer: Answerer, row: Row) -> Cost:
    """Measure the sharer's reading and drafting apart, and add them to the answer from its handoff."""
    sharer, asked = answerer.pair.sharer, passage_with_question(row)
    began = time.perf_counter()
    read = sharer.read(asked)
    prefilled = time.perf_counter()
    draft = sharer.read(asked, draft_tokens=answerer.config.draft_tokens, reuse=read)
    drafted = time.perf_counter()
    cost = _measure(answerer, row, draft)
    before = {
        "seconds": drafted - began,
        "first_token": drafted - began,
        "sharer_prefill": prefilled - began,
        "sharer_decode": drafted - prefilled,
        "tokens": len(draft.ids) - len(read.ids),
    }
    return cost | {name: cost.get(name, 0) + value for name, value in before.items()}


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
