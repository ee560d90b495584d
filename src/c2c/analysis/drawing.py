"""Panels for the plots of analyses, in the look of the report's plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from c2c.reporting.canvas import HEADING, PAINT, TEXT, WIDTH, Plot, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEFT, RIGHT, TOP, BOTTOM, LEGEND = 54, 14, 34, 46, 26  # pixels


def panels(
    titles: Sequence[str], heights: Sequence[float], *, columns: int = 1, left: float = LEFT, right: float = RIGHT
) -> tuple[Figure, list[Axes]]:
    """A figure with a legend's room at the top and panels below each other, row by row.

    Args:
        titles: of every panel.
        heights: of every row of panels, in pixels.
        columns: panels in a row.
        left: room for the labels on the left of each panel, in pixels.
        right: room on its right.
    """
    from matplotlib.figure import Figure

    total = LEGEND + sum(heights) + len(heights) * (TOP + BOTTOM)
    figure = Figure(figsize=(WIDTH / 72, total / 72), dpi=72)
    figure.patch.set_alpha(0)
    width = WIDTH / columns
    axes = []
    for index, title in enumerate(titles):
        row, column = divmod(index, columns)
        above = LEGEND + sum(heights[:row]) + row * (TOP + BOTTOM) + TOP
        bottom = total - above - heights[row]
        box = ((column * width + left) / WIDTH, bottom / total, (width - left - right) / WIDTH, heights[row] / total)
        axes.append(_dress(figure.add_axes(box), title))
    return figure, axes


def _dress(axes: Axes, title: str) -> Axes:
    axes.patch.set_alpha(0)
    axes.spines[["right", "top"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PAINT["grid"])
    axes.tick_params(axis="both", which="both", colors=PAINT["muted"], labelsize=TEXT - 1.5, length=0, pad=4)
    axes.grid(color=PAINT["grid"], lw=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=PAINT["muted"], fontsize=TEXT - 1)
    axes.set_title(title, loc="left", fontsize=HEADING, weight="bold", color=PAINT["ink"], pad=9)
    return axes


def legend(figure: Figure, *axes: Axes, markerscale: float = 1.0) -> None:
    """Name what has a label in ``axes``, in one line at the top of the figure."""
    found = [one.get_legend_handles_labels() for one in axes]
    handles, labels = ([item for part in parts for item in part] for parts in zip(*found, strict=True))
    figure.legend(
        handles,
        labels,
        loc="upper left",
        ncols=len(labels),
        frameon=False,
        labelcolor=PAINT["ink"],
        fontsize=TEXT - 1,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1.2,
        borderaxespad=0.2,
        markerscale=markerscale,
    )


def colour_bar(figure: Figure, mesh: Any, axes: Axes, label: str) -> None:
    """The scale of a heat map, in the room on its right."""
    box = axes.get_position()
    bar = figure.colorbar(mesh, cax=figure.add_axes((box.x1 + 10 / WIDTH, box.y0, 9 / WIDTH, box.height)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=PAINT["muted"], labelsize=TEXT - 2.5, length=0)
    bar.set_label(label, color=PAINT["muted"], fontsize=TEXT - 2)


def band(axes: Axes, x: Sequence[float], estimates: Sequence[dict[str, Any]], colour: str, **line: Any) -> None:
    """A line of accuracies with their intervals shaded.

    Args:
        axes: where.
        x: one number per estimate.
        estimates: each with ``accuracy`` and ``ci95``.
        colour: name of a colour of the canvas.
        **line: passed to ``plot``.
    """
    low, high = zip(*(estimate["ci95"] for estimate in estimates), strict=True)
    axes.fill_between(x, low, high, color=PAINT[colour], alpha=0.14, lw=0)
    axes.plot(x, [estimate["accuracy"] for estimate in estimates], color=PAINT[colour], **line)


def level(axes: Axes, value: float, colour: str, label: str) -> None:
    """A dotted line across a panel."""
    axes.axhline(value, color=PAINT[colour], lw=1.3, ls=(0, (2, 2)), label=label)


def dots(axes: Axes, estimates: dict[str, dict[str, Any]], colour: str) -> None:
    """A row for each estimate: name, interval, dot and value."""
    names = list(estimates)
    for row, name in enumerate(names):
        estimate = estimates[name]
        axes.plot(estimate["ci95"], [row, row], color=PAINT[colour], lw=2)
        axes.plot([estimate["accuracy"]], [row], color=PAINT[colour], marker="o", ms=6.5, ls="")
        axes.annotate(
            f"{estimate['accuracy']:.1f}",
            (1.02, row),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            color=PAINT["ink"],
            fontsize=TEXT - 1,
        )
    axes.set_yticks(range(len(names)), names, color=PAINT["ink"])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("accuracy, percent")


def done(name: str, title: str, caption: str, figure: Figure) -> Plot:
    """A drawn figure as a plot."""
    return finish(name, title, caption, figure, "c2c")
