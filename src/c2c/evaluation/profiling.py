"""Cost of an answer, measured one item at a time from text to text, as a user would run it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import torch

from c2c.data.formats import Row
from c2c.data.prompts import passage_with_question
from c2c.evaluation.answers import Answerer, decoding
from c2c.generation import GenerationResult
from c2c.prompting import RenderOptions

# seconds (all), first_token (seconds until the answer's first token), seconds of each stage, tokens (generated, by both
# models), bytes (that cross from one model to the other), memory (bytes on top of the weights)
Cost = dict[str, float]
STAGES = ("sharer_prefill", "sharer_decode", "receiver_prefill", "fuse", "decode")


def measure(answerer: Answerer, row: Row) -> Cost:
    """Answer one item without any store, and return its cost, with the peak of memory where the system reports it."""
    device = answerer.pair.receiver.device
    before = _reset_peak(device)
    cost = _measure(answerer, row)
    peak = _peak(device)
    return cost | ({"memory": max(0, peak - before)} if peak is not None and before is not None else {})


def _measure(answerer: Answerer, row: Row) -> Cost:
    config, context = answerer.config, row.sharer_messages if answerer.private else None
    arguments: dict[str, Any] = {"options": RenderOptions(answer_prefix=row.answer_prefix), **decoding(config)}
    if answerer.name != "draft":
        result = answerer.system.generate(answerer.messages(row), context, **arguments)
        return _cost(result, "sharer_prefill" if answerer.name == "sharer" else "receiver_prefill")
    sharer, asked = answerer.pair.sharer, passage_with_question(row)
    began = time.perf_counter()
    read = sharer.read(asked)
    prefilled = time.perf_counter()
    draft = sharer.read(asked, draft_tokens=config.draft_tokens, reuse=read)
    drafted = time.perf_counter()
    cost = _cost(answerer.system.generate(answerer.messages(row), draft, **arguments))
    before = {
        "seconds": drafted - began,
        "first_token": drafted - began,
        "sharer_prefill": prefilled - began,
        "sharer_decode": drafted - prefilled,
        "tokens": len(draft.ids) - len(read.ids),
    }
    return cost | {name: cost.get(name, 0) + value for name, value in before.items()}


def _cost(result: GenerationResult, prefill: str = "receiver_prefill") -> Cost:
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
    seconds = result.report.seconds
    return cost | {
        "sharer_prefill": seconds.get("sharer_prefill", 0.0),
        # the last prompt token is read with the first step of decoding
        "receiver_prefill": seconds.get("receiver_prefill", 0.0) + seconds["first_token"],
        "fuse": seconds.get("fuse", 0.0),
        "decode": seconds["decode"],
        "bytes": result.report.sharer_bytes,
    }


def _reset_peak(device: torch.device) -> int | None:
    """Reset the peak of memory and return the bytes in use now; None where the system does not report them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the highest resident size
    except OSError:
        return None
    return _process_memory("VmRSS")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _process_memory("VmHWM")


def _process_memory(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None
