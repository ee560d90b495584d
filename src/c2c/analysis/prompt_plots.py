"""Plots of a fuser, and of one prompt as a pair reads it: gates, fusion strength, token alignment, entries, ranks."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from c2c.analysis.capture import KINDS, PromptCapture
from c2c.analysis.measures import join_captures, layer_gates, layer_norms, layer_ranks, middle_and_last
from c2c.analysis.plots import Plot, plot_cache_map, plot_gates, plot_ranks
from c2c.fusers import Fuser

LINE = 60  # tokens on a line
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
    """Plot how much fusion changes each token, by layer and in the mean."""
    strength = fusion_strength(capture)
    rows = torch.cat([strength.mean(0, keepdim=True), strength])
    names = ["mean", *(str(one.layer) for one in capture.layers)]
    tokens = [visible(capture.receiver_tokens[token]) for token, _ in capture.pairs]
    parts = rows.split(LINE, dim=1)
    highest = float(rows.quantile(0.99)) or 1.0  # single entries that stand out would darken all others

    def draw(figure: Figure | SubFigure) -> None:
        lines = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
        for index, (axes, part) in enumerate(zip(lines, parts, strict=True)):
            image = axes.imshow(part.numpy(), aspect="auto", vmin=0, vmax=highest, interpolation="nearest")
            axes.grid(visible=False)
            axes.set_xlim(-0.5, LINE - 0.5)  # columns of all lines are equally wide
            axes.set_xticks(range(part.shape[1]), tokens[index * LINE :][:LINE], rotation=90, fontsize=6)
            step = max(1, len(names) // 8)
            axes.set_yticks(range(0, len(names), step), names[::step])
            axes.set_ylabel("receiver layer")
        figure.colorbar(image, ax=lines, label="norm added / own norm", extend="max")

    return Plot.of("strength", 2.4 * len(parts), draw)


def plot_alignment(capture: PromptCapture) -> Plot:
    """Plot both models' tokens above each other, with a line from each receiver token to the one that it reads."""
    reads = dict(capture.pairs)
    starts = range(0, len(capture.receiver_tokens), LINE)

    def draw(figure: Figure | SubFigure) -> None:
        for axes, start in zip(figure.subplots(len(starts), 1, squeeze=False)[:, 0], starts, strict=True):
            readers: dict[int, list[int]] = {}
            for column, text in enumerate(capture.receiver_tokens[start : start + LINE]):
                read = reads.get(start + column)
                write(axes, column, 1, text, "gray" if read is None else "black")
                if read is not None:
                    readers.setdefault(read, []).append(column)
            for read, above in readers.items():
                below = sum(above) / len(above)
                write(axes, below, 0, capture.sharer_tokens[read], "tab:orange")
                for column in above:
                    axes.plot([column, below], [0.9, 0.1], c="tab:blue", lw=0.8)
            axes.set(xlim=(-0.5, LINE - 0.5), ylim=(-1.2, 2.2))
            axes.axis("off")

    def write(axes: Axes, column: float, height: int, text: str, colour: str) -> None:
        place = {"ha": "center", "va": "bottom" if height else "top", "rotation": 90, "fontsize": 6}
        axes.text(column, height, visible(text), place, color=colour)

    return Plot.of("alignment", 1.6 * len(starts), draw, names=capture.names)


def visible(text: str) -> str:
    """Replace what can't be seen in a token by marks."""
    text = text.translate(_VISIBLE)
    return ("\u00b7" + text[1:] if text.startswith(" ") else text) or "\u2205"
