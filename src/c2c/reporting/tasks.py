"""The plot of many tasks: a line for each, with the systems that matter most on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from c2c.reporting.canvas import LEGEND, PAINT, Plot, finish, legend, legend_lines, look, new_axes, short
from c2c.reporting.dots import write
from c2c.reporting.losses import marked
from c2c.reporting.names import system_title
from c2c.reporting.sections import Section
from c2c.reporting.text import capital, fixed, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# From the lowest layer to the highest: what covers what where numbers are equal.
_SYSTEMS = ("deranged", "receiver", "adapter", "text", "sharer", "matched")
_SIZES = {"sharer": 10.0, "deranged": 9.0, "matched": 7.0}
_ROW, _BOTTOM, _LABEL = 30, 44, 22


def plot_tasks(section: Section) -> Plot | None:
    """The scores of the main systems on every task; None where none of them was measured."""
    systems = [name for name in _SYSTEMS if name in section.systems]
    if not systems:
        return None
    signs = {system_title(name): _sign(name, section) for name in reversed(systems)}
    left = 14 + 7.2 * min(_LABEL, max(len(task) for task in section.tasks))
    top = 12 + LEGEND * len(legend_lines(list(signs)))
    height = _ROW * len(section.tasks)
    figure, axes = new_axes((left, 62, top, _BOTTOM), height)
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    axes.margins(x=0.06)
    for position, task in enumerate(section.tasks):
        _draw(axes, section, task, systems, _ROW * (position + 0.5))
    legend(axes, signs, left, 14)
    axes.set_xlabel(capital(section.unit.score))
    several = " Means over the runs." if len(section.runs) > 1 else ""
    caption = f"Numbers are those of matched; \u25b2: another system is ahead of it.{several}"
    return finish("tasks", f"{section.title}: {section.unit.score}, by data", caption, figure, section.slug)


def _draw(axes: Axes, section: Section, task: str, systems: list[str], y: float) -> None:
    rows = section.numbers(task)
    means = {
        name: mean(row.scores[name].value for row in rows if name in row.scores)
        for name in systems
        if any(name in row.scores for row in rows)
    }
    ahead = [name for name in marked(rows, section.unit) if name in section.systems and name != "deranged"]
    write(axes, -0.025, y, short(task, _LABEL), "right", bold=task == section.headline)
    if not means:
        return
    axes.plot([min(means.values()), max(means.values())], [y, y], color=PAINT["grid"], lw=2.5, zorder=1)
    for layer, (name, value) in enumerate(means.items()):
        axes.plot([value], [y], **_sign(name, section) | {"zorder": 2 + layer})
    if "matched" in means:
        text = fixed(means["matched"], section.unit.digits) + " \u25b2" * bool(ahead)
        write(axes, 1.025, y, text, "left", bold=bool(ahead), colour="loss" if ahead else "ink")


def _sign(name: str, section: Section) -> dict[str, Any]:
    colour, marker, hollow = look(name, section.systems)
    face = PAINT["page"] if hollow else PAINT[colour]
    return {"ls": "", "marker": marker, "ms": _SIZES.get(name, 8.5), "mfc": face, "mec": PAINT[colour], "mew": 1.6}
