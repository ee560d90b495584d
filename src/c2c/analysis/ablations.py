"""Accuracy when only a part of the message is fused: some positions, some layers, or entries of lower precision."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from c2c import kv_cache
from c2c.alignment import Alignment
from c2c.analysis.config import AnalysisConfig, PrecisionConfig
from c2c.analysis.experiment import Experiment, analysis, difference
from c2c.handoff import Precision, QuantizedTensor
from c2c.training.shared_context import SharedBatch
from c2c.utils import OnProgress

Part = Literal["former", "latter"]
FRACTIONS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
STORED: Precision = "bfloat16"  # precision of a prefill store, so of what fusers are trained and evaluated on


@analysis("progressive")
def measure_progressive(config: AnalysisConfig, progress: OnProgress | None = None) -> dict[str, Any]:
    """Measure accuracy by the share of the aligned positions that is fused, from the start or up to the end.

    Cache-to-Cache (ICLR 2026, arXiv:2510.03215) does so by prompt tokens: accuracy falls, then rises, and the latter
    positions matter more. Aligned positions are those that the fuser reads, so that 1 is matched and 0 the receiver.

    Returns:
        ``former`` and ``latter``: a list of ``fraction``, ``accuracy`` (percent) and ``ci95``; ``deranged`` and
        ``zero``: accuracy with another item's cache and with zeros, at all positions; ``G`` and ``P``: matched minus
        receiver and matched minus deranged, in ``points`` with ``ci95``.
    """
    experiment = Experiment(config, progress)
    parts: tuple[Part, ...] = get_args(Part)

    def caches(batch: SharedBatch) -> Iterator[tuple[Any, Cache]]:
        yield from experiment.controls(batch)
        for part in parts:
            for fraction in FRACTIONS[1:-1]:
                some = part_of(batch.matched, fraction, part)
                yield f"{part} {fraction}", experiment.fuse(batch, "matched" if len(some) else "none", matched=some)

    scores = experiment.score(caches)
    ends = {0.0: "receiver", 1.0: "matched"}
    numbers: dict[str, Any] = {
        part: [
            {"fraction": fraction} | scores.systems[ends.get(fraction, f"{part} {fraction}")] for fraction in FRACTIONS
        ]
        for part in parts
    }
    return numbers | {name: scores.systems[name] for name in ("deranged", "zero")} | scores.gains | experiment.facts()


def part_of(alignment: Alignment, fraction: float, part: Part) -> Alignment:
    """Return the first (``former``) or last (``latter``) ``floor(fraction * pairs)`` pairs of every row."""
    kept = []
    for row in alignment.rows.unique():
        index = (alignment.rows == row).nonzero().flatten()
        index = index[alignment.receiver[index].argsort(stable=True)]
        count = math.floor(fraction * len(index))
        kept.append(index[:count] if part == "former" else index[len(index) - count :])
    chosen = torch.cat(kept).sort().values
    return Alignment(alignment.rows[chosen], alignment.receiver[chosen], alignment.sharer[chosen])


@analysis("layers")
def measure_layers(config: AnalysisConfig, progress: OnProgress | None = None) -> dict[str, Any]:
    """Measure accuracy with only keys, only values, all but a third of the layers, and each layer alone.

    Cache-to-Cache (ICLR 2026, arXiv:2510.03215) enriches one layer at a time in an oracle: most layers alone do harm.

    Returns:
        ``systems``: ``receiver``, ``matched``, ``keys only``, ``values only``, ``without ... third``, ``deranged`` and
        ``zero``, each with ``accuracy`` (percent) and ``ci95``; ``single``: the same for each layer alone, with
        ``layer`` and ``gain`` over the receiver; ``thirds``: which layers they are; ``G`` and ``P`` as for
        :func:`measure_progressive`.
    """
    experiment = Experiment(config, progress)
    layers = experiment.fuser.config.fused_layers
    chunks = zip(("early", "middle", "late"), torch.tensor(layers).tensor_split(3), strict=True)
    thirds = {name: chunk.tolist() for name, chunk in chunks if len(chunk)}  # some are empty below three layers
    mixtures: dict[str, tuple[Sequence[int], Sequence[int]]] = {"keys only": (layers, []), "values only": ([], layers)}
    for name, third in thirds.items():
        mixtures[f"without {name} third"] = ([layer for layer in layers if layer not in third],) * 2
    mixtures |= {f"layer {layer}": ([layer], [layer]) for layer in layers}

    def caches(batch: SharedBatch) -> Iterator[tuple[str, Cache]]:
        yield from experiment.controls(batch)
        fused = experiment.fuse(batch)
        for name, chosen in mixtures.items():
            yield name, mix(batch.receiver_cache, fused, *chosen)

    items, systems, gains = experiment.score(caches)
    single = [
        {"layer": layer}
        | systems.pop(f"layer {layer}")
        | {"gain": difference(items[f"layer {layer}"], items["receiver"], config.seed)}
        for layer in layers
    ]
    return {"single": single, "systems": systems, "thirds": thirds} | gains | experiment.facts()


def mix(clean: Cache, fused: Cache, keys: Sequence[int], values: Sequence[int]) -> DynamicCache:
    """Return a cache with fused keys in some layers, fused values in some, and clean ones elsewhere; nothing is copied.

    Layers are fused from the clean cache, independently of each other, so that this is fusing these layers only.
    """
    pairs = zip(kv_cache.layers(clean), kv_cache.layers(fused), strict=True)
    return kv_cache.from_layers(
        (new[0] if layer in keys else own[0], new[1] if layer in values else own[1])
        for layer, (own, new) in enumerate(pairs)
    )


@analysis("precision")
def measure_precision(config: PrecisionConfig, progress: OnProgress | None = None) -> dict[str, Any]:
    """Measure accuracy and bytes by the precision in which the sharer's entries are sent.

    Prefill stores are in bfloat16, which is the first row. With ``unrounded`` the sharer prefills every prompt again,
    and the first row is of its entries in its own dtype.

    Returns:
        ``precisions``: a list of ``precision``, ``accuracy`` (percent) and ``ci95``, ``bytes`` (mean per item, scales
        included), ``cost`` (difference to the first row) and ``differ`` (percent of items that are right in one of both
        only); ``receiver`` and ``deranged``; ``G`` and ``P`` of the first row, as for :func:`measure_progressive`.
    """
    experiment = Experiment(config, progress, needs_sharer=config.unrounded)
    sharer = experiment.sharer
    own: Any = str(sharer.dtype).removeprefix("torch.")
    precisions: list[Precision] = [STORED, "int8", "float8"]
    if config.unrounded:
        precisions = list(dict.fromkeys([own if own in get_args(Precision) else "float32", *precisions]))
    sizes: dict[str, int] = dict.fromkeys(precisions, 0)

    def caches(batch: SharedBatch) -> Iterator[tuple[str, Cache]]:
        yield "receiver", batch.receiver_cache
        cache = sharer.prefill(batch.sharer) if config.unrounded else batch.sharer_cache
        yield "deranged", experiment.fuse(batch, "deranged", sharer_cache=cache)
        for precision in precisions:
            sent, nbytes = quantize(cache, batch.matched, precision, experiment.fuser.config.source_layers)
            sizes[precision] += nbytes
            yield precision, experiment.fuse(batch, sharer_cache=sent)

    items, systems, gains = experiment.score(caches, matched=precisions[0])
    first = items[precisions[0]]
    numbers: dict[str, Any] = {
        "precisions": [
            {"precision": name, "bytes": sizes[name] / len(first), **systems[name]}
            | {"cost": difference(items[name], first, config.seed)}
            | {"differ": 100 * sum(a != b for a, b in zip(items[name], first, strict=True)) / len(first)}
            for name in precisions
        ]
    }
    return numbers | {name: systems[name] for name in ("receiver", "deranged")} | gains | experiment.facts()


def quantize(
    cache: Cache, alignment: Alignment, precision: Precision, layers: Sequence[int]
) -> tuple[DynamicCache, int]:
    """Round a sharer's aligned entries as they are sent from another machine.

    Args:
        cache: of the sharer.
        alignment: which of its columns are sent, by row; others become zero.
        precision: of the entries sent; 8 bits have a scale per channel of keys and per token of values.
        layers: layers that are sent; others stay as they are.

    Returns:
        The cache as it arrives, and the bytes sent, scales included.
    """
    columns = {row: alignment.sharer[alignment.rows == row].unique() for row in alignment.rows.unique().tolist()}
    nbytes = 0

    def rounded(x: Tensor, along: int) -> Tensor:
        nonlocal nbytes
        out = torch.zeros_like(x)
        for row, sent in columns.items():
            quantized = QuantizedTensor.quantize(x[row : row + 1].index_select(2, sent.to(x.device)), precision, along)
            out[row, :, sent] = quantized.dequantize(x.dtype)[0]
            nbytes += quantized.nbytes
        return out

    arrived = [
        (rounded(keys, 2), rounded(values, 3)) if layer in layers else (keys, values)
        for layer, (keys, values) in enumerate(kv_cache.layers(cache))
    ]
    return kv_cache.from_layers(arrived), nbytes
