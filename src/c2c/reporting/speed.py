"""The plot of speed against scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from c2c.reporting.canvas import PAINT, TEXT, WIDTH, Plot, finish, heading_above, look, new_axes, short
from c2c.reporting.names import system_title
from c2c.reporting.results import Numbers
from c2c.reporting.sections import Section
from c2c.reporting.text import capital, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, right, bottom, top

_MARGINS = (46, 24, 26, 44)
_FAR = 1e4
# Beyond the axes on the left, where numbers stand, beyond the figure on the right, and below the axes.
_OUTSIDE: tuple[Box, ...] = (
    (-_FAR, _MARGINS[0] + 1, -_FAR, _FAR),
    (WIDTH - 4, _FAR, -_FAR, _FAR),
    (-_FAR, _FAR, -_FAR, _MARGINS[3]),
)


def plot_speed(section: Section) -> Plot | None:
    """Every system at its seconds per question and its score; None where seconds were not measured."""
    task = _timed_task(section)
    if task is None:
        return None
    rows = section.numbers(task)
    points = {name: point for name in section.systems if (point := _point(rows, name)) is not None}
    figure, axes = new_axes(_MARGINS, 250)
    heading = short(f"{capital(section.unit.score)}: {task}", 48)
    heading_above(axes, heading, _MARGINS[0], 15)
    _scale(axes, list(points.values()))
    axes.grid(axis="y", color=PAINT["grid"], lw=0.8)
    axes.set_xlabel("Seconds per question")
    _draw(axes, points, section.systems)
    better = "up" if section.unit.sign > 0 else "down"
    caption = f"Better is {better} and left." + " Means over the runs." * (len(section.runs) > 1)
    return finish("speed", f"{section.title}: speed and {section.unit.score}", caption, figure, section.slug)


def _timed_task(section: Section) -> str | None:
    """All questions where they were timed, else the first task that was."""
    tasks = [section.headline, *section.tasks]
    return next((task for task in tasks if any(_point(section.numbers(task), name) for name in section.systems)), None)


def _point(rows: Sequence[Numbers], name: str) -> Point | None:
    timed = [row for row in rows if name in row.scores and "seconds" in row.costs.get(name, {})]
    if not timed:
        return None
    return mean(row.costs[name]["seconds"] for row in timed), mean(row.scores[name].value for row in timed)


def _scale(axes: Axes, points: Sequence[Point]) -> None:
    """Seconds from zero, or by their logarithm where they differ much."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    seconds, scores = [x for x, _ in points], [y for _, y in points]
    if max(seconds) > 8 * min(seconds) > 0:
        axes.set_xscale("log")
        axes.set_xlim(min(seconds) / 1.5, max(seconds) * 2.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, max(seconds) * 1.3 or 1)
    room = 0.12 * (max(scores) - min(scores) or 1)
    axes.set_ylim(min(scores) - room, max(scores) + room)


def _draw(axes: Axes, points: dict[str, Point], systems: Sequence[str]) -> None:
    """Points with their names beside them, on a side where nothing else is."""
    at: dict[str, Point] = {}
    for name, point in points.items():
        x, y = axes.transData.transform(point)
        at[name] = (float(x), float(y))
    taken = [(x - 6, x + 6, y - 6, y + 6) for x, y in at.values()]
    for name, (x, y) in points.items():
        colour, marker, hollow = look(name, systems)
        face = PAINT["page"] if hollow else PAINT[colour]
        axes.plot([x], [y], ls="", marker=marker, ms=9, mfc=face, mec=PAINT[colour], mew=1.6, zorder=3, clip_on=False)
        label = short(system_title(name), 24)
        box = _place(at[name], 7.2 * len(label), taken)
        taken.append(box)
        _label(axes, label, (x, y), at[name], box)


def _label(axes: Axes, text: str, point: Point, at: Point, box: Box) -> None:
    """A name in its box, set from the side that its point is on, so that other fonts do not move it away."""
    if box[0] > at[0]:
        side, edge = "left", box[0]
    elif box[1] < at[0]:
        side, edge = "right", box[1]
    else:
        side, edge = "center", (box[0] + box[1]) / 2
    axes.annotate(
        text,
        point,
        (edge - at[0], (box[2] + box[3]) / 2 - at[1]),
        textcoords="offset pixels",
        ha=side,
        va="center",
        color=PAINT["ink"],
        fontsize=TEXT,
        weight="bold" if text == "matched" else "normal",
        parse_math=False,
        zorder=4,
    )


def _place(point: Point, width: float, taken: Sequence[Box]) -> Box:
    """A free box for a label: right, left, above or below its point, else where it covers least."""
    x, y = point
    corners = [(x + 10, y), (x - 10 - width, y), (x - width / 2, y + 16), (x - width / 2, y - 16)]
    corners += [(left, y + up) for up in (14, -14) for left in (x + 8, x - 8 - width)]
    boxes = [(left, left + width, middle - 7, middle + 7) for left, middle in corners]
    return min(boxes, key=lambda box: sum(_overlap(box, other) for other in (*taken, *_OUTSIDE)))


def _overlap(one: Box, other: Box) -> float:
    across = min(one[1], other[1]) - max(one[0], other[0])
    up = min(one[3], other[3]) - max(one[2], other[2])
    return max(0.0, across) * max(0.0, up)
