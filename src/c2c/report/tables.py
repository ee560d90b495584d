"""Make the tables of a report: a row for each evaluation, and all numbers of one evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from matplotlib.ticker import EngFormatter

from c2c.evaluation.config import DIFFERENCES, STAGES
from c2c.report.load import CHANGES, Evaluation
from c2c.report.names import MEASURES, SYSTEMS, in_order, spaced

MISSING, AHEAD, LOSS = "\u2013", "\u25b2", "\u2717"
_SUMMARY = ("receiver", "sharer", "matched", "deranged", "text")
_COSTS = ("seconds", "first_token", *STAGES, "tokens", "bytes", "memory")
_DIGITS = {"exact": 1, "holds": 1, "change": 1, "ratio": 2}


class Cell(NamedTuple):
    """A table entry: a number or title, interval or range, whether it is the best, a mark, an anchor to link to."""

    text: str
    detail: str = ""
    best: bool = False
    mark: str = ""
    anchor: str = ""


class Table(NamedTuple):
    """A table whose rows stand in titled groups; the first cell of a row names it."""

    caption: str
    columns: list[str]
    groups: list[tuple[str, list[list[Cell]]]]


class _Numbers:
    """Format the numbers of an evaluation as cells."""

    def __init__(self, evaluation: Evaluation) -> None:
        values = evaluation.values
        self.rows: dict[Any, Any] = dict(zip(values.index, values.itertuples(index=False), strict=True))
        self.sign, self.runs = evaluation.sign, len(evaluation.runs)

    def size(self, task: str) -> str:
        row = self.rows.get((task, "n", ""))
        return MISSING if row is None else " to ".join(dict.fromkeys(f"{n:,.0f}" for n in (row.low, row.high)))

    def cell(self, task: str, measure: str, name: str, among: Iterable[str] = ()) -> Cell:
        """Return a number with its interval or range, and its marks; ``among`` are the systems to be best of."""
        row = self.rows.get((task, measure, name))
        if row is None:
            return Cell(MISSING)
        text = "+" * (measure == "difference" and row.value >= 0) + self._text(measure, row.value)
        detail = self._bounds(measure, row)
        if measure not in ("score", "exact", "holds"):
            return Cell(text, detail, mark=LOSS if row.loss else "")
        found = (self.rows.get((task, measure, other), row) for other in ("matched", *among))
        matched, *others = (other.value * self.sign for other in found)
        value = row.value * self.sign
        return Cell(text, detail, value >= max(others, default=value), AHEAD if value > matched else "")

    def _bounds(self, measure: str, row: Any) -> str:
        if math.isnan(row.low):
            return ""
        low, high = (self._text(measure, value) for value in (row.low, row.high))
        if self.runs == 1:
            return f"[{low}, {high}]"
        if row.runs < self.runs:
            return f"({row.runs} of {self.runs} runs)"
        return f"({low} to {high})" if low != high else ""  # the models alone are the same in every run

    def _text(self, measure: str, value: float) -> str:
        if measure in ("bytes", "memory"):
            return EngFormatter(unit="B", places=1)(value)
        digits = _DIGITS.get(measure, 3 if self.sign < 0 else 1)
        if measure in ("score", "difference", *_DIGITS):
            return f"{round(value, digits) + 0.0:.{digits}f}"  # without a negative zero
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def summary_table(evaluations: Sequence[Evaluation]) -> Table:
    """Make a row for each evaluation, over all its data."""
    return _summary([(one.title, one, one) for one in evaluations], ("G", "P", "S", "T", "A"))


def readme_table(evaluations: Sequence[Evaluation]) -> Table:
    """Make a row for each pair and task family, from the evaluation with the most questions.

    Where another evaluation of the family measured text-to-text, its numbers stand there with their n.
    """
    families: dict[Any, list[Evaluation]] = {}
    for one in sorted(evaluations, key=lambda one: (-one.n, -len(one.tasks))):
        family = (one.pair, one.unit, one.mode, one.kind, one.tasks[0].partition(" (")[0])
        families.setdefault(family, []).append(one)
    rows = [
        (first.data, first, next((one for one in (first, *others) if "text" in one.systems), first))
        for first, *others in families.values()
    ]
    return _summary(sorted(rows, key=lambda row: evaluations.index(row[1])), ("P",))


def _summary(rows: Iterable[tuple[str, Evaluation, Evaluation]], letters: Sequence[str]) -> Table:
    """Make a row for each title, evaluation, and evaluation whose text-to-text is shown beside it."""
    groups: dict[str, list[list[Cell]]] = {}
    for title, shown, other in rows:
        numbers, texts, task, text_task = _Numbers(shown), _Numbers(other), shown.tasks[-1], other.tasks[-1]
        unit = "" if shown.unit == "percent" else f" ({shown.metric})"
        text = texts.cell(text_task, "score", "text", _SUMMARY)
        seconds = [texts.cell(text_task, "seconds", system).text for system in ("text", "matched")]
        ratio = texts.cell(text_task, "ratio", "text")
        groups.setdefault(shown.pair, []).append([
            Cell(title + unit, anchor=shown.anchor),
            Cell(numbers.size(task), f"({numbers.runs} runs)" * (numbers.runs > 1)),
            *(numbers.cell(task, "score", system, _SUMMARY)._replace(detail="") for system in _SUMMARY[:-1]),
            *(numbers.cell(task, "difference", letter) for letter in letters),
            text._replace(detail="" if other is shown else f"(n {texts.size(text_task)})"),
            Cell(MISSING if MISSING in seconds else " / ".join(seconds), mark=ratio.mark),
        ])  # fmt: skip
    return Table(
        "Summary", ["data", "n", *_SUMMARY[:-1], *letters, "text", "seconds, text / matched"], [*groups.items()]
    )


def result_tables(evaluation: Evaluation) -> list[Table]:
    """Make a table of all numbers and one of further costs, with a column for each task."""
    numbers, runs, tasks = _Numbers(evaluation), evaluation.runs, evaluation.tasks
    titles = {letter: f"{letter} = {' - '.join(pair)}" for letter, pair in DIFFERENCES.items()} | {"": "p"}
    known = {"difference": DIFFERENCES, "change": CHANGES}
    caption = f"Mean of {len(runs)} runs" if len(runs) > 1 else runs[0].title
    further = in_order({measure for _, measure, _ in numbers.rows} - {"n", *MEASURES}, _COSTS)
    parts = {caption: list(MEASURES), "Costs of an answer, of those that were answered one by one (timed)": further}
    columns = [evaluation.metric, *(f"{task}, n {numbers.size(task)}" for task in tasks)]
    tables = []
    for title, measures in parts.items():
        groups = []
        for measure in measures:
            names = in_order((name for _, other, name in numbers.rows if other == measure), known.get(measure, SYSTEMS))
            rows = [
                [Cell(titles.get(name, spaced(name))), *(numbers.cell(task, measure, name, names) for task in tasks)]
                for name in names
            ]
            groups += [(MEASURES.get(measure, spaced(measure)), rows)] if rows else []
        tables += [Table(title, columns, groups)] if measures else []
    return tables


def run_tables(evaluation: Evaluation) -> list[Table]:
    """Make the tables of each run, where there are several."""
    runs = evaluation.runs if len(evaluation.runs) > 1 else []
    return [table for run in runs for table in result_tables(replace(evaluation, runs=[run]))]
