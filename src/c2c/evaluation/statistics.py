"""Accuracies, differences and their 95 % intervals, from the scores of every item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap

from c2c.evaluation.config import DIFFERENCES

Values = NDArray[np.float64]


def summarise(
    scores: Mapping[str, Sequence[float]], seed: int, *, percent: bool = True, key: str = "accuracy"
) -> dict[str, Any]:
    """Compute all numbers of a table.

    Args:
        scores: for each system one number per item, the same items in the same order: 1 or 0, or a loss.
        seed: of the bootstrap.
        percent: scores are from 0 to 1 and are reported in percent and points; otherwise means are reported.
        key: name of the scores in percent.

    Returns:
        ``n``; ``systems`` with the accuracy (or mean) of each and its 95 % interval; ``G`` = matched - receiver,
        ``P`` = matched - deranged and the other :data:`~c2c.evaluation.config.DIFFERENCES` with intervals from a paired
        bootstrap over items, as far as these systems are there; for accuracies also the share of answers mended and
        spoiled, McNemar's test, and the part of the gap between receiver and sharer that is recovered.
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    scale, key = (100.0, key) if percent else (1.0, "mean")
    result: dict[str, Any] = {
        "n": len(next(iter(arrays.values()))),
        "unit": {"accuracy": "percent", "mean": "nats per token"}.get(key, f"percent {key}"),
        "systems": {
            name: {key: _round(scale * values.mean()), "ci95": _interval((scale * values,), np.mean, seed)}
            for name, values in arrays.items()
        },
    }
    for letter, (first, other) in DIFFERENCES.items():
        if first in arrays and other in arrays:
            difference = scale * (arrays[first] - arrays[other])
            interval = _interval((difference,), np.mean, seed)
            result |= {letter: _round(difference.mean()), f"{letter}_ci95": interval}
    if percent and "matched" in arrays and "receiver" in arrays:
        gain = arrays["matched"] - arrays["receiver"]
        if key != "f1":
            mended, spoiled = int((gain == 1).sum()), int((gain == -1).sum())
            result |= {name: _round(100 * n / len(gain)) for name, n in (("mended", mended), ("spoiled", spoiled))}
            result["mcnemar_p"] = mcnemar(mended, spoiled)
        if "sharer" in arrays:
            gap = float(arrays["sharer"].mean() - arrays["receiver"].mean())
            result["gap_recovered"] = _round(100 * float(gain.mean()) / gap) if gap > 0 else None
    return result


def mean_costs(measured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return means of the costs of answers, to five digits, and how many were measured (``timed``)."""
    names = [name for name in measured[0] if name != "id"]
    means = {name: float(f"{np.mean([cost[name] for cost in measured]):.5g}") for name in names}
    return means | {"timed": len(measured)}


def speed(costs: Mapping[str, Sequence[Mapping[str, Any]]], seed: int) -> dict[str, Any]:
    """Compute how many times as long each system takes as matched, over the same items in the same run.

    Args:
        costs: per system the costs of each timed item.
        seed: of the bootstrap over items.

    Returns:
        ``speed``: system to ``ratio`` of all seconds and its 95 % interval; empty where nothing was timed.
    """
    seconds = {name: np.array([cost["seconds"] for cost in costs[name]]) for name in costs if costs[name]}
    ours = seconds.pop("matched", None)
    if ours is None or not seconds:
        return {}

    def ratio(theirs: Values, ours: Values, axis: int = -1) -> Any:
        return theirs.sum(axis) / ours.sum(axis)

    ratios = {
        name: {"ratio": _round(ratio(theirs, ours)), "ci95": _interval((theirs, ours), ratio, seed)}
        for name, theirs in seconds.items()
    }
    return {"speed": ratios}


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the two-sided exact p-value of paired answers, from how many items only one of two systems has right."""
    n = first_only + second_only
    return float(binomtest(first_only, n).pvalue) if n else 1.0


def _interval(samples: tuple[Values, ...], statistic: Callable[..., Any], seed: int) -> list[float]:
    """Return the 95 % percentile interval of a statistic, by a paired bootstrap over items."""
    if len(samples[0]) < 2:  # which the bootstrap refuses
        return [_round(statistic(*samples))] * 2
    rng = np.random.default_rng(seed)
    draw = partial(bootstrap, n_resamples=10_000, batch=1000, method="percentile", rng=rng)
    found = draw(samples, statistic, paired=len(samples) > 1).confidence_interval
    return [_round(found.low), _round(found.high)]


def _round(value: float) -> float:
    return round(float(value), 3)
