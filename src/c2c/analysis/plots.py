"""Plots of analyses and of one prompt with matplotlib: as SVG files, PNG files and figures of an HTML page."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import matplotlib.style
import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from c2c.analysis.capture import KINDS, SIDES, PromptCapture
from c2c.analysis.measures import RANKED, join_captures, layer_gates, layer_norms, layer_ranks, middle_and_last
from c2c.utils import save_atomically, write_text

WIDTH = 6.4  # inches
LINE = 60  # tokens on a line
COLOURS = {"receiver": "tab:gray", "sharer": "tab:orange", "fused": "tab:blue"}
MARKERS = {"receiver": "o", "sharer": "s", "fused": "D"}
_STYLE = Path(__file__).with_name("plots.mplstyle")
_CAPTIONS = yaml.safe_load(Path(__file__).with_name("captions.yaml").read_text(encoding="utf-8"))
_VISIBLE = str.maketrans({"\n": "\u21b5", "\t": "\u2192", "\r": None})
_lock = Lock()  # matplotlib's style is global

Draw = Callable[[Figure | SubFigure], None]


@dataclass(frozen=True)
class Plot:
    """A plot that is drawn when it is needed, into a figure of its own or a part of one.

    ``draw`` draws it into an empty figure; ``height`` is in inches, for a width of 6.4.
    """

    title: str
    caption: str
    height: float
    draw: Draw

    @classmethod
    def of(cls, name: str, height: float, draw: Draw, **values: Any) -> Plot:
        """Make a plot with the title and the caption of a name in ``captions.yaml``, filled with values."""
        title, caption = (_CAPTIONS[name][part].format_map(values) for part in ("title", "caption"))
        return cls(title, caption, height, draw)

    def svg(self) -> str:
        """Return the plot as an SVG document, the same for the same numbers."""
        return self._render("svg", metadata={"Date": None}).decode()

    def _repr_png_(self) -> bytes:  # which notebooks show
        return self._render("png", dpi=110)

    def _render(self, kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        with _style(self.title):  # the ids of several SVG plots on one page must differ
            figure = Figure(figsize=(WIDTH, self.height))
            self.draw(figure)
            figure.savefig(file, format=kind, **options)
        return file.getvalue()


def html_figures(plots: Sequence[Plot]) -> str:
    """Return plots as ``<figure>`` elements with headings and captions."""
    return "\n".join(
        f"<figure><h2>{escape(plot.title)}</h2><svg{plot.svg().partition('<svg')[2]}"
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
        for plot in plots
    )


def save_plots(path: Path, title: str, plots: Sequence[Plot]) -> None:
    """Write plots to one HTML file, or else PNG file."""
    if path.suffix.lower() == ".html":
        head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title></head>'
        write_text(path, f"{head}<body><h1>{escape(title)}</h1>\n{html_figures(plots)}\n</body></html>\n")
    else:
        save_atomically(path.parent, lambda folder: _save_png(Path(folder) / path.name, title, plots))


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
    with _lock, matplotlib.style.context(["default", _STYLE, {"svg.hashsalt": salt}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


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


def plot_ranks(numbers: Mapping[str, Any], kinds: Sequence[str] = RANKED) -> Plot:
    """Plot effective ranks by layer, see :func:`c2c.analysis.measures.layer_ranks`."""
    titles = {"keys": "Keys as they lie in the cache", "keys_unrotated": "Keys without their rotary embedding"}
    layers = numbers["layers"]

    def draw(figure: Figure | SubFigure) -> None:
        for axes, kind in zip(figure.subplots(len(kinds), 1, sharex=True), kinds, strict=True):
            for side in SIDES:
                ranks = [layer[kind][side] for layer in layers]
                axes.plot([layer["layer"] for layer in layers], ranks, MARKERS[side] + "-", c=COLOURS[side], label=side)
            axes.set(title=titles.get(kind, "Values"), ylabel="effective rank", ylim=(0, None))
        axes.set_xlabel("receiver layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(ncols=3)

    return Plot.of("ranks", 2 * len(kinds), draw, **numbers)


def plot_gates(layers: Sequence[Mapping[str, Any]]) -> Plot:
    """Plot gates by layer, and norms by layer and head where ``layers`` has them."""
    heads = range(len(layers[0]["relative"]["keys"])) if "relative" in layers[0] else ()
    norms = [[layer["relative"][kind][head] for layer in layers] for kind in KINDS for head in heads]
    names = [str(layer["layer"]) for layer in layers]
    step = max(1, len(names) // 10)

    def draw(figure: Figure | SubFigure) -> None:
        above, *below = figure.subplots(2 if norms else 1, 1, squeeze=False)[:, 0]
        for kind, look in zip(KINDS, ("fused", "sharer"), strict=True):
            gates = [layer["gate"][kind] for layer in layers]
            above.plot(gates, MARKERS[look] + "-", c=COLOURS[look], label=kind)
        above.set(title="Gates", ylabel="openness", ylim=(-0.04, 1.04), xlim=(-0.5, len(layers) - 0.5))
        above.legend(ncols=2)
        for axes in below:
            image = axes.imshow(norms, aspect="auto", vmin=0, interpolation="nearest")
            axes.figure.colorbar(image, ax=axes, label="norm added / own norm")
            axes.grid(visible=False)
            axes.set_yticks(range(len(norms)), [f"{letter} {head}" for letter in "KV" for head in heads])
            axes.set_title("What is added, by KV head")
        for axes in (above, *below):
            axes.set_xticks(range(0, len(names), step), names[::step])
        axes.set_xlabel("receiver layer")

    return Plot.of("norms" if norms else "gates", 0.25 * len(norms) + 3 if norms else 2, draw)


def plot_cache_map(
    entries: Mapping[tuple[int, str], Mapping[str, Any]], sources: Mapping[int, int], method: str = "pca", seed: int = 0
) -> Plot:
    """Plot entries in the plane: receiver and fused ones on axes of both together, the sharer's on their own."""

    def scatter(axes: Axes, sides: Mapping[str, Any], title: str) -> None:
        points, (x, y) = project(torch.cat([*sides.values()]), method, seed)
        parts = points.reshape(len(sides), -1, 2)
        if len(parts) > 1:
            axes.plot(*parts.transpose(2, 0, 1), color="lightgray", lw=0.5, zorder=1)
        for side, part in zip(sides, parts, strict=True):
            axes.plot(*part.T, MARKERS[side], c=COLOURS[side], alpha=0.6, ms=3, label=side)
        axes.set(title=title, xlabel=x, ylabel=y, xticklabels=[], yticklabels=[])

    def draw(figure: Figure | SubFigure) -> None:
        rows = figure.subplots(len(entries), 2, squeeze=False)
        for (left, right), ((layer, kind), sides) in zip(rows, entries.items(), strict=True):
            scatter(left, {side: sides[side] for side in ("receiver", "fused")}, f"Layer {layer}, {kind}")
            scatter(right, {"sharer": sides["sharer"]}, f"Sharer layer {sources[layer]}, {kind}")
        for axes in rows[0]:
            axes.legend()

    count = len(next(iter(entries.values()))["receiver"])
    name = {"pca": "PCA", "tsne": "t-SNE"}[method]
    return Plot.of("cache_map", 1.9 * len(entries), draw, method=name, count=count)


def project(x: Tensor, method: str = "pca", seed: int = 0) -> tuple[Any, tuple[str, str]]:
    """Project entries ``[rows, channels]`` to the plane: points ``[rows, 2]`` and the names of both axes."""
    data = x.double().numpy()
    if method == "tsne":
        perplexity = min(30.0, (len(data) - 1) / 3)
        tsne = import_module("sklearn.manifold").TSNE(init="pca", perplexity=perplexity, random_state=seed)
        return tsne.fit_transform(data), ("t-SNE 1", "t-SNE 2")
    if len(data) < 2:
        return np.zeros((len(data), 2)), ("PC 1", "PC 2")
    pca = import_module("sklearn.decomposition").PCA(n_components=2, svd_solver="full")
    with np.errstate(invalid="ignore"):  # where nothing varies, shares of the variance are 0 / 0
        points = pca.fit_transform(data)
    first, second = np.nan_to_num(pca.explained_variance_ratio_)
    return points, (f"PC 1 ({100 * first:.0f} %)", f"PC 2 ({100 * second:.0f} %)")


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
    step = max(1, len(names) // 8)
    tokens = [visible(capture.receiver_tokens[token]) for token, _ in capture.pairs]
    parts = rows.split(LINE, dim=1)
    highest = float(rows.quantile(0.99)) or 1.0  # single entries that stand out would darken all others

    def draw(figure: Figure | SubFigure) -> None:
        lines = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
        for index, (axes, part) in enumerate(zip(lines, parts, strict=True)):
            image = axes.imshow(part.numpy(), aspect="auto", vmin=0, vmax=highest, interpolation="nearest")
            axes.grid(visible=False)
            axes.set(xlim=(-0.5, LINE - 0.5), ylabel="receiver layer")  # columns of all lines are equally wide
            axes.set_xticks(range(part.shape[1]), tokens[index * LINE :][:LINE], rotation=90, fontsize=6)
            axes.set_yticks(range(0, len(names), step), names[::step])
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


def plot_accuracies(name: str, numbers: Mapping[str, Any], estimates: Mapping[str, Mapping[str, Any]]) -> Plot:
    """Plot a row for each estimate: its name, its accuracy and its 95 % interval."""

    def draw(figure: Figure | SubFigure) -> None:
        axes = figure.subplots()
        for row, estimate in enumerate(estimates.values()):
            axes.plot(estimate["ci95"], [row, row], c="tab:blue")
            axes.plot(estimate["accuracy"], row, "o", c="tab:blue")
        axes.set_yticks(range(len(estimates)), [f"{name}  {one['accuracy']:.1f}" for name, one in estimates.items()])
        axes.invert_yaxis()
        axes.set_xlabel("accuracy, percent")

    return Plot.of(name, 0.6 + 0.25 * len(estimates), draw, **numbers)


def plot_curves(
    name: str, numbers: Mapping[str, Any], curves: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]], **axis: Any
) -> Plot:
    """Plot accuracies with their 95 % intervals shaded; ``curves`` has points (x, estimate) by label."""

    def draw(figure: Figure | SubFigure) -> None:
        axes = figure.subplots()
        for index, (label, points) in enumerate(curves.items()):
            x, estimates = zip(*points, strict=True)
            low, high = zip(*(estimate["ci95"] for estimate in estimates), strict=True)
            axes.fill_between(x, low, high, color=f"C{index}", alpha=0.15, lw=0)
            values = [estimate["accuracy"] for estimate in estimates]
            axes.plot(x, values, "osDv^"[index] + "-", c=f"C{index}", label=label)
        axes.set(ylabel="accuracy, percent", **axis)
        axes.minorticks_off()
        axes.legend()

    return Plot.of(name, 3.6, draw, **numbers)


def plot_analysis(name: str, numbers: Mapping[str, Any]) -> Plot:
    """Plot the numbers of the analysis of a name."""
    match name:
        case "effective-rank":
            return plot_ranks(numbers)
        case "gates":
            return plot_gates(numbers["layers"])
        case "cache-map":
            sources = {layer["layer"]: layer["sharer_layer"] for layer in numbers["layers"]}
            return plot_cache_map(numbers["_entries"], sources, numbers["method"], numbers["_seed"])
        case "progressive":
            curves = {
                f"{part} part": [(one["fraction"], one) for one in numbers[part]] for part in ("former", "latter")
            }
            curves["deranged, all positions"] = [(fraction, numbers["deranged"]) for fraction in (0.0, 1.0)]
            return plot_curves(name, numbers, curves, xlabel="share of the aligned positions that is fused")
        case "scaling":
            rows = numbers["rows"]
            names = dict.fromkeys(system for row in rows for system in row["systems"])
            curves = {
                one: [(row["parameters"], row["systems"][one]) for row in rows if one in row["systems"]]
                for one in names
            }
            sizes = sorted({row["parameters"] for row in rows})
            axis = {"xscale": "log", "xticks": sizes, "xticklabels": [f"{size / 1e9:.3g}B" for size in sizes]}
            return plot_curves(name, numbers, curves, xlabel="parameters of the sharer", **axis)
        case "precision":
            scores = {f"{one['precision']}, {one['bytes'] / 1e3:,.0f} kB": one for one in numbers["precisions"]}
            scores |= {"deranged": numbers["deranged"], "receiver alone": numbers["receiver"]}
        case "layers":
            scores = numbers["systems"] | {f"layer {one['layer']} only": one for one in numbers["single"]}
        case _:
            scores = {system.replace("_", "-"): score for system, score in numbers["systems"].items()}
    return plot_accuracies(name, numbers, scores)
