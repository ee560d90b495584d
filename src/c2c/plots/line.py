"""Tokens as boxes on lines of equally wide letters."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

COLUMNS = 56  # letters on a line
MARKS = {"\n": "\u21b5", "\t": "\u2192", "\r": ""}


@dataclass(frozen=True)
class Box:
    """Where a token stands.

    Attributes:
        token: its index.
        text: what is written in it.
        line: counted from 0.
        start: its first column.
        width: columns that it takes, at least one.
    """

    token: int
    text: str
    line: int
    start: int
    width: int

    @property
    def middle(self) -> float:
        """Its middle column."""
        return self.start + self.width / 2


def visible(text: str) -> str:
    """A token's text with marks for what can't be seen."""
    text = "".join(MARKS.get(letter, letter) for letter in text)
    if text.startswith(" "):
        text = "\u00b7" + text[1:]
    return text or "\u2205"


def boxes(texts: Sequence[str], tokens: Sequence[int], columns: int = COLUMNS) -> list[Box]:
    """Lay tokens out, from the left, going on to the next line where one is full."""
    placed: list[Box] = []
    line = start = 0
    for token in tokens:
        text = visible(texts[token])
        width = min(max(columns_of(text), 1), columns)
        if start > 0 and start + width > columns:
            line, start = line + 1, 0
        placed.append(Box(token, text, line, start, width))
        start += width
    return placed


def columns_of(text: str) -> int:
    """How many columns a text takes: East Asian letters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
