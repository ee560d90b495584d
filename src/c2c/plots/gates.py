"""Gates by layer, and what is added by layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from c2c.analysis.drawing import colour_bar, legend, panels
from c2c.analysis.gates import KINDS, Sizes
from c2c.plots.picture import Picture
from c2c.plots.reading import Reading
from c2c.reporting.canvas import PAINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from c2c.fusers import Fuser

_RIGHT = 68  # pixels, for the scale of a heat map


def draw_gates(fuser: Fuser, reading: Reading | None) -> Picture:
    """Gates at inference; of a prompt also what the fuser adds to each layer and head."""
    if reading is None:
        figure, (panel,) = panels(["Gates"], [130], right=_RIGHT)
        _gates(panel, fuser)
        panel.set_xlabel("receiver layer")
        caption = "How open each layer is to the sharer, keys and values. A gate says nothing of what stands behind it."
    else:
        rows = 22 * len(KINDS) * reading.kv_heads
        figure, (panel, heat) = panels(["Gates", "What is added, by KV head"], [110, max(70, rows)], right=_RIGHT)
        _gates(panel, fuser)
        _added(figure, heat, reading)
        caption = (
            "Above: how open each layer is to the sharer. Below: the weight of the message: mean length of what is "
            "added, in mean lengths of the receiver's own keys (K) and values (V), per layer and head."
        )
    legend(figure, panel)
    return Picture("gates", "Gate and weight by layer and head", caption, figure)


def _gates(panel: Axes, fuser: Fuser) -> None:
    openness = fuser.gates().float().tolist()
    for place, (kind, colour, marker) in enumerate(zip(KINDS, ("matched", "sharer"), "Ds", strict=True)):
        gates = [layer[place] for layer in openness]
        panel.plot(gates, color=PAINT[colour], lw=1.4, marker=marker, ms=3.2, label=kind)
    panel.set_ylim(-0.04, 1.04)
    panel.set_xlim(-0.5, len(openness) - 0.5)
    panel.set_ylabel("openness")
    layer_ticks(panel, fuser.config.fused_layers, 0.0)


def _added(figure: Figure, heat: Axes, reading: Reading) -> None:
    sizes = Sizes(reading.kv_heads)
    for entries in reading.layers:
        sizes.add(entries)
    layers = [entries.layer for entries in reading.layers]
    heads = [(kind, head) for kind in KINDS for head in range(reading.kv_heads)]
    rows = [[sizes.relative(layer, kind)[head] for layer in layers] for kind, head in heads]
    mesh = heat.pcolormesh(range(len(layers) + 1), range(len(rows) + 1), rows, cmap="viridis", vmin=0)
    heat.grid(visible=False)
    heat.set_yticks([row + 0.5 for row in range(len(rows))], [f"{kind[0].upper()} {head}" for kind, head in heads])
    heat.invert_yaxis()
    heat.set_xlabel("receiver layer")
    layer_ticks(heat, layers, 0.5)
    colour_bar(figure, mesh, heat, "added / own length")


def layer_ticks(panel: Axes, layers: Sequence[int], middle: float) -> None:
    """Name about ten layers below a panel whose columns are layers."""
    step = max(1, len(layers) // 10)
    places = range(0, len(layers), step)
    panel.set_xticks([place + middle for place in places], [str(layers[place]) for place in places])
