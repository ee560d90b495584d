"""The tables of a section: scores and differences, of all runs together and of each run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from c2c.reporting.cells import AHEAD, LOST, NOTHING, Cell, Group, Table, number_cell
from c2c.reporting.costs import cost_tables, stage_tables
from c2c.reporting.facts import facts
from c2c.reporting.names import CONTROLS, GAINS, WRITTEN, in_order, system_title
from c2c.reporting.rows import Row, Rows, all_runs, each_run, every
from c2c.reporting.sections import Section
from c2c.reporting.text import Unit, capital, fixed, mean, p_value

_WIDE = 7  # systems beside each other, at most; beside matched there is room for as many others, without n
_CHANGES = {"mended": "mended", "spoiled": "spoiled", "gap_recovered": "gap recovered"}


def section_tables(section: Section) -> list[Table]:
    """Scores, differences, answers that changed, and costs where they were measured; the mean of several runs."""
    rows = all_runs(section)
    return [*_run_tables(rows, section), *cost_tables(section)]


def detail_tables(section: Section) -> list[Table]:
    """What is looked up: the numbers of every run, and the seconds of the stages."""
    rows = each_run(section)
    return [*(_run_tables(rows, section) if rows else []), *stage_tables(section)]


def _run_tables(rows: Rows, section: Section) -> list[Table]:
    return [*_scores(rows, section), *_written(rows, section), *_gains(rows, section.unit), *_changes(rows)]


def _scores(rows: Rows, section: Section) -> list[Table]:
    caption = _caption(section.unit.score, rows)
    tables: list[Table] = []
    for systems in _split(section.systems):
        size = not tables
        groups = [
            Group(title, [[row.head(), *[row.size()] * size, *map(row.score, systems)] for row in group])
            for title, group in rows
        ]
        marked = any(cell.mark for group in groups for row in group.rows for cell in row)
        notes = [f"{AHEAD} ahead of matched, or deranged ahead of the receiver."] * marked
        columns = ["data", *["n"] * size, *map(system_title, systems)]
        title = f"Matched beside other ways, {caption}" if tables else capital(caption)
        tables.append(Table(title, columns, groups, " ".join([*notes, *facts(section, systems)])))
    return tables


def _written(rows: Rows, section: Section) -> list[Table]:
    """How many written answers are right to the word, and how many hold the right words, beside their F1."""
    tables = []
    for key, (title, note) in WRITTEN.items():
        systems = [name for name in section.systems if any(name in one.written.get(key, {}) for one in every(rows))]
        groups = [
            Group(head, [[row.head(), *(row.written(key, name) for name in systems)] for row in group])
            for head, group in rows
        ]
        if systems:
            tables.append(Table(f"{title}, percent", ["data", *map(system_title, systems)], groups, note))
    return tables


def _caption(text: str, rows: Rows) -> str:
    """With what stands in brackets, where no title of a group says it."""
    single = all(len(row.numbers) == 1 for _, group in rows for row in group)
    return f"{text}, with 95 % intervals" if single else text


def _split(systems: Sequence[str]) -> list[list[str]]:
    """Systems that stand in one table: all if they fit, else the pair and its controls first, matched in each."""
    if len(systems) <= _WIDE:
        return [list(systems)]
    first = [name for name in systems if name in ("receiver", "sharer", "matched") or name in CONTROLS]
    rest = [name for name in systems if name not in first]
    again = ["matched"] if "matched" in systems else []
    parts = max(1, math.ceil(len(rest) / _WIDE))
    size = max(1, math.ceil(len(rest) / parts))
    return [first, *([*again, *rest[start : start + size]] for start in range(0, len(rest), size))]


def _gains(rows: Rows, unit: Unit) -> list[Table]:
    letters = in_order((letter for one in every(rows) for letter in one.gains), GAINS)
    if not letters:
        return []
    groups = [
        Group(title, [[row.head(), *(row.gain(letter) for letter in letters), _losses(row)] for row in group])
        for title, group in rows
    ]
    meanings = ", ".join(
        f"{letter} = {' - '.join(map(system_title, GAINS[letter]))}" for letter in letters if letter in GAINS
    )
    caption = capital(_caption(f"differences, {unit.points}", rows))
    return [Table(caption, ["data", *letters, "losses"], groups, f"{meanings}.")]


def _losses(row: Row) -> Cell:
    words = row.words()
    return Cell(words or NOTHING, mark=LOST if words else "", words=True)


def _changes(rows: Rows) -> list[Table]:
    """Which answers changed, against the receiver alone."""
    fields = [key for key in _CHANGES if any(getattr(one, key) is not None for one in every(rows))]
    if not fields:
        return []
    tested = any(len(row.numbers) == 1 for _, group in rows for row in group)
    groups = [Group(title, [_change_row(row, fields, tested) for row in group]) for title, group in rows]
    columns = ["data", *(_CHANGES[key] for key in fields), *["McNemar p"] * tested]
    note = (
        "Mended and spoiled: questions that only matched, or only the receiver, has right. Gap recovered: G over the "
        "distance from the receiver to the sharer."
    )
    return [Table("Answers that changed, percent", columns, groups, note)]


def _change_row(row: Row, fields: Sequence[str], tested: bool) -> list[Cell]:
    cells = [row.head()]
    for key in fields:
        values = [value for one in row.numbers if (value := getattr(one, key)) is not None]
        cells.append(number_cell(fixed(mean(values), 1) if values else None))
    p = row.numbers[0].mcnemar_p
    return [*cells, *[number_cell(None if p is None else p_value(p))] * tested]
