"""What an answer costs, measured one item at a time, from text to text, as a user would run it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from c2c.data.formats import Row
from c2c.evaluation.config import EvalConfig
from c2c.generation import GenerationResult
from c2c.prompting import RenderOptions
from c2c.systems.text_to_text import TextToTextResult

# seconds (all), first_token (seconds until the first token of the answer), seconds of each stage, tokens (generated, by
# both models), bytes (that cross from one model to the other), memory (bytes on top of the weights)
Cost = dict[str, float]
STAGES = ("sharer_prefill", "sharer_decode", "receiver_prefill", "fuse", "decode")


def cost_of(result: GenerationResult, prefill: str = "receiver_prefill") -> Cost:
    """What one answer took.

    Args:
        result: the answer, fused or of one model alone.
        prefill: for a model alone, what its prefill is counted as.
    """
    first = result.seconds_to_first_token
    if result.report is None:
        stages: Cost = {prefill: first, "decode": result.seconds_total - first, "bytes": 0}
        return _total(result) | stages
    seconds = result.report.seconds
    stages = {
        "sharer_prefill": seconds.get("sharer_prefill", 0.0),
        # reading the last prompt token belongs to the receiver's prefill
        "receiver_prefill": seconds.get("receiver_prefill", 0.0) + seconds["first_token"],
        "fuse": seconds.get("fuse", 0.0),
        "decode": seconds["decode"],
        "bytes": result.report.sharer_bytes,
    }
    return _total(result) | stages


def text_cost(result: TextToTextResult) -> Cost:
    """What text-to-text took; the answer's times include the message's."""
    answer, message = result.answer, result.message
    stages = {
        "sharer_prefill": message.seconds_to_first_token,
        "sharer_decode": message.seconds_total - message.seconds_to_first_token,
        "receiver_prefill": answer.seconds_to_first_token - message.seconds_total,
        "decode": answer.seconds_total - answer.seconds_to_first_token,
    }
    sent = {"tokens": answer.new_tokens + message.new_tokens, "bytes": len(message.text.encode())}
    return _total(answer) | stages | sent


def with_memory(measure: Callable[[], Cost], device: torch.device) -> Cost:
    """Add the most memory that was needed on top of what was in use before, where the system can tell."""
    before = _start_peak(device)
    cost = measure()
    peak = _peak(device)
    return cost | ({"memory": max(0, peak - before)} if peak is not None and before is not None else {})


def arguments(row: Row, config: EvalConfig) -> dict[str, Any]:
    """How one item is put to a model."""
    return {
        "options": RenderOptions(answer_prefix=row.answer_prefix),
        "max_new_tokens": config.max_new_tokens,
        "do_sample": False,
    }


def _total(result: GenerationResult) -> Cost:
    return {
        "seconds": result.seconds_total,
        "first_token": result.seconds_to_first_token,
        "tokens": result.new_tokens,
    }


def _start_peak(device: torch.device) -> int | None:
    """Forget the highest use so far; the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest resident size starts anew
    except OSError:
        return None
    return _status("VmRSS")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None
