"""A picture of cache entries in two dimensions: where the receiver's lie, where fusion puts them, and the sharer's.

Cache-to-Cache (ICLR 2026, arXiv:2510.03215) maps a sharer's last layer into the receiver's space by a network trained
for that and shows both with t-SNE: mapped entries lie inside the receiver's space and cover a part of it. No such map
is trained here. Receiver and fused entries have the same channels and share one panel, with axes of both together. The
sharer's have other channels, so they stand beside, on axes of their own: only their shape can be compared, not their
place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from c2c.analysis.drawing import done, legend, panels
from c2c.analysis.entries import Side, layer_entries
from c2c.analysis.inputs import Subject
from c2c.analysis.record import check_output, publish
from c2c.analysis.settings import AnalysisError, Settings
from c2c.fusers import Fuser
from c2c.reporting.canvas import PAINT, Plot
from c2c.utils import OnProgress

Method = Literal["pca", "tsne"]
NAME = "cache-map"
METHODS: tuple[Method, ...] = ("pca", "tsne")
KINDS = ("keys", "values")
HELD = 0.95
_SIDES = ("sharer", "receiver", "fused")

Sides = dict[str, Tensor]


def draw_cache_map(
    settings: Settings,
    progress: OnProgress | None = None,
    *,
    layers: Sequence[int] | None = None,
    method: Method = "pca",
    points: int = 400,
) -> dict[str, Any]:
    """Where sharer, receiver and fused entries lie, as a picture and in numbers.

    Keys are taken without their rotary embedding, which would spread them by position.

    Args:
        settings: what to measure on.
        progress: called with (stage, items done, items).
        layers: receiver layers; by default the middle and the last fused one.
        method: ``pca`` (principal components) or ``tsne`` (with scikit-learn).
        points: at most this many positions are drawn, the same ones of every side; numbers are of all.

    Returns:
        ``layers``: per layer for ``keys`` and ``values`` the numbers of :func:`compare`; ``tokens``: aligned positions;
        ``method``, ``points``.

    Raises:
        AnalysisError: a layer that is not fused, an unknown method, or scikit-learn is missing; also see
            :class:`~c2c.analysis.inputs.Subject`.
    """
    check_output(settings.output_dir)
    project = _projection(method, settings.seed)
    if points < 3:
        raise AnalysisError(f"points is {points}; give at least 3.")
    subject = Subject.open(settings)
    chosen = _layers(subject.fuser, layers)
    sides = _collect(subject, chosen, progress)
    tokens = len(next(iter(sides.values()))["receiver"])
    numbers = {
        "method": method,
        "points": min(points, tokens),
        "tokens": tokens,
        "layers": [
            {"layer": layer, "sharer_layer": subject.fuser.config.layer_map[layer]}
            | {kind: compare(sides[layer, kind]) for kind in KINDS}
            for layer in chosen
        ],
    } | subject.facts(layers=chosen, method=method, points=points)
    shown = torch.randperm(tokens, generator=torch.Generator().manual_seed(settings.seed))[:points]
    drawn = {key: {side: x[shown] for side, x in found.items()} for key, found in sides.items()}
    return publish(NAME, numbers, lambda: _draw(numbers, drawn, project), settings.output_dir)


def compare(sides: Sides) -> dict[str, float | None]:
    """How far apart the three sets of entries are.

    Args:
        sides: ``sharer``, ``receiver`` and ``fused``, each ``[pairs, channels]``; row ``i`` of all belongs together.

    Returns:
        ``change``: mean over entries of the length of what is added over the length of the receiver's own;
        ``cosine``: mean cosine of fused and receiver entries; ``fused_in_receiver`` and ``receiver_in_fused``: share of
        the one's variance in the fewest principal directions that hold 95 % of the other's; ``cka_sharer_receiver``,
        ``cka_sharer_fused`` and ``cka_sharer_added``: linear CKA (Kornblith et al., 2019), 0 to 1, which compares
        spaces of different width; None where one of the two does not vary.
    """
    sharer, receiver, fused = (sides[side].double() for side in _SIDES)
    added = fused - receiver
    change = added.norm(dim=-1) / receiver.norm(dim=-1).clamp_min(1e-12)
    return {
        "change": _rounded(float(change.mean())),
        "cosine": _rounded(float(torch.cosine_similarity(fused, receiver, dim=-1).mean())),
        "fused_in_receiver": _rounded(shared_variance(fused, receiver)),
        "receiver_in_fused": _rounded(shared_variance(receiver, fused)),
        "cka_sharer_receiver": _rounded(linear_cka(sharer, receiver)),
        "cka_sharer_fused": _rounded(linear_cka(sharer, fused)),
        "cka_sharer_added": _rounded(linear_cka(sharer, added)),
    }


def shared_variance(inner: Tensor, outer: Tensor, held: float = HELD) -> float | None:
    """Share of the variance of ``inner`` in the fewest principal directions that hold ``held`` of ``outer``'s.

    Both ``[rows, channels]`` in the same space; None where one does not vary.
    """
    x, y = _centred(inner), _centred(outer)
    strength, directions = torch.linalg.eigh(y.t() @ y)
    strength, directions = strength.flip(0).clamp_min(0), directions.flip(1)
    total, variance = float(strength.sum()), float(x.square().sum())
    if total == 0 or variance == 0:
        return None
    count = int((strength.cumsum(0) < held * total).sum()) + 1
    return float((x @ directions[:, :count]).square().sum()) / variance


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Linear centred kernel alignment of ``[rows, a]`` and ``[rows, b]``, 0 to 1; None where one does not vary."""
    x, y = _centred(x), _centred(y)
    scale = float((x.t() @ x).norm() * (y.t() @ y).norm())
    return float((y.t() @ x).square().sum()) / scale if scale > 0 else None


def principal_axes(x: Tensor) -> tuple[Tensor, list[float]]:
    """Coordinates on the two strongest principal axes, ``[rows, 2]``, and the share of the variance on each.

    Signs are set by the largest component of each axis, so that the same entries always give the same picture.
    """
    x = _centred(x.double())
    strength, directions = torch.linalg.eigh(x.t() @ x)
    axes = directions.flip(1)[:, :2]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    total = float(strength.clamp_min(0).sum()) or 1.0
    return x @ (axes * torch.where(largest < 0, -1.0, 1.0)), (strength.flip(0)[:2].clamp_min(0) / total).tolist()


Projection = Callable[[Tensor], tuple[Tensor, tuple[str, str]]]


def _projection(method: Method, seed: int) -> Projection:
    """From entries ``[rows, channels]`` to points ``[rows, 2]`` and the names of the two axes."""
    if method == "pca":

        def pca(x: Tensor) -> tuple[Tensor, tuple[str, str]]:
            at, (first, second) = principal_axes(x)
            return at, (f"PC 1 ({100 * first:.0f} %)", f"PC 2 ({100 * second:.0f} %)")

        return pca
    if method != "tsne":
        raise AnalysisError(f"unknown method {method!r}. Known: {', '.join(METHODS)}.")
    try:
        manifold = importlib.import_module("sklearn.manifold")
    except ImportError as missing:
        raise AnalysisError(
            "t-SNE needs scikit-learn: pip install scikit-learn. PCA (--method pca) does not."
        ) from missing

    def tsne(x: Tensor) -> tuple[Tensor, tuple[str, str]]:
        perplexity = min(30.0, (len(x) - 1) / 3)
        model = manifold.TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed)
        return torch.from_numpy(model.fit_transform(x.float().cpu().numpy())), ("t-SNE 1", "t-SNE 2")

    return tsne


def _layers(fuser: Fuser, wanted: Sequence[int] | None) -> list[int]:
    fused = fuser.config.fused_layers
    if wanted is None:
        return sorted({fused[len(fused) // 2], fused[-1]})
    missing = [layer for layer in wanted if layer not in fused]
    if missing or not wanted:
        raise AnalysisError(f"layers {missing or 'to draw'} are not fused; choose from {fused}.")
    return sorted(set(wanted))


def _collect(subject: Subject, layers: Sequence[int], progress: OnProgress | None) -> dict[tuple[int, str], Sides]:
    """All aligned entries of these layers, by layer and kind."""
    pieces: dict[tuple[int, str], dict[str, list[Tensor]]] = {}
    for batch in subject.batches("reading caches", progress):
        for entries in layer_entries(subject, batch, layers):
            for side in _SIDES:
                found: Side = getattr(entries, side)
                for kind, x in zip(KINDS, (found.unrotated, found.values), strict=True):
                    pieces.setdefault((entries.layer, kind), {}).setdefault(side, []).append(x.cpu())
    return {key: {side: torch.cat(part) for side, part in sides.items()} for key, sides in pieces.items()}


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _draw(numbers: Mapping[str, Any], sides: Mapping[tuple[int, str], Sides], project: Projection) -> Plot:
    titles = []
    for layer in numbers["layers"]:
        for kind in KINDS:
            titles += [f"Layer {layer['layer']}, {kind}", f"Sharer layer {layer['sharer_layer']}, {kind}"]
    figure, axes = panels(titles, [150] * (len(titles) // 2), columns=2, left=28, right=20)
    for row, found in enumerate(sides.values()):
        here, beside = axes[2 * row], axes[2 * row + 1]
        count = len(found["receiver"])
        at, names = project(torch.cat([found["receiver"], found["fused"]]))
        _scatter(here, at[:count], "receiver", "receiver", names)
        _scatter(here, at[count:], "matched", "fused", names)
        own, own_names = project(found["sharer"])
        _scatter(beside, own, "sharer", "sharer", own_names)
    legend(figure, axes[0], axes[1], markerscale=2.6)
    caption = (
        f"{numbers['points']} of {numbers['tokens']} aligned positions. Left: receiver and fused entries on axes of "
        "both together. Right: the sharer's entries that they read, on axes of their own, as their channels differ: "
        "compare their shape, not their place. Keys without their rotary embedding."
    )
    return done(NAME, "Where cache entries lie", caption, figure)


def _scatter(axes: Any, at: Tensor, colour: str, label: str, names: tuple[str, str]) -> None:
    x, y = at.t().tolist()
    axes.plot(x, y, ls="", marker="o", ms=2.6, mew=0, alpha=0.55, color=PAINT[colour], label=label)
    axes.set_xlabel(names[0], labelpad=2)
    axes.set_ylabel(names[1], labelpad=2)
    axes.set_xticklabels([])
    axes.set_yticklabels([])
