"""Plots of analyses, drawn with matplotlib: SVG files, PNG files and figures of an HTML page."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from threading import Lock
from typing import Any

import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, NullFormatter

from c2c.analysis.capture import KINDS, SIDES
from c2c.analysis.config import AnalysisError
from c2c.analysis.measures import project
from c2c.utils import save_atomically, write_text

WIDTH = 6.4  # inches
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 4,
    "svg.fonttype": "none",  # a browser has fonts for letters that matplotlib's lacks
    "text.parse_math": False,  # tokens may hold dollar signs
}
LOOKS = {
    "receiver": {"color": "tab:gray", "marker": "o"},
    "sharer": {"color": "tab:orange", "marker": "s"},
    "fused": {"color": "tab:blue", "marker": "D"},
    "matched": {"color": "tab:blue", "marker": "D"},
    "deranged": {"color": "tab:purple", "marker": "v"},
    "text": {"color": "tab:green", "marker": "^"},
}
_lock = Lock()  # matplotlib's style is global


@dataclass(frozen=True)
class Plot:
    """A plot that is drawn when it is needed, into a figure of its own or a part of another.

    Attributes:
        name: short name.
        title: what it shows.
        caption: how to read it.
        height: in inches, for a width of 6.4.
        draw: draws it into an empty figure.
    """

    name: str
    title: str
    caption: str
    height: float
    draw: Callable[[Figure | SubFigure], None]

    def figure(self) -> Figure:
        """Draw the plot into a figure of its own."""
        with _style():
            figure = Figure(figsize=(WIDTH, self.height))
            self.draw(figure)
        return figure

    def svg(self) -> str:
        """Return the plot as an SVG document, the same for the same numbers."""
        figure, file = self.figure(), io.StringIO()
        with _style(self.name):  # ids of several plots on one page must differ
            figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def html_figures(plots: Sequence[Plot]) -> str:
    """Return plots as ``<figure>`` elements with headings and captions."""
    return "\n".join(
        f"<figure><h2>{escape(plot.title)}</h2>{svg[svg.index('<svg') :]}<figcaption>{escape(plot.caption)}</figcaption>"
        "</figure>"
        for plot, svg in ((plot, plot.svg()) for plot in plots)
    )


def save_plots(path: Path, title: str, plots: Sequence[Plot]) -> None:
    """Write plots to one PNG or HTML file.

    Raises:
        AnalysisError: the file can't be written.
    """
    try:
        if path.suffix.lower() == ".html":
            head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title></head>'
            write_text(path, f"{head}<body><h1>{escape(title)}</h1>\n{html_figures(plots)}\n</body></html>\n")
        else:
            save_atomically(path.parent, lambda folder: _save_png(Path(folder) / path.name, title, plots))
    except OSError as error:
        raise AnalysisError(f"the plots could not be written to {path}: {error}.") from error


def _save_png(path: Path, title: str, plots: Sequence[Plot]) -> None:
    captions = [textwrap.fill(plot.caption, 100) for plot in plots]
    heights = [plot.height + 0.4 + 0.15 * caption.count("\n") for plot, caption in zip(plots, captions, strict=True)]
    with _style():
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.4))
        figure.suptitle(title)
        parts = figure.subfigures(len(plots), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, plot, caption in zip(parts, plots, captions, strict=True):
            plot.draw(part)
            part.suptitle(plot.title, weight="bold")
            part.supxlabel(caption, fontsize=8)
        figure.savefig(path, format="png", dpi=144)


@contextmanager
def _style(salt: str = "c2c") -> Iterator[None]:
    """Use this module's style and not the user's, so that the same numbers give the same file."""
    with _lock, matplotlib.style.context(["default", STYLE | {"svg.hashsalt": salt}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


# -- plots of analyses ------------------------------------------------------------------------------------------------


def plot_ranks(numbers: Mapping[str, Any], kinds: Sequence[str] = ("keys", "keys_unrotated", "values")) -> Plot:
    """Plot effective ranks by layer, of the numbers of ``layer_ranks``."""
    titles = {
        "keys": "Keys as they lie in the cache",
        "keys_unrotated": "Keys without their rotary embedding",
        "values": "Values",
    }

    def draw(figure: Figure | SubFigure) -> None:
        for axes, kind in zip(figure.subplots(len(kinds), 1, sharex=True), kinds, strict=True):
            layers = numbers["layers"]
            for side in SIDES:
                ranks = [layer[kind][side] for layer in layers]
                axes.plot([layer["layer"] for layer in layers], ranks, label=side, **LOOKS[side])
            axes.set(title=titles[kind], ylabel="effective rank", ylim=(0, None))
        axes.set_xlabel("receiver layer")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3)

    caption = (
        f"Effective rank over {numbers['tokens']} aligned positions ({numbers['sharer_tokens']} of the sharer, whose layer "
        "is the one that the receiver's layer reads). A rank is at most the number of positions or channels: compare "
        "ranks of the same positions only. Higher is no proof of content."
    )
    return Plot("ranks", "Effective rank by layer", caption, 2 * len(kinds), draw)


def plot_gates(layers: Sequence[Mapping[str, Any]]) -> Plot:
    """Plot gates by layer, and where ``layers`` has them also norms by layer and head."""
    names = [str(layer["layer"]) for layer in layers]
    norms = [
        (f"{kind[0].upper()} {head}", [layer["relative"][kind][head] for layer in layers])
        for kind in KINDS
        for head in range(len(layers[0].get("relative", {}).get(kind, ())))
    ]

    def draw(figure: Figure | SubFigure) -> None:
        rows = figure.subplots(2 if norms else 1, 1, squeeze=False)[:, 0]
        for kind, side in zip(KINDS, ("fused", "sharer"), strict=True):
            rows[0].plot([layer["gate"][kind] for layer in layers], label=kind, **LOOKS[side])
        rows[0].set(title="Gates", ylabel="openness", ylim=(-0.04, 1.04), xlim=(-0.5, len(layers) - 0.5))
        rows[0].legend(ncols=2)
        if norms:
            labels, values = zip(*norms, strict=True)
            plot_heat_map(figure, rows[1], values, "norm added / own norm")
            rows[1].set_yticks(range(len(labels)), labels)
            rows[1].set_title("What is added, by KV head")
        for axes in rows:
            name_columns(axes, names)
        rows[-1].set_xlabel("receiver layer")

    caption = "How open each layer is to the sharer, keys and values; a gate says nothing of what stands behind it."
    if norms:
        caption += " Below: mean norm of what is added over the mean norm of the receiver's own keys (K) and values (V)."
    height = 2 + (1 + max(1, 0.25 * len(norms)) if norms else 0)
    return Plot("gates", "Gate and weight by layer and head", caption, height, draw)


def plot_cache_map(
    entries: Mapping[tuple[int, str], Mapping[str, Any]], sources: Mapping[int, int], method: str = "pca", seed: int = 0
) -> Plot:
    """Plot entries in the plane: receiver and fused ones on axes of both together, the sharer's on their own."""

    def draw(figure: Figure | SubFigure) -> None:
        rows = figure.subplots(len(entries), 2, squeeze=False)
        for (together, alone), ((layer, kind), sides) in zip(rows, entries.items(), strict=True):
            points, names = project(torch.cat([sides["receiver"], sides["fused"]]), method, seed)
            own, fused = points[: len(points) // 2], points[len(points) // 2 :]
            together.plot(*zip(own.T, fused.T, strict=True), color="lightgray", lw=0.5, zorder=1)
            _scatter(together, own, "receiver", names)
            _scatter(together, fused, "fused", names)
            together.set_title(f"Layer {layer}, {kind}")
            points, names = project(sides["sharer"], method, seed)
            _scatter(alone, points, "sharer", names)
            alone.set_title(f"Sharer layer {sources[layer]}, {kind}")
        found = [axes.get_legend_handles_labels() for axes in rows[0]]
        handles, labels = (sum(parts, []) for parts in zip(*found, strict=True))
        figure.legend(handles, labels, loc="outside upper right", ncols=3)

    count = len(next(iter(entries.values()))["receiver"])
    caption = (
        f"{count} aligned positions. Left: the receiver's entries and what fusion made of them, joined by lines. Right: "
        "the sharer's entries that they read, on axes of their own, as their channels differ: compare their shape, not "
        "their place. Keys without their rotary embedding."
    )
    name = {"pca": "PCA", "tsne": "t-SNE"}[method]
    return Plot("maps", f"{name} of the three caches", caption, 1.9 * len(entries), draw)


def plot_progressive(numbers: Mapping[str, Any]) -> Plot:
    """Plot accuracy by the share of the positions that is fused."""

    def draw(figure: Figure | SubFigure) -> None:
        axes = figure.subplots()
        for part, look in (("former", "sharer"), ("latter", "matched")):
            curve = numbers[part]
            plot_band(axes, [point["fraction"] for point in curve], curve, look, f"{part} part")
        axes.axhline(numbers["deranged"]["accuracy"], color="tab:purple", ls=":", label="deranged, all")
        axes.set(xlabel="share of the aligned positions that is fused", ylabel="accuracy, percent")
        axes.legend()

    caption = (
        f"{numbers['n']} questions; shaded: 95 % intervals. 0 is the receiver alone and 1 the whole fused cache. "
        "Dotted: all positions fused with another question's cache."
    )
    return Plot("progressive", "Progressive fusion", caption, 3.6, draw)


def plot_layers(numbers: Mapping[str, Any]) -> Plot:
    """Plot accuracy with each layer alone, and with parts of the cache fused."""
    systems, single = numbers["systems"], numbers["single"]

    def draw(figure: Figure | SubFigure) -> None:
        above, below = figure.subplots(2, 1)
        values = [one["accuracy"] for one in single]
        ends = [
            [abs(one["ci95"][end] - value) for one, value in zip(single, values, strict=True)] for end in (0, 1)
        ]
        above.errorbar([one["layer"] for one in single], values, ends, fmt="o", color="tab:pink", label="this layer only")
        for name, label in (("receiver", "receiver"), ("matched", "all layers")):
            above.axhline(systems[name]["accuracy"], color=LOOKS[name]["color"], ls=":", label=label)
        above.set(title="One layer fused", xlabel="receiver layer", ylabel="accuracy, percent")
        above.legend(ncols=3)
        plot_intervals(below, {name: score for name, score in systems.items() if name != "zero"})
        below.set_title("Parts of the cache fused")

    caption = f"{numbers['n']} questions, dots with 95 % intervals. Thirds of the fused layers: {numbers['thirds']}."
    return Plot("layers", "Which layers carry the message", caption, 5.4, draw)


def plot_precision(numbers: Mapping[str, Any]) -> Plot:
    """Plot accuracy by the precision of the entries sent."""
    rows = {f"{one['precision']}, {one['bytes'] / 1e3:,.0f} kB": one for one in numbers["precisions"]}
    rows |= {"deranged": numbers["deranged"], "receiver alone": numbers["receiver"]}
    caption = f"{numbers['n']} questions, dots with 95 % intervals; kilobytes of the sharer's entries per question."
    return Plot("precision", "Accuracy by precision", caption, 2.4, lambda figure: plot_intervals(figure.subplots(), rows))


def plot_enrichment(numbers: Mapping[str, Any]) -> Plot:
    """Plot accuracy of direct, few-shot and oracle."""
    rows = {name.replace("_", "-"): score for name, score in numbers["systems"].items()}
    caption = (
        f"{numbers['n']} questions, dots with 95 % intervals. Few-shot: {numbers['shots']} exemplars before the question "
        f"({numbers['tokens']['few_shot']:.0f} tokens). Oracle: the same, then the exemplars' entries are dropped, so that "
        f"the cache is as long as that of direct ({numbers['tokens']['direct']:.0f})."
    )
    return Plot("enrichment", "Cache enrichment", caption, 1.8, lambda figure: plot_intervals(figure.subplots(), rows))


def plot_scaling(numbers: Mapping[str, Any]) -> Plot:
    """Plot accuracy by the size of the sharer."""

    def draw(figure: Figure | SubFigure) -> None:
        axes = figure.subplots()
        for name in LOOKS:
            rows = [row for row in numbers["rows"] if name in row["systems"]]
            if rows:
                plot_band(axes, [row["parameters"] for row in rows], [row["systems"][name] for row in rows], name, name)
        axes.set(xscale="log", xlabel="parameters of the sharer", ylabel="accuracy, percent")
        axes.set_xticks(sorted({row["parameters"] for row in numbers["rows"]}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count / 1e9:.3g}B"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend()

    caption = f"Receiver {numbers['receiver']}, {numbers['n']} questions; shaded: 95 % intervals."
    return Plot("scaling", "Accuracy by the size of the sharer", caption, 3.8, draw)


# -- parts of plots ---------------------------------------------------------------------------------------------------


def plot_band(axes: Axes, x: Sequence[float], estimates: Sequence[Mapping[str, Any]], look: str, label: str) -> None:
    """Draw a line of accuracies with their intervals shaded."""
    low, high = zip(*(estimate["ci95"] for estimate in estimates), strict=True)
    axes.fill_between(x, low, high, color=LOOKS[look]["color"], alpha=0.15, lw=0)
    axes.plot(x, [estimate["accuracy"] for estimate in estimates], label=label, **LOOKS[look])


def plot_intervals(axes: Axes, estimates: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw a row for each estimate: its name, its interval and its accuracy."""
    for row, estimate in enumerate(estimates.values()):
        axes.plot(estimate["ci95"], [row, row], color="tab:blue")
        axes.plot(estimate["accuracy"], row, "o", color="tab:blue")
    axes.set_yticks(range(len(estimates)), [f"{name}  {one['accuracy']:.1f}" for name, one in estimates.items()])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, percent")


def plot_heat_map(figure: Figure | SubFigure, axes: Axes, values: Sequence[Sequence[float]], label: str) -> None:
    """Draw a heat map with its scale; the first row is at the top."""
    image = axes.imshow(values, aspect="auto", vmin=0, interpolation="nearest")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label=label)


def name_columns(axes: Axes, names: Sequence[str]) -> None:
    """Name about ten of the columns 0, 1, 2, ..."""
    step = max(1, len(names) // 10)
    axes.set_xticks(range(0, len(names), step), names[::step])


def _scatter(axes: Axes, points: Any, side: str, names: tuple[str, str]) -> None:
    axes.plot(*points.T, ls="", alpha=0.6, label=side, **LOOKS[side] | {"markersize": 3})
    axes.set(xlabel=names[0], ylabel=names[1], xticklabels=[], yticklabels=[])


ANALYSES: dict[str, Callable[[Mapping[str, Any]], Plot]] = {
    "effective-rank": plot_ranks,
    "cache-map": lambda numbers: plot_cache_map(
        numbers["_entries"],
        {layer["layer"]: layer["sharer_layer"] for layer in numbers["layers"]},
        numbers["method"],
        numbers["_seed"],
    ),
    "gates": lambda numbers: plot_gates(numbers["layers"]),
    "progressive": plot_progressive,
    "precision": plot_precision,
    "layers": plot_layers,
    "enrichment": plot_enrichment,
    "scaling": plot_scaling,
}
