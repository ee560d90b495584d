"""Plots of rows under headings: a label, a dot and an interval for every run, and a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from c2c.reporting.canvas import HEADING, PAINT, TEXT, WIDTH, new_axes, short
from c2c.reporting.text import Estimate, Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW, _RUN, _GAP, _BOTTOM = 21, 6, 30, 44  # heights in pixels
_LABEL = 24  # letters


@dataclass(frozen=True)
class Line:
    """One row of a plot: a label, and one estimate per run."""

    label: str
    estimates: list[Estimate]
    colour: str
    marker: str
    hollow: list[bool]
    value: str
    lost: bool


@dataclass
class Block:
    """The rows of a task; ``top`` is where the first one begins, in pixels from the figure's top."""

    task: str
    lines: list[Line]
    top: float = field(default=0.0)


def draw_rows(blocks: Sequence[Block], runs: int, unit: Unit, *, zero: bool) -> tuple[Figure, Axes]:
    """A figure with a heading per block and a row per line; y counts pixels from the top."""
    lines = [line for block in blocks for line in block.lines]
    left = 14 + 7.2 * min(_LABEL, max(len(line.label) for line in lines))
    right = 16 + 7.4 * max(len(line.value) for line in lines)
    height = 0.0
    for block in blocks:
        block.top = height + _GAP
        height = block.top + len(block.lines) * row_height(runs)
    figure, axes = new_axes((left, right, 2, _BOTTOM), height + 6)
    axes.set_ylim(height + 6, 0)
    axes.set_yticks([])
    axes.set_xlim(*_limits([one for line in lines for one in line.estimates], unit, zero))
    for block in blocks:
        x = -left / (WIDTH - left - right)
        write(axes, x, block.top - 10, short(block.task, 42), "left", bold=True, size=HEADING)
        for position, line in enumerate(block.lines):
            _draw(axes, line, block.top + (position + 0.5) * row_height(runs))
    return figure, axes


def row_height(runs: int) -> float:
    """Of a row, with room for every run."""
    return _ROW + _RUN * (runs - 1)


def _limits(estimates: Sequence[Estimate], unit: Unit, zero: bool) -> tuple[float, float]:
    numbers = [n for one in estimates for n in (one.value, one.low, one.high) if n is not None] + [0.0] * zero
    low, high = min(numbers), max(numbers)
    room = max((high - low) * 0.06, 0.5 if unit.sign > 0 else 0.01)
    if unit.name.startswith("percent") and not zero:
        return max(-room / 4, low - room), min(100 + room / 4, high + room)  # an axis of percent ends where they do
    return low - room, high + room


def _draw(axes: Axes, line: Line, y: float) -> None:
    """Label, intervals, dots and value of a row."""
    write(axes, -0.025, y, short(line.label, _LABEL), "right", bold=line.label == "matched")
    write(axes, 1.025, y, line.value, "left", bold=line.lost, colour="loss" if line.lost else "ink")
    colour, count = PAINT[line.colour], len(line.estimates)
    size = (7.0 if line.marker == "D" else 7.5) - 2 * (count > 1)
    for run, (estimate, hollow) in enumerate(zip(line.estimates, line.hollow, strict=True)):
        at = y + (run - (count - 1) / 2) * _RUN
        if estimate.low is not None and estimate.high is not None:
            axes.plot([estimate.low, estimate.high], [at, at], color=colour, lw=2 if count == 1 else 1.4, zorder=2)
        face = PAINT["page"] if hollow else colour
        axes.plot([estimate.value], [at], ls="", marker=line.marker, ms=size, mfc=face, mec=colour, mew=1.6, zorder=3)


def write(
    axes: Axes, x: float, y: float, text: str, align: str, *, bold: bool, colour: str = "ink", size: float = TEXT
) -> None:
    """Text beside the rows: x in widths of the axes, y in pixels."""
    axes.text(
        x,
        y,
        text,
        transform=axes.get_yaxis_transform(),
        ha=align,
        va="center",
        weight="bold" if bold else "normal",
        color=PAINT[colour],
        fontsize=size,
        parse_math=False,
    )
