"""The tables of what an answer costs, where it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from c2c.reporting.cells import Cell, Group, Table, number_cell
from c2c.reporting.names import COSTS, STAGES, in_order, system_title
from c2c.reporting.rows import Row, Rows, all_runs, every
from c2c.reporting.sections import Section
from c2c.reporting.text import cost, mean, ranged

_WIDE = 9  # columns
_RATIO = "seconds / matched's"


def cost_tables(section: Section) -> list[Table]:
    """What a question costs, over all questions if that was measured, else per task."""
    rows = timed_rows(section)
    if not rows:
        return []
    fields = [name for name in in_order(_fields(rows), COSTS) if name not in STAGES]
    score = section.unit.score.split(",")[0]
    first = ["seconds", "first_token"]
    times = [name for name in fields if name in first]
    rest = [name for name in fields if name not in first]
    parts = [rest[start : start + _WIDE - 5] for start in range(0, len(rest), _WIDE - 5)] or [[]]
    tables = [_costs(section, rows, [*times, _RATIO, *parts[0]], score)]
    return [*tables, *(_costs(section, rows, part, "") for part in parts[1:])]


def stage_tables(section: Section) -> list[Table]:
    """Where the seconds go; nothing where stages were not measured."""
    rows = timed_rows(section)
    stages = in_order((name for name in _fields(rows) if name in STAGES), STAGES)
    if not stages:
        return []
    groups = [
        Group(f"{title}, {row.task}", [_cost_row(row, name, stages, "") for name in _measured(row, section)])
        for title, group in rows
        for row in group
    ]
    return [Table("Seconds per stage", ["system", *(STAGES[name] for name in stages)], groups)]


def timed_rows(section: Section) -> Rows:
    """The rows that have costs: of all questions if these were measured, else of each task."""
    pooled = any(one.costs for one in section.numbers(section.headline))
    tasks = [section.headline] if pooled else section.tasks
    found = [
        (title, [row for row in rows if row.task in tasks and any(one.costs for one in row.numbers)])
        for title, rows in all_runs(section)
    ]
    return [(title, rows) for title, rows in found if rows]


def cost_means(row: Row, system: str) -> dict[str, float]:
    """Every cost of a system, as the mean of the runs that measured it."""
    costs = [one.costs[system] for one in row.numbers if system in one.costs]
    fields = {name for one in costs for name in one}
    return {name: mean(one[name] for one in costs if name in one) for name in fields}


def _costs(section: Section, rows: Rows, fields: Sequence[str], score: str) -> Table:
    columns = ["system", *[score] * bool(score), *(COSTS.get(name, name) for name in fields)]
    groups = [
        Group(f"{title}, {row.task}", [_cost_row(row, name, fields, score) for name in _measured(row, section)])
        for title, group in rows
        for row in group
    ]
    return Table(_caption(section, rows), columns, groups, _note(section, fields))


def _cost_row(row: Row, system: str, fields: Sequence[str], score: str) -> list[Cell]:
    cells = [Cell(system_title(system), strong=system == "matched"), *[row.score(system)] * bool(score)]
    means = cost_means(row, system)
    for name in fields:
        if name == _RATIO:
            cells.append(Cell("1") if system == "matched" else row.ratio(system))
        else:
            cells.append(number_cell(cost(name, means[name]) if name in means else None))
    return cells


def _measured(row: Row, section: Section) -> list[str]:
    return [name for name in section.systems if any(name in one.costs for one in row.numbers)]


def _fields(rows: Rows) -> Iterable[str]:
    return {name for one in every(rows) for costs in one.costs.values() for name in costs}


def _caption(section: Section, rows: Rows) -> str:
    counts = [one.timed for one in every(rows) if one.timed is not None]
    measured = f", mean of {ranged(counts)} that were answered one by one" if counts else ""
    runs, timed = len(section.runs), sum(any(task.costs for task in run.tasks) for run in section.runs)
    where = f" in each of {runs} runs" if timed == runs else f" in {timed} of {runs} runs"
    return f"Cost per question{measured}" + where * (runs > 1)


def _note(section: Section, fields: Sequence[str]) -> str:
    """What the numbers depend on."""
    answers = [run.answer_tokens for run in section.runs if run.answer_tokens is not None]
    messages = [run.message_tokens for run in section.runs if run.message_tokens is not None]
    limits = [f"Answers of at most {ranged(answers)} tokens"] if answers else []
    if messages and any(name.startswith("text") for name in section.systems):
        limits.append(f"messages in text-to-text of at most {ranged(messages)}")
    note = [f"{', '.join(limits)}."] * bool(limits)
    if "bytes" in fields:
        note.append("Bytes: what crosses from one model to the other.")
    if "memory" in fields:
        note.append("Memory: the most that was needed on top of the weights.")
    return " ".join(note)
