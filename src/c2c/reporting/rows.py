"""Rows of the tables: what one or several runs say of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from c2c.reporting.cells import AHEAD, LOST, Cell, estimate_cell, number_cell
from c2c.reporting.losses import loss_words, marked
from c2c.reporting.names import POOLED
from c2c.reporting.results import Numbers
from c2c.reporting.sections import Section, run_title
from c2c.reporting.text import Estimate, Unit, fixed, mean, ratio_of


@dataclass(frozen=True)
class Row:
    """What one or several runs say of a task."""

    task: str
    numbers: list[Numbers]
    unit: Unit

    @cached_property
    def marked(self) -> set[str]:
        """Systems and gains to mark."""
        return marked(self.numbers, self.unit)

    def words(self) -> str:
        """The losses in words, with the number of runs that have them."""
        counts = loss_words(self.numbers, self.unit)
        several = len(self.numbers) > 1
        return "; ".join(words + f" ({count} of {of})" * several for words, (count, of) in counts.items())

    def head(self) -> Cell:
        """The task."""
        return Cell(self.task, strong=self.task == POOLED)

    def size(self) -> Cell:
        """The number of items."""
        return Cell(" to ".join(f"{n:,}" for n in sorted({one.n for one in self.numbers})))

    def score(self, system: str) -> Cell:
        """A system's score."""
        estimates = [one.scores[system] for one in self.numbers if system in one.scores]
        mark = AHEAD if system in self.marked else ""
        return estimate_cell(estimates, self.unit.digits, len(self.numbers), mark=mark, strong=system == "matched")

    def written(self, key: str, system: str) -> Cell:
        """The percentage of a system's answers of which ``key`` holds, the mean of several runs."""
        values = [one.written[key][system] for one in self.numbers if system in one.written.get(key, {})]
        return number_cell(fixed(mean(values), 1) if values else None)

    def gain(self, letter: str) -> Cell:
        """A difference between two systems."""
        estimates = [one.gains[letter] for one in self.numbers if letter in one.gains]
        mark = LOST if letter in self.marked else ""
        return estimate_cell(estimates, self.unit.digits, len(self.numbers), signed=True, mark=mark)

    def ratios(self, system: str) -> list[Estimate]:
        """How many times as long as matched a system takes, in the runs that measured both."""
        found = (ratio_of(one.speed, one.costs, system) for one in self.numbers)
        return [ratio for ratio in found if ratio is not None]

    def ratio(self, system: str) -> Cell:
        """The same as a cell; marked where matched is slower than text-to-text."""
        mark = LOST if f"speed {system}" in self.marked else ""
        return estimate_cell(self.ratios(system), 2, len(self.numbers), mark=mark)


Rows = list[tuple[str, list[Row]]]


def all_runs(section: Section) -> Rows:
    """The mean over the runs, or the only run, with what to call it."""
    rows = [Row(task, section.numbers(task), section.unit) for task in section.tasks]
    runs = len(section.runs)
    title = f"mean of {runs} runs (lowest to highest)" if runs > 1 else run_title(section.runs[0])
    return [(title, rows)]


def each_run(section: Section) -> Rows:
    """Every run by itself; nothing where there is one only."""
    if len(section.runs) == 1:
        return []
    return [(run_title(run), [Row(one.task, [one], section.unit) for one in run.tasks]) for run in section.runs]


def every(rows: Rows) -> Sequence[Numbers]:
    """All numbers behind some rows."""
    return [one for _, group in rows for row in group for one in row.numbers]
