"""Draw the plots of a report with matplotlib, as SVG that is the same for the same results and library versions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from c2c.evaluation.config import STAGES
from c2c.report.load import Evaluation
from c2c.report.names import POOLED, SYSTEMS, in_order, spaced

# Colour and marker of the systems that are plotted, the least important first, since later ones cover them.
_STYLES = {
    "receiver": ("tab:gray", "o"),
    "adapter": ("tab:olive", "P"),
    "deranged": ("tab:purple", "v"),
    "text": ("tab:green", "^"),
    "sharer": ("tab:orange", "s"),
    "matched": ("tab:blue", "D"),
}
_STAGE_COLOURS = dict(
    zip(map(spaced, STAGES), ("peachpuff", "tab:orange", "lightgray", "tab:blue", "tab:gray"), strict=True)
)
_RC: Any = {
    "svg.hashsalt": "c2c",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.4,
}


def draw_plots(evaluations: Sequence[Evaluation]) -> dict[str, tuple[str, str]]:
    """Draw what there are numbers for: ``accuracy``, ``open-answers``, ``content`` and ``speed``.

    Returns:
        The caption and the SVG of each plot, by its name.
    """
    values = pd.concat(
        [_run_values(one, number) for one in evaluations for number in range(len(one.runs))], ignore_index=True
    )
    scores = values[(values["measure"] == "score") & (values["task"] != POOLED) & values["name"].isin(list(_STYLES))]
    # for each system on each task the evaluation with the most questions
    scores = scores[scores["n"] == scores.groupby(["panel", "task", "name"])["n"].transform("max")]
    scores, choice = scores.assign(row=scores["task"]), scores["unit"] == "percent"
    content = values[(values["measure"] == "difference") & (values["name"] == "P") & values["whole"]]
    content = content.assign(row=content["title"], name="matched")
    intervals = "Bars: 95 % intervals, a mark for each run."
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        figures = {
            "accuracy": (f"Accuracy by pair and data. {intervals}", _draw_panels(scores[choice])),
            "open-answers": (f"Open answers by pair and data. {intervals}", _draw_panels(scores[~choice])),
            "content": (f"P = matched - deranged. {intervals}", _draw_panels(content, zero=True)),
            "speed": ("Seconds of an answer, by stage.", _draw_speed(evaluations)),
        }
        drawn = {}
        for name, (caption, figure) in figures.items():
            if figure is not None:
                buffer = io.StringIO()
                figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
                drawn[name] = (caption, buffer.getvalue())
        return drawn


def _run_values(evaluation: Evaluation, number: int) -> pd.DataFrame:
    """Return the values of one run, each with its number of questions, its panel, and the title of its run."""
    run, several = evaluation.runs[number], len(evaluation.runs) > 1
    values = run.values.reset_index()
    return values.assign(
        n=values["task"].map(run.values["value"].xs(("n", ""), level=["measure", "name"])),
        unit=evaluation.unit,
        panel=f"{evaluation.pair}: {evaluation.metric}",
        title=evaluation.title + f", run {number + 1}" * several,
        whole=values["task"] == evaluation.tasks[-1],
    )


def _draw_panels(values: pd.DataFrame, *, zero: bool = False) -> Figure | None:
    """Draw a panel for each pair, with a line for each row, a mark for each value and a bar for its interval."""
    if values.empty:
        return None
    panels = dict(iter(values.groupby("panel", sort=False)))
    figure, all_axes = _subplots([panel["row"].nunique() for panel in panels.values()])
    for axes, (title, panel) in zip(all_axes, panels.items(), strict=True):
        rows = {row: position for position, row in enumerate(panel["row"].unique())}
        axes.set_title(title, loc="left")
        axes.set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.5, -0.5))
        if zero:
            axes.axvline(0, color="black", lw=1)
        for system, (colour, marker) in _STYLES.items():
            one = panel[panel["name"] == system]
            value = one["value"]
            bars = [(value - one["low"]).fillna(0).clip(0), (one["high"] - value).fillna(0).clip(0)]
            if not one.empty:
                axes.errorbar(value, one["row"].map(rows), xerr=bars, fmt=marker, color=colour, label=system, lw=1)
    if not zero:
        _legend(figure, all_axes)
    return figure


def _draw_speed(evaluations: Sequence[Evaluation]) -> Figure | None:
    """Draw the seconds of every system as a bar of its stages, a panel for each evaluation that was timed."""
    timed = {one: stages for one in evaluations if not (stages := _stages(one)).empty}
    if not timed:
        return None
    figure, all_axes = _subplots([len(stages) for stages in timed.values()])
    for axes, (one, stages) in zip(all_axes, timed.items(), strict=True):
        start = pd.Series(0.0, index=stages.index)
        for stage in stages:
            axes.barh(stages.index, stages[stage], left=start, label=stage, color=_STAGE_COLOURS.get(stage, "tab:pink"))
            start += stages[stage]
        axes.invert_yaxis()
        axes.set_title(f"{one.pair}: {one.title}", loc="left")
        axes.set_xlabel("seconds")
    _legend(figure, all_axes)
    return figure


def _stages(evaluation: Evaluation) -> pd.DataFrame:
    """Return the mean seconds of the stages (columns) of each system (rows), over all questions if these were timed."""
    values = evaluation.values["value"].unstack("measure").loc[evaluation.tasks[-1]]
    if "seconds" not in values:
        return pd.DataFrame()
    values = values[values["seconds"].notna()]
    stages = values.reindex(columns=[*STAGES]).fillna(0.0)
    stages = stages.loc[in_order(stages.index, SYSTEMS)].assign(other=(values["seconds"] - stages.sum(axis=1)).clip(0))
    stages = stages.rename(index=spaced, columns=spaced)
    return stages.loc[:, stages.sum() > 1e-6]


def _subplots(rows: Sequence[int]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, 0.8 + sum(0.3 * count + 0.6 for count in rows)), layout="constrained")
    axes = figure.subplots(len(rows), squeeze=False, height_ratios=[count + 0.5 for count in rows])
    return figure, list(axes[:, 0])


def _legend(figure: Figure, all_axes: Sequence[Axes]) -> None:
    handles = {
        label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
