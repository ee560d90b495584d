"""What a table is made of, for Markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from c2c.reporting.text import Estimate, fixed, interval, mean, spread

NOTHING = "\u2013"
WON, AHEAD, LOST = "\u2713", "\u25b2", "\u2717"


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


def estimate_cell(
    estimates: Sequence[Estimate], digits: int, runs: int, *, signed: bool = False, mark: str = "", strong: bool = False
) -> Cell:
    """A number with its interval, or the mean of several runs with the lowest and the highest.

    Args:
        estimates: of the runs that have one; without any the cell says so.
        digits: decimals.
        runs: how many runs there are; where some have no estimate the cell says how many have.
        signed: show a plus.
        mark: sign beside the number.
        strong: what the table is about.
    """
    if not estimates:
        return Cell(NOTHING)
    values = [estimate.value for estimate in estimates]
    same = fixed(min(values), digits) == fixed(max(values), digits)  # as the models alone are in every run
    several = spread(values, digits) if signed or not same else ""
    detail = several if runs > 1 else interval(estimates[0], digits)
    if len(values) < runs:
        detail = f"{detail} {len(values)} of {runs} runs".strip()
    return Cell(fixed(mean(values), digits, signed=signed), detail, mark=mark, strong=strong)


def number_cell(text: str | None) -> Cell:
    """A number that is text already, or nothing."""
    return Cell(NOTHING if text is None else text)
