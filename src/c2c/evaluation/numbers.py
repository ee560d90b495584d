"""Accuracies, gains and their intervals, from right and wrong per item."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
DRAWS = 10_000
# Differences to matched, by their letter.
GAINS = {"G": "receiver", "P": "deranged", "Z": "zero", "S": "sharer", "T": "text", "A": "adapter"}


def summarise(
    scores: Mapping[str, Sequence[float]], seed: int, *, percent: bool = True, key: str = "accuracy"
) -> dict[str, Any]:
    """All numbers of a table.

    Args:
        scores: for each system one number per item, the same items in the same order: 1 or 0, or a loss.
        seed: of the bootstrap.
        percent: scores are from 0 to 1, right or wrong by default, and are reported in percent and points; otherwise
            means are reported as they are.
        key: what scores in percent are called.

    Returns:
        ``n``; ``systems`` with the accuracy (or mean) of each and its 95 % interval; ``G`` = matched - receiver,
        ``P`` = matched - deranged and the other :data:`GAINS` with intervals from a paired bootstrap over items, as
        far as these systems are there; ``D`` = deranged - receiver, what the fuser does to the receiver whatever the
        message says; for accuracies also the share of answers mended and spoiled, McNemar's test,
        and the part of the gap between receiver and sharer that is recovered.
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    n = len(next(iter(arrays.values())))
    draws = np.random.default_rng(seed).integers(0, n, (DRAWS, n))
    scale, key = (100.0, key) if percent else (1.0, "mean")
    unit = {"accuracy": "percent", "mean": "nats per token"}.get(key, f"percent {key}")
    result: dict[str, Any] = {"n": n, "unit": unit, "systems": {}}
    for name, values in arrays.items():
        result["systems"][name] = {key: _round(scale * values.mean()), "ci95": _interval(values, draws, scale)}
    differences = {name: ("matched", other) for name, other in GAINS.items()} | {"D": ("deranged", "receiver")}
    for name, (first, other) in differences.items():
        if first in arrays and other in arrays:
            difference = arrays[first] - arrays[other]
            result[name] = _round(scale * difference.mean())
            result[f"{name}_ci95"] = _interval(difference, draws, scale)
    if percent and "matched" in arrays and "receiver" in arrays:
        if key != "f1":
            result |= _changes(arrays["receiver"], arrays["matched"])
        if "sharer" in arrays:
            gap = float(arrays["sharer"].mean() - arrays["receiver"].mean())
            gained = float(arrays["matched"].mean() - arrays["receiver"].mean())
            result["gap_recovered"] = _round(100 * gained / gap) if gap > 0 else None
    return result


def mean_costs(measured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of what answers cost, and how many were measured (``timed``)."""
    names = [name for name in measured[0] if name != "id"]
    means = {name: _significant(float(np.mean([cost[name] for cost in measured]))) for name in names}
    return means | {"timed": len(measured)}


def speed(costs: Mapping[str, Sequence[Mapping[str, Any]]], seed: int) -> dict[str, Any]:
    """How many times as long each system takes as matched, over the same items in the same run.

    Args:
        costs: per system what each timed item took.
        seed: of the bootstrap over items.

    Returns:
        ``speed``: system to ``ratio`` of all seconds and its 95 % interval; empty where nothing was timed.
    """
    seconds = {name: np.array([cost["seconds"] for cost in costs[name]]) for name in costs if costs[name]}
    ours = seconds.pop("matched", None)
    if ours is None or not seconds:
        return {}
    draws = np.random.default_rng(seed).integers(0, len(ours), (DRAWS, len(ours)))
    ratios = {}
    for name, theirs in seconds.items():
        drawn = theirs[draws].sum(1) / ours[draws].sum(1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        ratios[name] = {"ratio": _round(theirs.sum() / ours.sum()), "ci95": [_round(low), _round(high)]}
    return {"speed": ratios}


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided exact p-value for paired answers, from how many items only one of two systems has right."""
    n, k = first_only + second_only, min(first_only, second_only)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(k + 1)) * 2
    return min(1.0, tail / 2**n) if n < 1000 else min(1.0, math.exp(math.log(tail) - n * math.log(2)))


def _changes(before: Values, after: Values) -> dict[str, Any]:
    mended, spoiled = int(((after == 1) & (before == 0)).sum()), int(((after == 0) & (before == 1)).sum())
    n = len(before)
    return {
        "mended": _round(100 * mended / n),
        "spoiled": _round(100 * spoiled / n),
        "mcnemar_p": mcnemar(mended, spoiled),
    }


def _interval(values: Values, draws: NDArray[np.int64], scale: float) -> list[float]:
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return [_round(scale * low), _round(scale * high)]


def _round(value: float) -> float:
    return round(float(value), 3)


def _significant(value: float) -> float:
    return float(f"{value:.5g}")
