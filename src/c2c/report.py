"""What happened: a report on every fusion, and the result of every answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """Seconds per stage, without waiting for the device while the work is under way.

    On CUDA events are recorded and read when the figures are asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the enclosed work under ``name``; several visits add up."""
        if self._cuda:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            stop.record()
            self._events.append((name, start, stop))
        else:
            began = time.perf_counter()
            yield
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per stage. On CUDA this waits for the device."""
        for name, start, stop in self._events:
            stop.synchronize()
            self.add(name, start.elapsed_time(stop) / 1000)
        self._events.clear()
        return dict(self._seconds)


@dataclass
class FusionReport:
    """What was fused and at what cost. One report per call, for the whole batch.

    Attributes:
        prompt_tokens: real receiver tokens, summed over the batch.
        fused_tokens: receiver positions that took something from a sharer.
        skipped_tokens: the other positions, by reason.
        fused_layers: receiver layers that were fused, over all sharers.
        skipped_layers: receiver layers that were not, by reason.
        memory_slots: entries of private context in the receiver's cache, summed over the batch.
        sharer_bytes: bytes of the sharers' cache entries that the fusers read.
        trained: whether every fuser has been trained.
        notes: accepted mismatches and other things to know.
    """

    prompt_tokens: int = 0
    fused_tokens: int = 0
    skipped_tokens: dict[str, int] = field(default_factory=dict)
    fused_layers: list[int] = field(default_factory=list)
    skipped_layers: dict[int, str] = field(default_factory=dict)
    memory_slots: int = 0
    sharer_bytes: int = 0
    trained: bool = True
    notes: list[str] = field(default_factory=list)
    gate_values: list[Tensor] = field(default_factory=list, repr=False)
    stopwatch: Stopwatch | None = field(default=None, repr=False)

    @property
    def gate_openness(self) -> float | None:
        """Mean of all layer gates, 0 closed to 1 open; None if nothing was fused. Reads from the device."""
        if not self.gate_values:
            return None
        return float(torch.cat([gate.float().cpu().flatten() for gate in self.gate_values]).mean())

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per stage: ``sharer_prefill``, ``receiver_prefill``, ``fuse``, ``first_token``, ``decode``."""
        return self.stopwatch.seconds if self.stopwatch else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "fused_tokens": self.fused_tokens,
            "skipped_tokens": self.skipped_tokens,
            "fused_layers": self.fused_layers,
            "skipped_layers": {str(layer): reason for layer, reason in self.skipped_layers.items()},
            "gate_openness": self.gate_openness,
            "memory_slots": self.memory_slots,
            "sharer_bytes": self.sharer_bytes,
            "seconds": self.seconds,
            "trained": self.trained,
            "notes": self.notes,
        }


@dataclass
class GenerationResult:
    """One answer.

    Attributes:
        text: the answer, special tokens removed.
        ids: its token ids, ``[new]``, the end token included, padding not.
        prompt_tokens: tokens that the receiver read.
        report: what was fused; shared by all answers of one call. None for a model that answered alone.
        seconds_to_first_token: from the start of the call to the first new token.
        seconds_total: of the whole call.
    """

    text: str
    ids: Tensor
    prompt_tokens: int
    report: FusionReport | None
    seconds_to_first_token: float
    seconds_total: float

    @property
    def new_tokens(self) -> int:
        """Number of generated tokens."""
        return self.ids.numel()

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "text": self.text,
            "new_tokens": self.new_tokens,
            "prompt_tokens": self.prompt_tokens,
            "seconds_to_first_token": round(self.seconds_to_first_token, 4),
            "seconds_total": round(self.seconds_total, 4),
            "report": self.report.to_dict() if self.report else None,
        }
