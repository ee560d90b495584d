"""The plot of where the seconds of an answer go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from c2c.reporting.canvas import LEGEND, PAINT, TEXT, Plot, finish, heading_above, legend, legend_lines, new_axes, short
from c2c.reporting.costs import cost_means, timed_rows
from c2c.reporting.dots import write
from c2c.reporting.names import STAGES, system_title
from c2c.reporting.sections import Section
from c2c.reporting.text import cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW, _BAR, _BOTTOM, _LABEL = 26, 15, 44, 20


def plot_stages(section: Section) -> Plot | None:
    """The stages of every system's answer, one after the other; None where they were not measured."""
    rows = [row for _, group in timed_rows(section) for row in group]
    bars = {name: means for name in section.systems if (means := cost_means(rows[-1], name))} if rows else {}
    bars = {name: {key: means[key] for key in STAGES if key in means} for name, means in bars.items()}
    bars = {name: stages for name, stages in bars.items() if stages}
    if not bars:
        return None
    present = [stage for stage in STAGES if any(stages.get(stage) for stages in bars.values())]
    signs = {STAGES[name]: {"marker": "s", "ms": 9.0, "mfc": PAINT[name], "mec": PAINT[name]} for name in present}
    left = 14 + 7.2 * max(len(short(system_title(name), _LABEL)) for name in bars)
    top = 36 + LEGEND * len(legend_lines(list(signs)))
    figure, axes = new_axes((left, 54, top, _BOTTOM), _ROW * len(bars))
    axes.set_ylim(_ROW * len(bars), 0)
    axes.set_yticks([])
    axes.set_xlim(0, max(sum(stages.values()) for stages in bars.values()) * 1.02 or 1)
    for position, (name, stages) in enumerate(bars.items()):
        _draw(axes, name, stages, _ROW * (position + 0.5))
    legend(axes, signs, left, 14)
    heading_above(axes, short(f"Where the seconds go: {rows[-1].task}", 48), left, top - 12)
    axes.set_xlabel("Seconds per question")
    several = ", mean of the runs" if len(section.runs) > 1 else ""
    caption = f"The stages of an answer, one after the other{several}. Orange: the sharer works; grey: the receiver."
    return finish("stages", f"{section.title}: seconds per stage", caption, figure, section.slug)


def _draw(axes: Axes, name: str, stages: dict[str, float], y: float) -> None:
    write(axes, -0.025, y, short(system_title(name), _LABEL), "right", bold=name == "matched")
    start = 0.0
    for stage, seconds in stages.items():
        axes.barh(y, seconds, _BAR, left=start, color=PAINT[stage], edgecolor=PAINT["page"], lw=0.8, zorder=2)
        start += seconds
    axes.annotate(
        cost("seconds", start),
        (start, y),
        (5, 0),
        textcoords="offset points",
        va="center",
        color=PAINT["ink"],
        fontsize=TEXT - 0.5,
        weight="bold" if name == "matched" else "normal",
    )
