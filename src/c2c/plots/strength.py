"""How much fusion changes each token of the prompt, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from c2c.analysis.drawing import colour_bar, panels
from c2c.analysis.gates import KINDS
from c2c.plots.gates import layer_ticks
from c2c.plots.line import COLUMNS, Box, boxes
from c2c.plots.picture import Picture
from c2c.plots.reading import Reading
from c2c.reporting.canvas import PAINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE = 21.0  # pixels
_LETTERS = 10.0
_DARK = 0.45  # above this share of the scale the colour is bright and letters are dark


def strengths(reading: Reading) -> Tensor:
    """What is added to each aligned token over its own length, mean of keys and values: ``[layers, pairs]``."""
    rows = []
    for entries in reading.layers:
        kinds = []
        for kind in KINDS:
            own, fused = getattr(entries.receiver, kind), getattr(entries.fused, kind)
            kinds.append((fused - own).norm(dim=-1) / own.norm(dim=-1).clamp_min(1e-12))
        rows.append(torch.stack(kinds).mean(0))
    return torch.stack(rows)


def draw_strength(reading: Reading) -> Picture:
    """The prompt with each token in the colour of its change; below, the same by layer."""
    found = strengths(reading)
    mean = dict(zip([token for token, _ in reading.pairs], found.mean(0).tolist(), strict=True))
    placed = boxes(reading.ours, range(len(reading.ours)))
    lines = 1 + max(box.line for box in placed)
    figure, (text, heat) = panels(["Mean over layers", "By layer"], [lines * _LINE, 150], left=34, right=68)
    top = max(mean.values(), default=0.0) or 1.0
    _prompt(text, placed, mean, top, lines)
    _by_layer(figure, heat, reading, found)
    caption = (
        "Length of what fusion adds to a token's entries over the length of its own, mean of keys and values. Grey "
        "tokens are not fused: the template before the message, and the last token, which reads the fused cache. "
        "Dark is little, bright is much; below, tokens from left to right."
    )
    return Picture("strength", "Fusion strength over the prompt", caption, figure)


def _prompt(panel: Axes, placed: list[Box], mean: dict[int, float], top: float, lines: int) -> None:
    import matplotlib

    panel.set_xlim(0, COLUMNS)
    panel.set_ylim(lines, 0)
    panel.axis("off")
    colours = matplotlib.colormaps["viridis"]
    for box in placed:
        share = mean[box.token] / top if box.token in mean else None
        letters = PAINT["muted"] if share is None else "#111111" if share > _DARK else "#ffffff"
        if share is not None:
            panel.add_patch(_rectangle(box, colours(share)))
        write(panel, box, box.line + 0.5, letters)


def _rectangle(box: Box, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((box.start + 0.04, box.line + 0.07), box.width - 0.08, 0.86, facecolor=colour, lw=0)


def write(panel: Axes, box: Box, height: float, colour: str, size: float = _LETTERS) -> None:
    """A token's text in the middle of its box, in letters of one width."""
    panel.text(
        box.middle,
        height,
        box.text,
        ha="center",
        va="center",
        color=colour,
        fontsize=size,
        family="DejaVu Sans Mono",
        parse_math=False,
    )


def _by_layer(figure: Figure, heat: Axes, reading: Reading, found: Tensor) -> None:
    layers = [entries.layer for entries in reading.layers]
    mesh = heat.pcolormesh(found.tolist(), cmap="viridis", vmin=0)
    heat.grid(visible=False)
    heat.set_xlabel("fused token")
    heat.set_ylabel("receiver layer")
    step = max(1, len(layers) // 6)
    heat.set_yticks([place + 0.5 for place in range(0, len(layers), step)], [str(x) for x in layers[::step]])
    count = found.shape[1]
    layer_ticks(heat, [token for token, _ in reading.pairs], 0.5)
    heat.set_xlim(0, count)
    colour_bar(figure, mesh, heat, "added / own length")
