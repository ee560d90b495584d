"""What an answer costs, measured one item at a time, from text to text, as a user would run it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from c2c.baselines.text_to_text import TextToTextResult
from c2c.evaluation.config import EvalConfig
from c2c.language_model import LanguageModel
from c2c.model import C2CModel
from c2c.prompting import RenderOptions
from c2c.report import GenerationResult
from c2c.training.rows import Row

# seconds (all), first_token (seconds until the first token of the answer), seconds of each stage, tokens (generated, by
# both models), bytes (that cross from one model to the other), memory (bytes on top of the weights)
Cost = dict[str, float]
STAGES = ("sharer_prefill", "sharer_decode", "receiver_prefill", "fuse", "decode")


def alone_cost(model: LanguageModel, row: Row, config: EvalConfig, stage: str) -> Cost:
    """One model without the other; its prefill is counted under ``stage``."""
    result = model.answer(row.messages, **_arguments(row, config))
    first = result.seconds_to_first_token
    return _total(result) | {stage: first, "decode": result.seconds_total - first, "bytes": 0}


def fused_cost(model: C2CModel, row: Row, config: EvalConfig) -> Cost:
    """Both prefills, fusion and decoding."""
    result = model.generate(row.messages, **_arguments(row, config))
    seconds = result.report.seconds
    # reading the last prompt token belongs to the receiver's prefill
    stages = {
        "sharer_prefill": seconds["sharer_prefill"],
        "receiver_prefill": seconds["receiver_prefill"] + seconds["first_token"],
        "fuse": seconds["fuse"],
        "decode": seconds["decode"],
    }
    return _total(result) | stages | {"bytes": result.report.sharer_bytes}


def text_cost(result: TextToTextResult) -> Cost:
    """The sharer's prefill and decoding, then the receiver's."""
    answer, message = result.answer, result.message
    before = message.seconds_total
    stages = {
        "sharer_prefill": message.seconds_to_first_token,
        "sharer_decode": before - message.seconds_to_first_token,
        "receiver_prefill": answer.seconds_to_first_token - before,
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


def _arguments(row: Row, config: EvalConfig) -> dict[str, Any]:
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
