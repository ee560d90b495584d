"""How far open a fuser's gates are, and how much it adds to each layer and head.

The Cache-to-Cache paper (ICLR 2026, arXiv:2510.03215) reports the share of open gates and their weights: a fuser
trained on general data keeps 98 % of its gates open, some with small weights; one trained for a task 53 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from c2c.analysis.drawing import colour_bar, done, legend, panels
from c2c.analysis.entries import LayerEntries, layer_entries
from c2c.analysis.inputs import Subject
from c2c.analysis.record import check_output, publish
from c2c.analysis.settings import Settings
from c2c.reporting.canvas import PAINT, Plot
from c2c.utils import OnProgress

NAME = "gates"
KINDS = ("keys", "values")


class Sizes:
    """Sums of the lengths of head vectors, by layer and kind: what is added, and the receiver's own.

    Args:
        heads: the receiver's KV heads.
    """

    def __init__(self, heads: int) -> None:
        self.heads, self.count = heads, 0
        self._added: dict[tuple[int, str], Tensor] = {}
        self._own: dict[tuple[int, str], Tensor] = {}

    def add(self, entries: LayerEntries) -> None:
        """Count the entries of one layer of a batch in."""
        for kind in KINDS:
            own, fused = getattr(entries.receiver, kind), getattr(entries.fused, kind)
            key = (entries.layer, kind)
            self._added[key] = self._added.get(key, torch.zeros(self.heads)) + self._lengths(fused - own)
            self._own[key] = self._own.get(key, torch.zeros(self.heads)) + self._lengths(own)

    def added(self, layer: int, kind: str, tokens: int) -> list[float]:
        """Mean length of what is added, per head."""
        return _rounded(self._added[layer, kind] / tokens)

    def relative(self, layer: int, kind: str) -> list[float]:
        """The same in lengths of the receiver's own vectors: mean over mean, per head."""
        return _rounded(self._added[layer, kind] / self._own[layer, kind].clamp_min(1e-12))

    def _lengths(self, x: Tensor) -> Tensor:
        """Sum over entries of each head's length, ``[heads]``."""
        lengths: Tensor = x.view(len(x), self.heads, -1).norm(dim=-1).sum(0).cpu()
        return lengths


def measure_gates(settings: Settings, progress: OnProgress | None = None) -> dict[str, Any]:
    """Gate openness by layer, and the size of what is added by layer and head over all aligned positions.

    Args:
        settings: what to measure on.
        progress: called with (stage, items done, items).

    Returns:
        ``layers``: per fused layer ``gate`` (0 to 1) for ``keys`` and ``values``, ``added`` (mean length per KV head)
        and ``relative`` (mean length added over mean length of the receiver's own, per KV head); ``open``: percent of
        gates that are open, None for soft gates, which are all in between; ``mean_gate`` and ``mean_relative``, for
        keys and values; ``tokens``.

    Raises:
        AnalysisError: see :class:`~c2c.analysis.inputs.Subject`.
    """
    check_output(settings.output_dir)
    subject = Subject.open(settings)
    sizes, tokens = Sizes(subject.model.receiver.geometry.kv_heads), 0
    for batch in subject.batches("measuring what is added", progress):
        tokens += len(batch.matched)
        for entries in layer_entries(subject, batch):
            sizes.add(entries)
    config = subject.fuser.config
    layers = [
        _layer(layer, source, openness, sizes, tokens)
        for layer, source, openness in zip(
            config.fused_layers, config.source_layers, subject.fuser.gates().float().tolist(), strict=True
        )
    ]
    gates = [layer["gate"][kind] for layer in layers for kind in KINDS]
    numbers = {
        "tokens": tokens,
        "open": round(100 * sum(gates) / len(gates), 2) if set(gates) <= {0.0, 1.0} else None,
        "mean_gate": {kind: _mean([layer["gate"][kind] for layer in layers]) for kind in KINDS},
        "mean_relative": {kind: _mean([x for layer in layers for x in layer["relative"][kind]]) for kind in KINDS},
        "layers": layers,
    } | subject.facts()
    return publish(NAME, numbers, lambda: _draw(numbers), settings.output_dir)


def _layer(layer: int, source: int, gates: Sequence[float], sizes: Sizes, tokens: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "sharer_layer": source,
        "gate": {kind: round(gate, 4) for kind, gate in zip(KINDS, gates, strict=True)},
        "added": {kind: sizes.added(layer, kind, tokens) for kind in KINDS},
        "relative": {kind: sizes.relative(layer, kind) for kind in KINDS},
    }


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def _rounded(x: Tensor) -> list[float]:
    return [round(float(value), 4) for value in x]


def _draw(numbers: Mapping[str, Any]) -> Plot:
    layers = numbers["layers"]
    heads = len(layers[0]["relative"]["keys"])
    figure, (gates, heat) = panels(["Gates", "What is added, by KV head"], [110, max(70, 22 * 2 * heads)], right=68)
    at = [layer["layer"] for layer in layers]
    for kind, colour, marker in zip(KINDS, ("matched", "sharer"), "Ds", strict=True):
        openness = [layer["gate"][kind] for layer in layers]
        gates.plot(openness, color=PAINT[colour], lw=1.4, marker=marker, ms=3.2, label=kind)
    gates.set_ylim(-0.04, 1.04)
    gates.set_xlim(-0.5, len(at) - 0.5)
    gates.set_ylabel("openness")
    legend(figure, gates)
    rows = [[layer["relative"][kind][head] for layer in layers] for kind in KINDS for head in range(heads)]
    mesh = heat.pcolormesh(range(len(layers) + 1), range(len(rows) + 1), rows, cmap="viridis", vmin=0)
    heat.grid(visible=False)
    heat.set_yticks(
        [row + 0.5 for row in range(len(rows))], [f"{kind[0].upper()} {h}" for kind in KINDS for h in range(heads)]
    )
    step = max(1, len(layers) // 10)
    heat.set_xticks([i + 0.5 for i in range(0, len(layers), step)], [str(at[i]) for i in range(0, len(layers), step)])
    heat.invert_yaxis()
    heat.set_xlabel("receiver layer")
    colour_bar(figure, mesh, heat, "added / own length")
    caption = (
        f"Above: gates at inference. Below: mean length of what the fuser adds, in mean lengths of the receiver's own "
        f"keys (K) and values (V), per layer and KV head, over {numbers['tokens']} aligned positions."
    )
    return done(NAME, "Gates, and what the fuser adds", caption, figure)
