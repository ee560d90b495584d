"""Which layers carry the message: accuracy when only some of them are fused.

Cache-to-Cache (ICLR 2026, arXiv:2510.03215) enriches one layer at a time in an oracle and finds that most layers alone
do harm, and that the best few do better than all. Here a trained fuser's single layers, keys or values alone, and all
but a third of the layers are fused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache

from c2c import kv_cache
from c2c.analysis.drawing import done, dots, legend, level, panels
from c2c.analysis.inputs import Subject
from c2c.analysis.record import check_output, publish
from c2c.analysis.scores import Right, accuracies, difference, right_answers
from c2c.analysis.settings import Settings
from c2c.reporting.canvas import PAINT, Plot
from c2c.training.shared_context import SharedBatch, SharedContextObjective
from c2c.utils import OnProgress

NAME = "layers"
_THIRDS = ("early", "middle", "late")


def mixed(clean: Cache, fused: Cache, keys: Sequence[int], values: Sequence[int]) -> DynamicCache:
    """A cache with fused keys in some layers and fused values in some, and clean ones elsewhere; nothing is copied.

    Layers are fused from the clean cache and independently of each other, so this is what fusing only these gives.
    """
    pairs = zip(kv_cache.layers(clean), kv_cache.layers(fused), strict=True)
    return kv_cache.from_layers(
        (new[0] if layer in keys else own[0], new[1] if layer in values else own[1])
        for layer, (own, new) in enumerate(pairs)
    )


def thirds(layers: Sequence[int]) -> dict[str, list[int]]:
    """Fused layers in three runs, ``early``, ``middle`` and ``late``; fewer where there are fewer than three layers."""
    chunks = torch.tensor(list(layers)).tensor_split(len(_THIRDS))
    return {name: chunk.tolist() for name, chunk in zip(_THIRDS, chunks, strict=True) if len(chunk)}


def variants(layers: Sequence[int]) -> dict[str, tuple[list[int], list[int]]]:
    """What is compared: name to the layers whose keys are fused and those whose values are."""
    every = list(layers)
    result = {"matched": (every, every), "keys only": (every, []), "values only": ([], every)}
    for name, third in thirds(every).items():
        rest = [layer for layer in every if layer not in third]
        result[f"without {name} third"] = (rest, rest)
    return result | {_single(layer): ([layer], [layer]) for layer in every}


def measure_layers(settings: Settings, progress: OnProgress | None = None) -> dict[str, Any]:
    """Accuracy with all layers fused, only keys, only values, all but a third of the layers, and each layer alone.

    Args:
        settings: what to measure on.
        progress: called with (stage, items done, items).

    Returns:
        ``systems``: ``receiver``, ``matched``, ``deranged``, ``zero``, ``keys only``, ``values only`` and ``without
        ... third``, each with ``accuracy`` (percent) and ``ci95``; ``single``: the same for each layer alone, with
        ``layer`` and ``gain`` over the receiver (``points``, ``ci95``); ``thirds``: which layers they are; ``G`` and
        ``P``: matched - receiver and matched - deranged.

    Raises:
        AnalysisError: see :class:`~c2c.analysis.inputs.Subject`.
    """
    check_output(settings.output_dir)
    subject = Subject.open(settings)
    fused_layers = subject.fuser.config.fused_layers
    right: dict[str, Right] = {}
    for batch in subject.batches("answering", progress):
        for name, answers in _answers(subject.training, batch, fused_layers).items():
            right.setdefault(name, []).extend(answers)
    scores, seed = accuracies(right, settings.seed), settings.seed
    singles = [_single(layer) for layer in fused_layers]
    numbers = {
        "systems": {name: score for name, score in scores.items() if name not in singles},
        "single": [
            {"layer": layer} | scores[name] | {"gain": difference(right[name], right["receiver"], seed)}
            for layer, name in zip(fused_layers, singles, strict=True)
        ],
        "thirds": thirds(fused_layers),
        "G": difference(right["matched"], right["receiver"], seed),
        "P": difference(right["matched"], right["deranged"], seed),
    } | subject.facts()
    return publish(NAME, numbers, lambda: _draw(numbers), settings.output_dir)


@torch.no_grad()
def _answers(training: SharedContextObjective, batch: SharedBatch, fused_layers: Sequence[int]) -> dict[str, Right]:
    clean, fused = batch.receiver_cache, training.fused(batch, "matched")
    caches: dict[str, Cache] = {"receiver": clean}
    caches |= {name: mixed(clean, fused, *chosen) for name, chosen in variants(fused_layers).items()}
    caches["deranged"], caches["zero"] = training.fused(batch, "deranged"), training.fused(batch, "zero")
    return {name: right_answers(training, batch, cache) for name, cache in caches.items()}


def _single(layer: int) -> str:
    return f"layer {layer}"


def _draw(numbers: Mapping[str, Any]) -> Plot:
    systems, single = numbers["systems"], numbers["single"]
    groups = {name: score for name, score in systems.items() if name != "zero"}
    heights = [170.0, 24.0 * len(groups)]
    figure, (alone, parts) = panels(["One layer fused", "Parts of the cache fused"], heights, left=136, right=44)
    wide = alone.get_position()
    alone.set_position((54 / 420, wide.y0, 352 / 420, wide.height))
    at = [one["layer"] for one in single]
    values = [one["accuracy"] for one in single]
    below = [one["accuracy"] - one["ci95"][0] for one in single]
    above = [one["ci95"][1] - one["accuracy"] for one in single]
    alone.errorbar(
        at, values, [below, above], fmt="o", ms=4, color=PAINT["other"], elinewidth=1.2, label="this layer only"
    )
    level(alone, systems["receiver"]["accuracy"], "receiver", "receiver")
    level(alone, systems["matched"]["accuracy"], "matched", "all layers")
    alone.set_xlabel("receiver layer")
    alone.set_ylabel("accuracy, percent")
    legend(figure, alone)
    dots(parts, groups, "matched")
    caption = f"{numbers['n']} questions, dots with 95 % intervals. Thirds of the fused layers: {numbers['thirds']}."
    return done(NAME, "Which layers carry the message", caption, figure)
