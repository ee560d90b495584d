"""The plot of abstention: what is won and spoiled when only some questions get the fused cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from c2c.reporting.canvas import PAINT, TEXT, Plot, finish, heading_above, new_axes
from c2c.reporting.results import Abstention, Result
from c2c.reporting.sections import Section
from c2c.reporting.text import fixed, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARGINS = (46.0, 118.0, 40.0, 44.0)
_HEIGHT, _APART = 250.0, 16.0
_SPOILED = "loss"


def plot_abstention(section: Section) -> Plot | None:
    """Accuracy and spoiled answers over the share of questions with the fused cache; None without a curve."""
    runs = [(run, run.abstention) for run in section.runs if run.abstention is not None and run.abstention.curve]
    if not runs:
        return None
    figure, axes = new_axes(_MARGINS, _HEIGHT)
    axes.grid(axis="y", color=PAINT["grid"], lw=0.8)
    axes.set_xlim(0, 100)
    ends: list[tuple[float, str, str]] = []
    for name in ("receiver", "sharer"):
        scores = [run.tasks[-1].scores[name].value for run, _ in runs if name in run.tasks[-1].scores]
        if scores:
            axes.axhline(mean(scores), color=PAINT[name], lw=1.3, ls=(0, (4, 3)), zorder=1)
            ends.append((mean(scores), f"{name} {fixed(mean(scores), 1)}", name))
    for run, found in runs:
        _curves(axes, run, found)
    last = [found.curve[-1] for _, found in runs]
    ends.append((mean(point.accuracy for point in last), "accuracy", "matched"))
    ends.append((mean(point.spoiled for point in last), "spoiled", _SPOILED))
    low, high = axes.get_ylim()
    axes.set_ylim(min(0, low), high + 0.04 * (high - low))
    _labels(axes, ends)
    heading_above(axes, "The fused cache only where it is surer, percent", _MARGINS[0], 24)
    axes.set_xlabel("Questions with the fused cache, percent")
    caption = (
        "From the left, where the receiver answers all, to the right, where the fused cache does. Spoiled: right "
        f"answers of the receiver that are lost. The large mark is the margin that dev chose{_several(len(runs))}."
    )
    return finish("abstention", f"{section.title}: abstention", caption, figure, section.slug)


def _several(runs: int) -> str:
    return f"; a line for each of {runs} runs" if runs > 1 else ""


def _curves(axes: Axes, run: Result, found: Abstention) -> None:
    shares = [100 * point.share for point in found.curve]
    axes.plot(shares, [point.accuracy for point in found.curve], color=PAINT["matched"], lw=2, zorder=3)
    axes.plot(shares, [point.spoiled for point in found.curve], color=PAINT[_SPOILED], lw=2, ls=(0, (2, 1)), zorder=3)
    chosen = run.tasks[-1].scores.get("abstain")
    if chosen is not None:
        at = 100 * found.share_fused
        face, edge = PAINT["abstain"], PAINT["page"]
        axes.plot([at], [chosen.value], "d", ms=11, mfc=face, mec=edge, mew=1.2, zorder=5, clip_on=False)


def _labels(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Names beside the ends of the lines, moved apart where they would touch."""
    low, high = axes.get_ylim()
    step = (high - low) * _APART / _HEIGHT
    floor = low
    for value, text, colour in sorted(ends):
        floor = max(value, floor)
        axes.annotate(
            text,
            (1, floor),
            (8, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            color=PAINT[colour],
            fontsize=TEXT,
            weight="bold" if text == "accuracy" else "normal",
            parse_math=False,
        )
        floor += step
