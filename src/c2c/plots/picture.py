"""A picture: a drawn figure with its title and how to read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        name: a short word, for ids.
        title: what it shows.
        caption: how to read it.
        figure: drawn with the canvas's colours.
    """

    name: str
    title: str
    caption: str
    figure: Figure
