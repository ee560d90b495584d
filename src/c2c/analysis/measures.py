"""Measures of cache entries before and after fusion: effective rank, gates and norms, and where the entries lie.

Those of the Cache-to-Cache paper (ICLR 2026, arXiv:2510.03215), whose figures are in ``docs/analysis.md``. It maps a
sharer's last layer into the receiver's space by a network trained for that. Here no map is trained: the sharer's
entries have other channels, and only their shape can be compared.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from c2c.analysis.capture import KINDS, SIDES, LayerCapture
from c2c.analysis.config import AnalysisConfig, AnalysisError, CacheMapConfig
from c2c.analysis.experiment import Experiment, analysis
from c2c.fusers import Fuser
from c2c.utils import OnProgress

RANKED = ("keys", "keys_unrotated", "values")


@analysis("effective-rank")
def measure_effective_rank(config: AnalysisConfig, progress: OnProgress | None = None) -> dict[str, Any]:
    """Measure the effective rank of the three caches over all aligned positions, per fused layer.

    Keys are measured as they lie in the cache, as in the paper, and without their rotary embedding, which spreads a key
    over directions by its position alone. Matrices are ``[positions, kv_heads * head_dim]``, not centred. A rank is at
    most the number of positions or channels: compare only ranks of the same items.

    Returns:
        As :func:`layer_ranks`, with ``mean`` over layers, ``widths`` (channels) and ``headline`` (the paper's kinds).
    """
    experiment = Experiment(config, progress)
    numbers = layer_ranks(experiment.captures("reading caches"))
    mean = {
        kind: {side: round(fmean(layer[kind][side] for layer in numbers["layers"]), 2) for side in SIDES}
        for kind in RANKED
    }
    widths = {"sharer": experiment.sharer.geometry.width, "receiver": experiment.receiver.geometry.width}
    return numbers | {"mean": mean, "widths": widths, "headline": list(KINDS)} | experiment.facts()


def layer_ranks(captures: Iterable[LayerCapture]) -> dict[str, Any]:
    """Compute the effective ranks of each layer over all its captures; a sharer entry counts once.

    Returns:
        ``layers``: per fused receiver layer ``layer``, ``sharer_layer``, and for ``keys``, ``keys_unrotated`` and
        ``values`` the rank of ``sharer``, ``receiver`` and ``fused``; ``tokens`` and ``sharer_tokens``: entries per
        layer.
    """
    grams: dict[tuple[int, int, str, str], Any] = defaultdict(float)  # sums of [channels, channels]
    tokens: Counter[int] = Counter()
    sharer_tokens: Counter[int] = Counter()
    for capture in captures:
        tokens[capture.layer] += len(capture.unique)
        sharer_tokens[capture.layer] += int(capture.unique.sum())
        for side in SIDES:
            read = capture.unique if side == "sharer" else slice(None)
            for kind in RANKED:
                grams[capture.layer, capture.source, kind, side] += _gram(capture.entries[side][kind][read])
    layers = [
        {"layer": layer, "sharer_layer": source}
        | {kind: {side: round(_gram_rank(grams[layer, source, kind, side]), 2) for side in SIDES} for kind in RANKED}
        for layer, source in sorted({key[:2] for key in grams})
    ]
    return {"tokens": max(tokens.values()), "sharer_tokens": max(sharer_tokens.values()), "layers": layers}


def effective_rank(matrix: Tensor) -> float:
    """Return the exponential of the entropy of the normalised singular values (Roy & Vetterli, 2007).

    From 1 to the smaller side of ``[rows, columns]``; 0 for a matrix of zeros.
    """
    return _gram_rank(_gram(matrix))


def _gram(matrix: Tensor) -> Tensor:
    x = matrix.double()
    return x.t() @ x  # adds up over batches


def _gram_rank(gram: Tensor) -> float:
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = float(singular.sum())
    return float(torch.special.entr(singular / total).sum().exp()) if total else 0.0


@analysis("gates")
def measure_gates(config: AnalysisConfig, progress: OnProgress | None = None) -> dict[str, Any]:
    """Measure the gates of each layer, and the norm of what is added by layer and head over all aligned positions.

    Returns:
        ``layers``: as :func:`layer_gates` and :func:`layer_norms`; ``open``: percent of open gates, None for soft
        gates, which are all in between; ``mean_gate`` and ``mean_relative`` for keys and values; ``tokens``.
    """
    experiment = Experiment(config, progress)
    norms = layer_norms(experiment.captures("measuring what is added"), experiment.fuser)
    layers = [layer | norms[layer["layer"]] for layer in layer_gates(experiment.fuser)]
    gates = {kind: [layer["gate"][kind] for layer in layers] for kind in KINDS}
    relative = {kind: [norm for layer in layers for norm in layer["relative"][kind]] for kind in KINDS}
    all_gates = [*gates["keys"], *gates["values"]]
    return {
        "tokens": sum(len(example.alignment) for example in experiment.examples),
        "open": round(100 * fmean(all_gates), 2) if set(all_gates) <= {0.0, 1.0} else None,
        "mean_gate": {kind: round(fmean(found), 4) for kind, found in gates.items()},
        "mean_relative": {kind: round(fmean(found), 4) for kind, found in relative.items()},
        "layers": layers,
    } | experiment.facts()


def layer_gates(fuser: Fuser) -> list[dict[str, Any]]:
    """Return ``layer``, ``sharer_layer`` and ``gate`` (of ``keys`` and ``values``, 0 to 1) of each fused layer."""
    gates = [[round(gate, 4) for gate in layer] for layer in fuser.gates().float().tolist()]
    return [
        {"layer": layer, "sharer_layer": source, "gate": dict(zip(KINDS, pair, strict=True))}
        for layer, source, pair in zip(fuser.config.fused_layers, fuser.config.source_layers, gates, strict=True)
    ]


def layer_norms(captures: Iterable[LayerCapture], fuser: Fuser) -> dict[int, dict[str, dict[str, list[float]]]]:
    """Measure what is added to each layer and KV head over all captures.

    Returns:
        Per layer, for ``keys`` and ``values`` a number per head: ``added``, the mean norm of what is added, and
        ``relative``, the same over the mean norm of the receiver's own entries.
    """
    heads = int(fuser.config.receiver_kv["kv_heads"])
    tokens: Counter[int] = Counter()
    sums: dict[tuple[int, str], Tensor] = defaultdict(lambda: torch.zeros(2, heads))
    for capture in captures:
        tokens[capture.layer] += len(capture.unique)
        for kind in KINDS:
            own, fused = (capture.entries[side][kind].unflatten(1, (heads, -1)) for side in ("receiver", "fused"))
            sums[capture.layer, kind] += torch.stack([fused - own, own]).norm(dim=-1).sum(1)
    norms: dict[int, dict[str, dict[str, list[float]]]] = defaultdict(lambda: {"added": {}, "relative": {}})
    for (layer, kind), (added, own) in sums.items():
        for name, values in (("added", added / tokens[layer]), ("relative", added / own.clamp_min(1e-12))):
            norms[layer][name][kind] = [round(value, 4) for value in values.tolist()]
    return norms


@analysis("cache-map")
def measure_cache_map(config: CacheMapConfig, progress: OnProgress | None = None) -> dict[str, Any]:
    """Measure how far apart sharer, receiver and fused entries lie, and draw them in the plane.

    Keys are taken without their rotary embedding, which would spread them by position.

    Returns:
        ``layers``: per layer for ``keys`` and ``values`` the numbers of :func:`compare`; ``tokens``: aligned positions;
        ``method``; ``points``: how many of them are drawn.

    Raises:
        AnalysisError: a layer that is not fused.
    """
    experiment = Experiment(config, progress)
    fused = experiment.fuser.config.fused_layers
    chosen = middle_and_last(fused) if config.layers is None else sorted(set(map(int, config.layers.split(","))))
    if missing := [layer for layer in chosen if layer not in fused]:
        raise AnalysisError(f"layers {missing} are not fused; choose from {fused}.")
    entries = join_captures(experiment.captures("reading caches", chosen))
    tokens = len(entries[chosen[0], "keys"]["receiver"])
    shown = torch.randperm(tokens, generator=torch.Generator().manual_seed(config.seed))[: config.points]
    return {
        "method": config.method,
        "points": len(shown),
        "tokens": tokens,
        "layers": [
            {"layer": layer, "sharer_layer": experiment.fuser.config.layer_map[layer]}
            | {kind: compare(entries[layer, kind]) for kind in KINDS}
            for layer in chosen
        ],
        "_entries": {key: {side: x[shown] for side, x in sides.items()} for key, sides in entries.items()},
        "_seed": config.seed,
    } | experiment.facts(layers=chosen)


def middle_and_last(layers: Sequence[int]) -> list[int]:
    """Return the middle and the last of some layers, once where they are the same."""
    return sorted({layers[len(layers) // 2], layers[-1]})


def join_captures(captures: Iterable[LayerCapture]) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Join the entries of all captures by (layer, kind) and side; keys without their rotary embedding."""
    parts: dict[tuple[int, str], dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for capture in captures:
        for side, entries in capture.entries.items():
            parts[capture.layer, "keys"][side].append(entries["keys_unrotated"])
            parts[capture.layer, "values"][side].append(entries["values"])
    return {key: {side: torch.cat(found) for side, found in sides.items()} for key, sides in parts.items()}


def compare(entries: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Measure how far apart the entries of the three sides are.

    Args:
        entries: ``sharer``, ``receiver`` and ``fused``, each ``[pairs, channels]``; row ``i`` of all belongs together.

    Returns:
        ``change``: mean norm of what is added over the norm of the receiver's own entry; ``cosine``: mean cosine of
        fused and receiver entries; ``fused_in_receiver`` and ``receiver_in_fused``: see :func:`shared_variance`;
        ``cka_sharer_receiver``, ``cka_sharer_fused`` and ``cka_sharer_added``: see :func:`linear_cka`. None where one
        of the two does not vary.
    """
    sharer, receiver, fused = (entries[side].double() for side in SIDES)
    added = fused - receiver
    numbers = {
        "change": float((added.norm(dim=-1) / receiver.norm(dim=-1).clamp_min(1e-12)).mean()),
        "cosine": float(torch.cosine_similarity(fused, receiver, dim=-1).mean()),
        "fused_in_receiver": shared_variance(fused, receiver),
        "receiver_in_fused": shared_variance(receiver, fused),
        "cka_sharer_receiver": linear_cka(sharer, receiver),
        "cka_sharer_fused": linear_cka(sharer, fused),
        "cka_sharer_added": linear_cka(sharer, added),
    }
    return {name: None if value is None else round(value, 4) for name, value in numbers.items()}


def shared_variance(inner: Tensor, outer: Tensor, held: float = 0.95) -> float | None:
    """Return the share of ``inner``'s variance in the fewest principal directions that hold ``held`` of ``outer``'s.

    Both ``[rows, channels]`` in the same space; None where one does not vary.
    """
    x, y = inner - inner.mean(0), outer - outer.mean(0)
    _, singular, directions = torch.linalg.svd(y, full_matrices=False)
    cumulated, variance = singular.square().cumsum(0), float(x.square().sum())
    if variance == 0 or cumulated[-1] == 0:
        return None
    count = int((cumulated < held * cumulated[-1]).sum()) + 1
    return float((x @ directions[:count].t()).square().sum()) / variance


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Return the linear centred kernel alignment of ``[rows, a]`` and ``[rows, b]``, 0 to 1 (Kornblith et al., 2019).

    It compares spaces of different width. None where one does not vary.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    scale = float((x.t() @ x).norm() * (y.t() @ y).norm())
    return float((y.t() @ x).square().sum()) / scale if scale > 0 else None
