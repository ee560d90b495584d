"""Which sharer token each receiver token takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from c2c.analysis.drawing import panels
from c2c.plots.line import COLUMNS, Box, boxes, columns_of, visible
from c2c.plots.picture import Picture
from c2c.plots.reading import Reading
from c2c.plots.strength import write
from c2c.reporting.canvas import PAINT, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SYSTEM = 62.0  # pixels of two rows of tokens with the lines between them
_LETTERS = 9.5


def draw_tokens(reading: Reading) -> Picture:
    """Both models' tokens above each other, with a line from each receiver token to the one that it takes."""
    takes = dict(reading.pairs)
    placed = boxes(reading.ours, range(len(reading.ours)))
    lines = 1 + max(box.line for box in placed)
    names = [short(name.rstrip("/").rpartition("/")[2], 22) for name in (reading.receiver, reading.sharer)]
    figure, (panel,) = panels([f"{names[0]} above, {names[1]} below"], [lines * _SYSTEM], left=14)
    panel.set_xlim(0, COLUMNS)
    panel.set_ylim(lines, 0)
    panel.axis("off")
    for line in range(lines):
        _system(panel, line, [box for box in placed if box.line == line], takes, reading.theirs)
    caption = (
        "The two models cut the text into other tokens, and have other templates. A token of the message takes the "
        "sharer's token that covers its last character; the template after it takes the sharer's last token, which has "
        "read everything. Grey tokens take none. \u00b7 is a space, \u21b5 a new line."
    )
    return Picture("tokens", "Token alignment", caption, figure)


def _system(panel: Axes, line: int, ours: Sequence[Box], takes: dict[int, int], theirs: Sequence[str]) -> None:
    """One line of the receiver's tokens, and below it those of the sharer that they take."""
    takers: dict[int, list[Box]] = {}
    for box in ours:
        write(panel, box, line + 0.2, PAINT["ink" if box.token in takes else "muted"], _LETTERS)
        _border(panel, box.start + box.width, line + 0.08, line + 0.32)
        if box.token in takes:
            takers.setdefault(takes[box.token], []).append(box)
    for other in _below(takers, theirs):
        write(panel, other, line + 0.7, PAINT["sharer"], _LETTERS)
        _border(panel, other.start + other.width, line + 0.58, line + 0.82)
        for box in takers[other.token]:
            panel.plot([box.middle, other.middle], [line + 0.36, line + 0.54], color=PAINT["matched"], lw=0.9)


def _below(takers: dict[int, list[Box]], theirs: Sequence[str]) -> list[Box]:
    """The sharer's tokens, each as near as there is room to the middle of those that take it."""
    placed: list[Box] = []
    for token, above in takers.items():
        text = visible(theirs[token])
        width = max(columns_of(text), 1)
        wanted = sum(box.middle for box in above) / len(above) - width / 2
        start = max(round(wanted), placed[-1].start + placed[-1].width if placed else 0)
        placed.append(Box(token, text, 0, start, width))
    end = COLUMNS
    for place in range(len(placed) - 1, -1, -1):  # what is beyond the right border moves to the left
        box = placed[place]
        if box.start + box.width <= end:
            break
        placed[place] = replace(box, start=end - box.width)
        end = placed[place].start
    return placed


def _border(panel: Axes, x: float, top: float, bottom: float) -> None:
    panel.plot([x, x], [top, bottom], color=PAINT["grid"], lw=0.8)
