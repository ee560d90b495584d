"""All sections at a glance: a line for each pair and data set, short enough for a README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from c2c.reporting.cells import NOTHING, Cell, Group, Table
from c2c.reporting.findings import gain_words
from c2c.reporting.losses import worst_words
from c2c.reporting.names import GAINS, POOLED, system_title
from c2c.reporting.rows import Row, all_runs
from c2c.reporting.sections import Section

_SYSTEMS = ("receiver", "sharer", "matched", "deranged")
_LETTERS = ("P", "S", "T", "A")
_TEXT_TIME = "text's seconds / ours"


@dataclass(frozen=True)
class Verdict:
    """What a section wins and loses, in a few words each.

    Attributes:
        title: pair and data.
        link: slug of the section.
        won: gains, empty without any.
        lost: losses, empty without any.
    """

    title: str
    link: str
    won: str
    lost: str


def overview(sections: Sequence[Section], *, brief: bool = False) -> list[Table]:
    """One table for each unit, a group for each pair and a row for each data set.

    Args:
        sections: what to show.
        brief: one row for each section, over all of its data.
    """
    units = dict.fromkeys(section.unit for section in sections)
    return [_table([section for section in sections if section.unit == unit], brief) for unit in units]


def verdicts(sections: Iterable[Section]) -> list[Verdict]:
    """Gains and losses of every section in words."""
    return [_verdict(section) for section in sections]


def _verdict(section: Section) -> Verdict:
    own = [_label(section, task, brief=False) for task in section.tasks if task != POOLED]
    data = ", ".join(own) if len(own) <= 3 else f"{own[0]} and {len(own) - 1} others"
    return Verdict(f"{section.title}, {data}", section.slug, "; ".join(gain_words(section)), _lost(section))


def _lost(section: Section) -> str:
    """Losses over all questions, then those that show on single tasks only."""
    rows = [one for task in section.tasks for one in section.numbers(task)]
    overall = worst_words(section.numbers(section.headline), section.unit)
    single = [words for words in worst_words(rows, section.unit) if words not in overall]
    parts = ["; ".join(overall)] * bool(overall) + [f"on some of the data: {'; '.join(single)}"] * bool(single)
    return "; ".join(parts)


def _table(sections: Sequence[Section], brief: bool) -> Table:
    unit = sections[0].unit
    found = [
        (section, row)
        for section in sections
        for _, rows in all_runs(section)
        for row in rows
        if not brief or row.task == section.headline
    ]
    systems = [name for name in _SYSTEMS if any(name in one.scores for _, row in found for one in row.numbers)]
    letters = [letter for letter in _LETTERS if any(letter in one.gains for _, row in found for one in row.numbers)]
    timed = any(row.ratios("text") for _, row in found)
    groups: dict[str, list[list[Cell]]] = {}
    for section, row in found:
        groups.setdefault(section.title, []).append(_line(section, row, systems, letters, timed, brief))
    columns = ["receiver \u2190 sharer", "n", *map(system_title, systems), *letters, *[_TEXT_TIME] * timed]
    caption = f"At a glance, {unit.score}"
    return Table(caption, columns, [Group(title, rows) for title, rows in groups.items()], _note(letters, timed))


def _line(
    section: Section, row: Row, systems: Sequence[str], letters: Sequence[str], timed: bool, brief: bool
) -> list[Cell]:
    runs = len(row.numbers)
    head = Cell(_label(section, row.task, brief), link=section.slug, strong=row.task == POOLED and not brief)
    size = replace(row.size(), detail=f"({runs} runs)" * (runs > 1))
    scores = [replace(row.score(name), detail="") for name in systems]
    return [head, size, *scores, *(row.gain(letter) for letter in letters), *[row.ratio("text")] * timed]


def _label(section: Section, task: str, brief: bool) -> str:
    """The data, with what tells it from the same data read in another way."""
    own = [name for name in section.tasks if name != POOLED]
    together = ", ".join(own) if brief else f"these {len(own)} together"
    title = together if task == POOLED else task
    how = ["generated"] * (section.mode == "generate") + [section.variant] * bool(section.variant)
    return ", ".join([title, *how])


def _note(letters: Sequence[str], timed: bool) -> str:
    meanings = [f"{letter} = {' - '.join(map(system_title, GAINS[letter]))}" for letter in letters]
    parts = [", ".join(meanings) + ", with 95 % intervals or the lowest and highest run"] if meanings else []
    if timed:
        parts.append("last column: how many times as long text-to-text takes")
    parts.append(
        "\u25b2 ahead of matched, or deranged ahead of the receiver; \u2717 a loss; " + NOTHING + " not measured"
    )
    return "; ".join(parts) + "."
