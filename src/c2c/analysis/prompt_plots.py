"""Plots of a fuser, and of one prompt as a pair reads it: gates, fusion strength, token alignment, entries, ranks."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from c2c.analysis.capture import KINDS, PromptCapture
from c2c.analysis.measures import join_captures, layer_gates, layer_norms, layer_ranks, middle_and_last
from c2c.analysis.plots import Plot, name_columns, plot_cache_map, plot_gates, plot_heat_map, plot_ranks
from c2c.fusers import Fuser

COLUMNS = 72  # characters on a line
_VISIBLE = str.maketrans({"\n": "\u21b5", "\t": "\u2192", "\r": None})


def fuser_plots(fuser: Fuser) -> list[Plot]:
    """Return the plots of a fuser that need no prompt: its gates."""
    return [plot_gates(layer_gates(fuser))]


def prompt_plots(capture: PromptCapture) -> list[Plot]:
    """Return all plots of one prompt."""
    norms = layer_norms(capture.layers, capture.fuser)
    chosen = middle_and_last([one.layer for one in capture.layers])
    captures = [one for one in capture.layers if one.layer in chosen]
    return [
        plot_gates([layer | norms[layer["layer"]] for layer in layer_gates(capture.fuser)]),
        plot_strength(capture),
        plot_alignment(capture),
        plot_cache_map(join_captures(captures), {one.layer: one.source for one in captures}),
        plot_ranks(layer_ranks(capture.layers), KINDS),
    ]


def fusion_strength(capture: PromptCapture) -> Tensor:
    """Return the norm of what is added to each token over its own, mean of keys and values: ``[layers, pairs]``."""
    layers = []
    for one in capture.layers:
        own, fused = (torch.stack([one.entries[side][kind] for kind in KINDS]) for side in ("receiver", "fused"))
        layers.append(((fused - own).norm(dim=-1) / own.norm(dim=-1).clamp_min(1e-12)).mean(0))
    return torch.stack(layers)


def plot_strength(capture: PromptCapture) -> Plot:
    """Plot how much fusion changes each token, as the colour of its text and by layer."""
    strength = fusion_strength(capture)
    tokens = [token for token, _ in capture.pairs]
    mean = dict(zip(tokens, strength.mean(0).tolist(), strict=True))
    highest = max(mean.values()) or 1.0
    boxes = list(layout(capture.receiver_tokens))
    lines = 1 + boxes[-1].line

    def draw(figure: Figure | SubFigure) -> None:
        text, heat = figure.subplots(2, 1, height_ratios=[lines, 8])
        _set_up(text, "Mean over layers", lines)
        for box in boxes:
            share = mean.get(box.token, -1) / highest
            if share >= 0:
                colour = matplotlib.colormaps["viridis"](share)
                text.barh(box.line + 0.5, box.width, left=box.start, height=0.9, color=colour)
            _write(text, box, 0.5, "gray" if share < 0 else "white" if share < 0.45 else "black")
        plot_heat_map(heat, strength.tolist(), "norm added / own norm")
        heat.set_yticks(range(len(capture.layers)), [str(one.layer) for one in capture.layers])
        heat.locator_params(axis="y", nbins=6)
        name_columns(heat, [str(token) for token in tokens])
        heat.set(title="By layer", xlabel="fused token", ylabel="receiver layer")

    caption = (
        "Norm of what fusion adds to a token's entries over the norm of its own, mean of keys and values. Grey tokens "
        "are not fused: the template before the message, and the last token, which reads the fused cache."
    )
    return Plot("Fusion strength over the prompt", caption, 2.6 + 0.22 * lines, draw)


def plot_alignment(capture: PromptCapture) -> Plot:
    """Plot both models' tokens above each other, with a line from each receiver token to the one that it reads."""
    reads = dict(capture.pairs)
    boxes = list(layout(capture.receiver_tokens))
    lines = 1 + boxes[-1].line

    def draw(figure: Figure | SubFigure) -> None:
        axes = figure.subplots()
        receiver, sharer = (name.rstrip("/").rpartition("/")[2] for name in capture.names)
        _set_up(axes, f"{receiver} above, {sharer} below", lines)
        readers: dict[tuple[int, int], list[Box]] = {}  # by line and sharer token
        for box in boxes:
            _write(axes, box, 0.2, "black" if box.token in reads else "gray")
            if box.token in reads:
                readers.setdefault((box.line, reads[box.token]), []).append(box)
        ends = [0] * lines
        for (line, token), above in readers.items():
            text = visible(capture.sharer_tokens[token])
            start = round(sum(box.middle for box in above) / len(above) - width(text) / 2)
            below = Box(token, text, line, max(ends[line], start))
            ends[line] = below.start + below.width
            _write(axes, below, 0.75, "tab:orange")
            for box in above:
                axes.plot([box.middle, below.middle], [line + 0.36, line + 0.58], c="tab:blue", lw=0.8)

    caption = (
        "A token of the message reads the sharer's token that covers its last character; the template after it reads "
        "the sharer's last token, which has read everything. Grey tokens read none. \u00b7: space, \u21b5: new line."
    )
    return Plot("Token alignment", caption, 0.6 + 0.65 * lines, draw)


class Box(NamedTuple):
    """Place of a token in lines of equally wide characters: its index, visible text, line and first column."""

    token: int
    text: str
    line: int
    start: int

    @property
    def width(self) -> int:
        """Columns of the text."""
        return width(self.text)

    @property
    def middle(self) -> float:
        """Middle column."""
        return self.start + self.width / 2


def layout(texts: Sequence[str]) -> Iterator[Box]:
    """Place tokens from the left, on the next line where one is full."""
    line = start = 0
    for token, text in enumerate(map(visible, texts)):
        if start > 0 and start + width(text) > COLUMNS:
            line, start = line + 1, 0
        yield Box(token, text, line, start)
        start += width(text)


def visible(text: str) -> str:
    """Replace what can't be seen in a token by marks."""
    text = text.translate(_VISIBLE)
    return ("\u00b7" + text[1:] if text.startswith(" ") else text) or "\u2205"


def width(text: str) -> int:
    """Count the columns of a text: East Asian wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _set_up(axes: Axes, title: str, lines: int) -> None:
    axes.set(title=title, xlim=(0, COLUMNS), ylim=(lines, 0))
    axes.axis("off")


def _write(axes: Axes, box: Box, height: float, colour: str) -> None:
    style = {"color": colour, "ha": "center", "va": "center", "family": "monospace", "fontsize": 8}
    axes.text(box.middle, box.line + height, box.text, style)
