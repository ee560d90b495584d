"""Effective rank of the sharer's, the receiver's and the fused cache, layer by layer.

The effective rank of a matrix is the exponential of the entropy of its normalised singular values (Roy & Vetterli,
2007). The Cache-to-Cache paper (ICLR 2026, arXiv:2510.03215) finds that fusion raises it above the receiver's own:
388 to 395 for keys, 532 to 560 for values; the sharer's is 539 and 689.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from c2c.analysis.drawing import done, legend, panels
from c2c.analysis.entries import LayerEntries, layer_entries
from c2c.analysis.inputs import Subject
from c2c.analysis.record import check_output, publish
from c2c.analysis.settings import Settings
from c2c.reporting.canvas import PAINT, Plot
from c2c.utils import OnProgress

NAME = "effective-rank"
HEADLINE = ("keys", "values")
_SIDES = ("sharer", "receiver", "fused")
_TITLES = {
    "keys": "Keys as they lie in the cache",
    "keys_unrotated": "Keys, rotary embedding taken off",
    "values": "Values",
}
_LOOKS = {"sharer": ("sharer", "s"), "receiver": ("receiver", "o"), "fused": ("matched", "D")}


def effective_rank(matrix: Tensor) -> float:
    """Effective rank of ``[rows, columns]``, from 1 to the smaller of the two; 0 for a matrix of zeros."""
    x = matrix.double()
    return gram_rank(x.t() @ x)


def gram_rank(gram: Tensor) -> float:
    """Effective rank of a matrix from its Gram matrix ``X'X``, ``[columns, columns]`` in float64."""
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = float(singular.sum())
    if total == 0:
        return 0.0
    return float(torch.special.entr(singular / total).sum().exp())


class Grams:
    """Gram matrices of all kinds of entries of all layers, summed up batch by batch.

    Attributes:
        tokens: receiver entries seen per layer.
        sharer_tokens: different sharer entries seen per layer.
    """

    def __init__(self) -> None:
        self.tokens = self.sharer_tokens = 0
        self.sources: dict[int, int] = {}
        self._sums: dict[tuple[int, str, str], Tensor] = {}

    def add(self, entries: LayerEntries) -> None:
        """Count the entries of one layer of a batch in; a sharer entry that is read several times counts once."""
        if not self.sources or entries.layer == next(iter(self.sources)):
            self.tokens += len(entries.first)
            self.sharer_tokens += int(entries.first.sum())
        self.sources[entries.layer] = entries.source
        for side in _SIDES:
            for kind, x in getattr(entries, side).kinds().items():
                rows = (x[entries.first.to(x.device)] if side == "sharer" else x).double()
                key = (entries.layer, kind, side)
                self._sums[key] = self._sums[key] + rows.t() @ rows if key in self._sums else rows.t() @ rows

    def ranks(self) -> dict[int, dict[str, dict[str, float]]]:
        """Layer to kind to side to effective rank."""
        ranks: dict[int, dict[str, dict[str, float]]] = {}
        for (layer, kind, side), gram in self._sums.items():
            ranks.setdefault(layer, {}).setdefault(kind, {})[side] = round(gram_rank(gram), 2)
        return ranks


def measure_ranks(settings: Settings, progress: OnProgress | None = None) -> dict[str, Any]:
    """Effective ranks of the three caches over all aligned positions, per fused receiver layer and in the mean.

    Keys are measured as they lie in the cache, which is the headline and what the paper did, and with the rotary
    embedding taken off: the rotation spreads a key over directions by its position alone, so that the former rank is
    partly that of the positions. Matrices are ``[positions, kv_heads * head_dim]``, not centred. A rank can't exceed
    the number of positions or of channels; compare only figures of the same items.

    Args:
        settings: what to measure on.
        progress: called with (stage, items done, items).

    Returns:
        ``layers``: per fused layer ``keys``, ``keys_unrotated`` and ``values``, each with ``sharer`` (the layer that
        is read), ``receiver`` and ``fused``; ``mean`` over layers; ``tokens`` (receiver entries per layer),
        ``sharer_tokens`` (different sharer entries per layer), ``widths`` (channels), ``headline``.

    Raises:
        AnalysisError: see :class:`~c2c.analysis.inputs.Subject`.
    """
    check_output(settings.output_dir)
    subject = Subject.open(settings)
    grams = Grams()
    for batch in subject.batches("reading caches", progress):
        for entries in layer_entries(subject, batch):
            grams.add(entries)
    layers = [
        {"layer": layer, "sharer_layer": grams.sources[layer]} | ranks for layer, ranks in sorted(grams.ranks().items())
    ]
    numbers = {
        "headline": list(HEADLINE),
        "tokens": grams.tokens,
        "sharer_tokens": grams.sharer_tokens,
        "widths": {
            "sharer": subject.model.sharers[0].geometry.width,
            "receiver": subject.model.receiver.geometry.width,
        },
        "mean": _mean(layers),
        "layers": layers,
    } | subject.facts()
    return publish(NAME, numbers, lambda: _draw(numbers), settings.output_dir)


def _mean(layers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        kind: {side: round(sum(layer[kind][side] for layer in layers) / len(layers), 2) for side in _SIDES}
        for kind in _TITLES
    }


def _draw(numbers: Mapping[str, Any]) -> Plot:
    layers = numbers["layers"]
    figure, axes = panels(list(_TITLES.values()), [150] * len(_TITLES))
    for panel, kind in zip(axes, _TITLES, strict=True):
        for side, (colour, marker) in _LOOKS.items():
            ranks = [layer[kind][side] for layer in layers]
            at = [layer["layer"] for layer in layers]
            panel.plot(at, ranks, color=PAINT[colour], lw=1.4, marker=marker, ms=3, label=side)
        panel.set_ylabel("effective rank")
        panel.set_ylim(bottom=0)
        panel.set_xlabel("receiver layer")
    legend(figure, axes[0])
    widths = numbers["widths"]
    caption = (
        f"Effective rank over {numbers['tokens']} aligned positions ({numbers['sharer_tokens']} of the sharer). The "
        f"sharer's layer is the one that the receiver's layer reads. Channels: sharer {widths['sharer']}, receiver "
        f"{widths['receiver']}; a rank is at most that."
    )
    return done(NAME, "Effective rank of the caches", caption, figure)
