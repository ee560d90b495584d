"""Tables of a report as data, for Markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from c2c.reporting.findings import gain_words
from c2c.reporting.losses import loss_words, marked
from c2c.reporting.names import COSTS, GAINS, POOLED, in_order, system_title
from c2c.reporting.results import Numbers
from c2c.reporting.sections import Section, run_title
from c2c.reporting.text import Estimate, Unit, cost, fixed, interval, mean, p_value, spread

NOTHING = "\u2013"
WON, AHEAD, LOST = "\u2713", "\u25b2", "\u2717"
_CHANGES = {"mended": "mended", "spoiled": "spoiled", "gap_recovered": "gap recovered"}


@dataclass(frozen=True)
class Cell:
    """One entry.

    Attributes:
        text: the number, or words.
        detail: interval or range.
        mark: a sign where a gain or a loss shows, else empty.
        words: it is text, not a number.
        strong: what the table is about.
        link: slug of the section that it leads to.
    """

    text: str
    detail: str = ""
    mark: str = ""
    words: bool = False
    strong: bool = False
    link: str = ""


@dataclass(frozen=True)
class Group:
    """Rows under one title; the first cell of a row names it."""

    title: str
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Table:
    """A table with row groups."""

    caption: str
    columns: list[str]
    groups: list[Group]
    note: str = ""


@dataclass(frozen=True)
class _Row:
    """What one or several runs say of a task."""

    task: str
    numbers: list[Numbers]
    unit: Unit

    @cached_property
    def marked(self) -> set[str]:
        return marked(self.numbers, self.unit)

    def words(self) -> str:
        """The losses in words, with the number of runs that have them."""
        runs = len(self.numbers)
        counts = loss_words(self.numbers, self.unit)
        return "; ".join(words + f" ({count} of {runs})" * (runs > 1) for words, count in counts.items())


def section_tables(section: Section) -> list[Table]:
    """Scores, differences, and costs where they were measured."""
    tables = [_scores(section)]
    if any(row.numbers[0].gains for _, rows in _groups(section) for row in rows):
        tables.append(_differences(section))
    return tables + _costs(section)


def overview(sections: Sequence[Section]) -> Table:
    """All sections at a glance, one row each, by what they are counted in."""
    columns = ["receiver \u2190 sharer", "data", "G", "P", "S", "gains", "losses"]
    groups: dict[str, list[list[Cell]]] = {}
    for section in sections:
        lower = "; lower is better" if section.unit.sign < 0 else ""
        groups.setdefault(f"in {section.unit.points}{lower}", []).append(_overview_row(section))
    return Table("At a glance", columns, [Group(title, rows) for title, rows in groups.items()])


def _overview_row(section: Section) -> list[Cell]:
    row = _Row(section.headline, section.numbers(section.headline), section.unit)
    rows = [one for task in section.tasks for one in section.numbers(task)]
    gains, lost = gain_words(section), loss_words(rows, section.unit)
    return [
        Cell(section.title, link=section.slug),
        Cell(section.subtitle, words=True),
        *(_gain_cell(row, letter) for letter in ("G", "P", "S")),
        Cell("; ".join(gains) or NOTHING, mark=WON if gains else "", words=True),
        Cell("; ".join(lost) or NOTHING, mark=LOST if lost else "", words=True),
    ]


def _groups(section: Section) -> list[tuple[str, list[_Row]]]:
    """The mean over the runs first, where there are several, then each run."""
    groups = []
    if len(section.runs) > 1:
        rows = [_Row(task, section.numbers(task), section.unit) for task in section.tasks]
        groups.append((f"mean of {len(section.runs)} runs (lowest to highest)", rows))
    for run in section.runs:
        groups.append((run_title(run), [_Row(one.task, [one], section.unit) for one in run.tasks]))
    return groups


def _scores(section: Section) -> Table:
    systems = section.systems
    groups = [
        Group(title, [[*_head(row), *(_score_cell(row, name) for name in systems)] for row in rows])
        for title, rows in _groups(section)
    ]
    marked = any(cell.mark for group in groups for row in group.rows for cell in row)
    note = f"{AHEAD} ahead of matched, or deranged ahead of the receiver." if marked else ""
    columns = ["data", "n", *(system_title(name) for name in systems)]
    return Table(_caption(section.unit.score), columns, groups, note)


def _differences(section: Section) -> Table:
    grouped = _groups(section)
    every = [one for _, rows in grouped for row in rows for one in row.numbers]
    letters = in_order((letter for one in every for letter in one.gains), GAINS)
    changes = [key for key in _CHANGES if any(getattr(one, key) is not None for one in every)]
    titles = [*(_CHANGES[key] for key in changes), *["McNemar p"] * bool(changes)]
    groups = [Group(title, [_difference_row(row, letters, changes) for row in rows]) for title, rows in grouped]
    meanings = ", ".join(f"{letter} = {' - '.join(GAINS[letter])}" for letter in letters if letter in GAINS)
    note = f"{meanings}."
    if changes:
        note += " Mended and spoiled: percent of questions that only matched, or only the receiver, has right."
    return Table(_caption(f"differences, {section.unit.points}"), ["data", *letters, *titles, "losses"], groups, note)


def _difference_row(row: _Row, letters: Sequence[str], changes: Sequence[str]) -> list[Cell]:
    cells = [_head(row)[0], *(_gain_cell(row, letter) for letter in letters)]
    for key in changes:
        values = [value for one in row.numbers if (value := getattr(one, key)) is not None]
        cells.append(Cell(fixed(mean(values), 1) if values else NOTHING))
    if changes:
        single = row.numbers[0].mcnemar_p if len(row.numbers) == 1 else None
        cells.append(Cell(NOTHING if single is None else p_value(single)))
    words = row.words()
    return [*cells, Cell(words or NOTHING, mark=LOST if words else "", words=True)]


def _costs(section: Section) -> list[Table]:
    """What a question costs, as the mean of the runs; over all questions if that was measured, else per task."""
    pooled = any(one.costs for one in section.numbers(section.headline))
    tasks = [section.headline] if pooled else section.tasks
    title, rows = _groups(section)[0]
    chosen = [
        (f"{title}, {row.task}", row) for row in rows if row.task in tasks and any(one.costs for one in row.numbers)
    ]
    if not chosen:
        return []
    every = [costs for _, row in chosen for one in row.numbers for costs in one.costs.values()]
    fields = in_order((name for costs in every for name in costs), COSTS)
    columns = ["system", section.unit.score.split(",")[0], *(COSTS.get(name, name) for name in fields)]
    relative = any("seconds" in one.costs.get("sharer", {}) for _, row in chosen for one in row.numbers)
    groups = [Group(title, _cost_rows(row, section.systems, fields, relative)) for title, row in chosen]
    return [Table("Cost per question", columns + ["seconds / sharer's"] * relative, groups)]


def _cost_rows(row: _Row, systems: Sequence[str], fields: Sequence[str], relative: bool) -> list[list[Cell]]:
    measured = [name for name in systems if any(name in one.costs for one in row.numbers)]
    return [_cost_row(row, name, fields, relative) for name in measured]


def _cost_row(row: _Row, system: str, fields: Sequence[str], relative: bool) -> list[Cell]:
    cells = [Cell(system_title(system), strong=system == "matched"), _score_cell(row, system)]
    for key in fields:
        values = [one.costs[system][key] for one in row.numbers if key in one.costs.get(system, {})]
        cells.append(Cell(cost(key, mean(values)) if values else NOTHING))
    if relative:
        ratios = [ratio for one in row.numbers if (ratio := _ratio(one, system)) is not None]
        cells.append(Cell(f"{mean(ratios):.2f}" if ratios else NOTHING))
    return cells


def _ratio(numbers: Numbers, system: str) -> float | None:
    ours = numbers.costs.get(system, {}).get("seconds")
    sharer = numbers.costs.get("sharer", {}).get("seconds")
    return None if ours is None or not sharer else ours / sharer


def _head(row: _Row) -> list[Cell]:
    sizes = sorted({one.n for one in row.numbers})
    return [Cell(row.task, strong=row.task == POOLED), Cell(" to ".join(f"{n:,}" for n in sizes))]


def _score_cell(row: _Row, system: str) -> Cell:
    estimates = [one.scores[system] for one in row.numbers if system in one.scores]
    mark = AHEAD if system in row.marked else ""
    return _cell(estimates, row.unit.digits, mark=mark, strong=system == "matched")


def _gain_cell(row: _Row, letter: str) -> Cell:
    estimates = [one.gains[letter] for one in row.numbers if letter in one.gains]
    return _cell(estimates, row.unit.digits, signed=True, mark=LOST if letter in row.marked else "")


def _cell(
    estimates: Sequence[Estimate], digits: int, *, signed: bool = False, mark: str = "", strong: bool = False
) -> Cell:
    if not estimates:
        return Cell(NOTHING)
    values = [estimate.value for estimate in estimates]
    detail = spread(values, digits) if len(values) > 1 else interval(estimates[0], digits)
    return Cell(fixed(mean(values), digits, signed=signed), detail, mark=mark, strong=strong)


def _caption(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}, with 95 % intervals"
