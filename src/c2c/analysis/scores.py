"""Right and wrong answers from a prepared cache, and accuracies with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Cache

from c2c import kv_cache
from c2c.evaluation.statistics import summarise
from c2c.prefill import continued_logits
from c2c.training.shared_context import SharedBatch, SharedContextObjective

Right = list[float]


@torch.no_grad()
def right_answers(training: SharedContextObjective, batch: SharedBatch, cache: Cache) -> Right:
    """1 for each item whose right option gets the largest logit where the answer names it, else 0.

    Args:
        training: whose receiver answers.
        batch: the items.
        cache: of all prompt tokens but the last; stays as it is.
    """
    width = 1 + max(example.decisive for example in batch.examples)
    read = batch.responses[:, :width][:, :-1]
    own = kv_cache.from_layers(kv_cache.layers(cache))  # reading on replaces its tensors and not the given cache's
    model = training.model.receiver.model
    logits = continued_logits(model, batch.receiver, read.clamp_min(0), read != -100, own)
    return [
        float(int(logits[row, example.decisive, example.choice_ids].argmax()) == example.row.answer)
        for row, example in enumerate(batch.examples)
    ]


def accuracies(right: Mapping[str, Sequence[float]], seed: int) -> dict[str, dict[str, Any]]:
    """Each system's ``accuracy`` in percent and its 95 % bootstrap interval ``ci95``."""
    systems: dict[str, dict[str, Any]] = summarise(right, seed)["systems"]
    return systems


def difference(first: Sequence[float], second: Sequence[float], seed: int) -> dict[str, Any]:
    """``points`` by which the first is better on the same items, and ``ci95``, their paired bootstrap interval."""
    result = summarise({"matched": first, "receiver": second}, seed)
    return {"points": result["G"], "ci95": result["G_ci95"]}
