"""Where the entries of one prompt lie: receiver and fused ones, and the sharer's beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from c2c.analysis.drawing import legend, panels
from c2c.analysis.entries import LayerEntries
from c2c.analysis.maps import principal_axes
from c2c.plots.picture import Picture
from c2c.plots.reading import Reading
from c2c.reporting.canvas import PAINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS = {"keys": "unrotated", "values": "values"}  # keys without their rotation, which spreads them by position


def draw_maps(reading: Reading) -> Picture:
    """Principal components of the middle and the last fused layer."""
    middle = reading.layers[len(reading.layers) // 2]
    chosen = [middle] if middle is reading.layers[-1] else [middle, reading.layers[-1]]
    titles = []
    for entries in chosen:
        for kind in _KINDS:
            titles += [f"Layer {entries.layer}, {kind}", f"Sharer layer {entries.source}, {kind}"]
    figure, axes = panels(titles, [130] * (len(titles) // 2), columns=2, left=28, right=20)
    pairs = iter(zip(axes[::2], axes[1::2], strict=True))
    for entries in chosen:
        for field in _KINDS.values():
            _row(*next(pairs), entries, field)
    legend(figure, axes[0], axes[1])
    caption = (
        "Each dot is a token, on the two strongest principal axes. Left: what the receiver had and what fusion made of "
        "it, on axes of both together, joined by lines. Right: the sharer's entries on axes of their own: compare "
        "their shape, not their place. Keys without their rotary embedding."
    )
    return Picture("maps", "PCA of the three caches", caption, figure)


def _row(here: Axes, beside: Axes, entries: LayerEntries, field: str) -> None:
    own, fused = getattr(entries.receiver, field), getattr(entries.fused, field)
    at, shares = principal_axes(torch.cat([own, fused]))
    ours, ends = at[: len(own)], at[len(own) :]
    here.plot(*torch.stack([ours, ends]).permute(2, 0, 1).unbind(), color=PAINT["grid"], lw=0.6, zorder=1)
    _dots(here, ours, "receiver", "o", "receiver", shares)
    _dots(here, ends, "matched", "D", "fused", shares)
    theirs = getattr(entries.sharer, field)[entries.first]
    their_at, their_shares = principal_axes(theirs)
    _dots(beside, their_at, "sharer", "s", "sharer", their_shares)


def _dots(panel: Axes, at: Tensor, colour: str, marker: str, label: str, shares: list[float]) -> None:
    x, y = at.t().tolist()
    panel.plot(x, y, ls="", marker=marker, ms=3.2, mew=0, alpha=0.7, color=PAINT[colour], label=label)
    panel.set_xlabel(f"PC 1 ({100 * shares[0]:.0f} %)", labelpad=2)
    panel.set_ylabel(f"PC 2 ({100 * shares[1]:.0f} %)", labelpad=2)
    panel.set_xticklabels([])
    panel.set_yticklabels([])
