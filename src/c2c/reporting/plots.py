"""The plots of every section: scores and differences, a row for each and a block for each task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from c2c.reporting.canvas import HEADING, PAINT, TEXT, WIDTH, Plot, capital, drawing, finish, look, new_axes, short
from c2c.reporting.losses import marked
from c2c.reporting.names import GAINS, system_title
from c2c.reporting.sections import Section
from c2c.reporting.speed import plot_speed
from c2c.reporting.text import Estimate, Unit, fixed, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW, _RUN, _GAP, _BOTTOM = 21, 6, 30, 44  # heights in pixels
_LABEL = 24  # letters


@dataclass(frozen=True)
class _Line:
    """One row of a plot: a label, and one estimate per run."""

    label: str
    estimates: list[Estimate]
    colour: str
    marker: str
    hollow: list[bool]
    value: str
    lost: bool


@dataclass
class _Block:
    """The rows of a task; ``top`` is where the first one begins, in pixels from the figure's top."""

    task: str
    lines: list[_Line]
    top: float = field(default=0.0)


def draw(sections: Iterable[Section]) -> dict[str, list[Plot]]:
    """The plots of every section, by its slug: scores, differences, and speed where it was measured.

    Raises:
        ReportError: matplotlib is not installed.
    """
    plots: dict[str, list[Plot]] = {}
    with drawing():
        for section in sections:
            drawn = [_scores(section), _gains(section), plot_speed(section)]
            plots[section.slug] = [plot for plot in drawn if plot is not None]
    return plots


def _scores(section: Section) -> Plot:
    unit = section.unit
    blocks = [_Block(task, _score_lines(section, task)) for task in section.tasks]
    figure, axes = _rows(blocks, section, zero=False)
    for block in blocks:
        matched = [one.scores["matched"].value for one in section.numbers(block.task) if "matched" in one.scores]
        if matched:
            ends = [block.top, block.top + len(block.lines) * _height(section)]
            axes.plot([mean(matched)] * 2, ends, color=PAINT["matched"], lw=1, ls=(0, (1, 2)), zorder=1)
    axes.set_xlabel(capital(unit.score))
    caption = (
        f"{_what(section)} \u25b2 marks what is ahead of matched (the dotted line), or a deranged message ahead of the "
        "receiver; hollow marks are controls."
    )
    return finish("scores", f"{section.title}: {unit.score}", caption, figure, section.slug)


def _score_lines(section: Section, task: str) -> list[_Line]:
    rows = section.numbers(task)
    ahead = marked(rows, section.unit)
    lines = []
    for name in section.systems:
        estimates = [row.scores[name] for row in rows if name in row.scores]
        if estimates:
            colour, marker, hollow = look(name, section.systems)
            value = _value(estimates, section.unit, " \u25b2" * (name in ahead))
            hollows = [hollow] * len(estimates)
            lines.append(_Line(system_title(name), estimates, colour, marker, hollows, value, name in ahead))
    return lines


def _gains(section: Section) -> Plot | None:
    unit = section.unit
    blocks = [_Block(task, lines) for task in section.tasks if (lines := _gain_lines(section, task))]
    if not blocks:
        return None
    figure, axes = _rows(blocks, section, zero=True)
    low, high = axes.get_xlim()
    axes.axvspan(*((low, 0) if unit.sign > 0 else (0, high)), color=PAINT["worse"], lw=0, zorder=0)
    axes.axvline(0, color=PAINT["ink"], lw=1.2, zorder=1)
    axes.set_xlabel(f"{capital(unit.points)}; the shaded side is worse")
    caption = f"{_what(section)} Hollow: the interval reaches zero, or there is none. Shaded: matched is worse."
    return finish("gains", f"{section.title}: differences to matched", caption, figure, section.slug)


def _gain_lines(section: Section, task: str) -> list[_Line]:
    rows = section.numbers(task)
    behind = marked(rows, section.unit)
    looks = {"G": ("receiver", "o"), "P": ("matched", "D"), "S": ("sharer", "s")}
    lines = []
    for letter, (colour, marker) in looks.items():
        estimates = [row.gains[letter] for row in rows if letter in row.gains]
        if estimates:
            label = f"{letter}, to {GAINS[letter][1]}"
            value = _value(estimates, section.unit, " \u2717" * (letter in behind), signed=True)
            hollow = [one.low is None or one.holds_zero() for one in estimates]
            lines.append(_Line(label, estimates, colour, marker, hollow, value, letter in behind))
    return lines


def _value(estimates: Sequence[Estimate], unit: Unit, mark: str, *, signed: bool = False) -> str:
    return fixed(mean(one.value for one in estimates), unit.digits, signed=signed) + mark


def _what(section: Section) -> str:
    runs = len(section.runs)
    return (
        "Dot and 95 % interval." if runs == 1 else f"Dot and 95 % interval of each of {runs} runs; numbers are means."
    )


def _rows(blocks: Sequence[_Block], section: Section, *, zero: bool) -> tuple[Figure, Axes]:
    """A figure with a heading per block and a row per line; y counts pixels from the top."""
    lines = [line for block in blocks for line in block.lines]
    left = 14 + 7.2 * min(_LABEL, max(len(line.label) for line in lines))
    right = 16 + 7.4 * max(len(line.value) for line in lines)
    height = 0.0
    for block in blocks:
        block.top = height + _GAP
        height = block.top + len(block.lines) * _height(section)
    figure, axes = new_axes((left, right, 2, _BOTTOM), height + 6)
    axes.set_ylim(height + 6, 0)
    axes.set_yticks([])
    axes.set_xlim(*_limits([one for line in lines for one in line.estimates], section.unit, zero))
    for block in blocks:
        x = -left / (WIDTH - left - right)
        _text(axes, x, block.top - 10, short(block.task, 42), "left", bold=True, size=HEADING)
        for position, line in enumerate(block.lines):
            _draw(axes, line, block.top + (position + 0.5) * _height(section))
    return figure, axes


def _height(section: Section) -> float:
    """Of a row, with room for every run."""
    return _ROW + _RUN * (len(section.runs) - 1)


def _limits(estimates: Sequence[Estimate], unit: Unit, zero: bool) -> tuple[float, float]:
    numbers = [n for one in estimates for n in (one.value, one.low, one.high) if n is not None] + [0.0] * zero
    low, high = min(numbers), max(numbers)
    room = max((high - low) * 0.06, 0.5 if unit.sign > 0 else 0.01)
    if unit.name == "percent" and not zero:
        return max(-room / 4, low - room), min(100 + room / 4, high + room)  # an axis of percent ends where they do
    return low - room, high + room


def _draw(axes: Axes, line: _Line, y: float) -> None:
    """Label, intervals, dots and value of a row."""
    _text(axes, -0.025, y, short(line.label, _LABEL), "right", bold=line.label == "matched")
    _text(axes, 1.025, y, line.value, "left", bold=line.lost, colour="loss" if line.lost else "ink")
    colour, count = PAINT[line.colour], len(line.estimates)
    size = (7.0 if line.marker == "D" else 7.5) - 2 * (count > 1)
    for run, (estimate, hollow) in enumerate(zip(line.estimates, line.hollow, strict=True)):
        at = y + (run - (count - 1) / 2) * _RUN
        if estimate.low is not None and estimate.high is not None:
            axes.plot([estimate.low, estimate.high], [at, at], color=colour, lw=2 if count == 1 else 1.4, zorder=2)
        face = PAINT["page"] if hollow else colour
        axes.plot([estimate.value], [at], ls="", marker=line.marker, ms=size, mfc=face, mec=colour, mew=1.6, zorder=3)


def _text(
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
