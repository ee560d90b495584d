"""Effective rank of the three caches of one prompt, layer by layer."""

from __future__ import annotations

from c2c.analysis.drawing import legend, panels
from c2c.analysis.rank import Grams
from c2c.plots.picture import Picture
from c2c.plots.reading import Reading
from c2c.reporting.canvas import PAINT

_TITLES = {"keys": "Keys as they lie in the cache", "values": "Values"}
_LOOKS = {"sharer": ("sharer", "s"), "receiver": ("receiver", "o"), "fused": ("matched", "D")}


def draw_ranks(reading: Reading) -> Picture:
    """Lines of the sharer's, the receiver's and the fused cache."""
    grams = Grams()
    for entries in reading.layers:
        grams.add(entries)
    ranks = grams.ranks()
    layers = sorted(ranks)
    figure, axes = panels(list(_TITLES.values()), [130] * len(_TITLES))
    for panel, kind in zip(axes, _TITLES, strict=True):
        for side, (colour, marker) in _LOOKS.items():
            found = [ranks[layer][kind][side] for layer in layers]
            panel.plot(layers, found, color=PAINT[colour], lw=1.4, marker=marker, ms=3, label=side)
        panel.set_ylabel("effective rank")
        panel.set_ylim(bottom=0)
        panel.set_xlabel("receiver layer")
        panel.set_xticks(layers[:: max(1, len(layers) // 10)])
    legend(figure, axes[0])
    caption = (
        f"How many directions the entries of these {grams.tokens} tokens ({grams.sharer_tokens} of the sharer) use. A "
        "rank is at most the number of tokens or channels: compare lines of one picture only. Higher is no proof of "
        "content."
    )
    return Picture("ranks", "Effective rank by layer", caption, figure)
