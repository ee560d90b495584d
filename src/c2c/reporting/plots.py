"""The plots of every section: scores and differences as rows, and what was measured beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from c2c.reporting.canvas import PAINT, Plot, drawing, finish, look
from c2c.reporting.curve import plot_abstention
from c2c.reporting.dots import Block, Line, draw_rows, row_height
from c2c.reporting.losses import marked
from c2c.reporting.names import GAINS, system_title
from c2c.reporting.sections import Section
from c2c.reporting.speed import plot_speed
from c2c.reporting.stages import plot_stages
from c2c.reporting.tasks import plot_tasks
from c2c.reporting.text import Estimate, Unit, capital, fixed, mean

_MANY = 24  # rows in a plot


def draw(sections: Iterable[Section]) -> dict[str, list[Plot]]:
    """The plots of every section, by its slug: scores, differences, and what else was measured.

    Raises:
        ReportError: matplotlib is not installed.
    """
    plots: dict[str, list[Plot]] = {}
    with drawing():
        for section in sections:
            scores, compact = _scores(section)
            drawn = [scores, plot_tasks(section) if compact else None, _gains(section)]
            drawn += [plot_speed(section), plot_stages(section), plot_abstention(section)]
            plots[section.slug] = [plot for plot in drawn if plot is not None]
    return plots


def _scores(section: Section) -> tuple[Plot, bool]:
    """The scores of every task, or with many of them those of the headline only; and whether that is so."""
    unit, runs = section.unit, len(section.runs)
    blocks, compact = _fitting([Block(task, _score_lines(section, task)) for task in section.tasks])
    figure, axes = draw_rows(blocks, runs, unit, zero=False)
    for block in blocks:
        matched = [one.scores["matched"].value for one in section.numbers(block.task) if "matched" in one.scores]
        if matched:
            ends = [block.top, block.top + len(block.lines) * row_height(runs)]
            axes.plot([mean(matched)] * 2, ends, color=PAINT["matched"], lw=1, ls=(0, (1, 2)), zorder=1)
    axes.set_xlabel(capital(unit.score))
    caption = (
        f"{_what(section)} \u25b2 marks what is ahead of matched (the dotted line), or a deranged message ahead of the "
        "receiver; hollow marks are controls."
    )
    return finish("scores", f"{section.title}: {unit.score}", caption, figure, section.slug), compact


def _fitting(blocks: Sequence[Block]) -> tuple[list[Block], bool]:
    """All blocks, or the last one, which stands for all, where they are too many rows; and whether that is so."""
    compact = len(blocks) > 1 and sum(len(block.lines) for block in blocks) > _MANY
    return (list(blocks[-1:]) if compact else list(blocks)), compact


def _score_lines(section: Section, task: str) -> list[Line]:
    rows = section.numbers(task)
    ahead = marked(rows, section.unit)
    lines = []
    for name in section.systems:
        estimates = [row.scores[name] for row in rows if name in row.scores]
        if estimates:
            colour, marker, hollow = look(name, section.systems)
            value = _value(estimates, section.unit, " \u25b2" * (name in ahead))
            hollows = [hollow] * len(estimates)
            lines.append(Line(system_title(name), estimates, colour, marker, hollows, value, name in ahead))
    return lines


def _gains(section: Section) -> Plot | None:
    unit = section.unit
    blocks, _ = _fitting([Block(task, lines) for task in section.tasks if (lines := _gain_lines(section, task))])
    if not blocks:
        return None
    figure, axes = draw_rows(blocks, len(section.runs), unit, zero=True)
    low, high = axes.get_xlim()
    axes.axvspan(*((low, 0) if unit.sign > 0 else (0, high)), color=PAINT["worse"], lw=0, zorder=0)
    axes.axvline(0, color=PAINT["ink"], lw=1.2, zorder=1)
    axes.set_xlabel(f"{capital(unit.points)}; the shaded side is worse")
    caption = f"{_what(section)} Hollow: the interval reaches zero, or there is none. Shaded: matched is worse."
    return finish("gains", f"{section.title}: differences to matched", caption, figure, section.slug)


def _gain_lines(section: Section, task: str) -> list[Line]:
    rows = section.numbers(task)
    behind = marked(rows, section.unit)
    lines = []
    for letter in ("G", "P", "S", "T", "A"):
        estimates = [row.gains[letter] for row in rows if letter in row.gains]
        if estimates:
            other = GAINS[letter][1]
            colour, marker = ("matched", "D") if letter == "P" else look(other, section.systems)[:2]
            value = _value(estimates, section.unit, " \u2717" * (letter in behind), signed=True)
            hollow = [one.low is None or one.holds_zero() for one in estimates]
            label = f"{letter}, to {system_title(other)}"
            lines.append(Line(label, estimates, colour, marker, hollow, value, letter in behind))
    return lines


def _value(estimates: Sequence[Estimate], unit: Unit, mark: str, *, signed: bool = False) -> str:
    return fixed(mean(one.value for one in estimates), unit.digits, signed=signed) + mark


def _what(section: Section) -> str:
    runs = len(section.runs)
    return (
        "Dot and 95 % interval." if runs == 1 else f"Dot and 95 % interval of each of {runs} runs; numbers are means."
    )
