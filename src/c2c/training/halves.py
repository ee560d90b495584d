"""Halves: what is asked follows from two facts, of which the sharer has read one and the receiver the other.

The receiver knows which locker is Anna's, the sharer knows the number of each locker. Neither alone can say Anna's
number: the sharer guesses among the numbers that it has read, the receiver has read none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from c2c.training.made_up import made_up

_NAMES = ("Anna", "Bruno", "Carla", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leo")
_COLOURS = ("red", "blue", "green", "white", "black", "yellow", "purple", "orange", "brown", "grey", "silver")
_THINGS = ("locker", "room", "ticket", "badge", "table", "box")
_FACTS = 3  # things with a number in what the sharer reads


def halves(split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Rows with ``context``, ``known``, ``question`` and ``answer``, without end.

    Answers of ``test`` never occur in ``train``.

    Args:
        split: ``train`` or ``test``.
        seed: of the draw.
    """
    return made_up("halves", _facts, split, random.Random(f"{split} {seed}"))


def _facts(draw: random.Random) -> dict[str, str]:
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    colours = draw.sample(_COLOURS, _FACTS)
    numbers = ["".join(draw.choice("0123456789") for _ in range(draw.randint(3, 4))) for _ in colours]
    asked = draw.randrange(_FACTS)
    lines = [f"The {colour} {thing} has the number {number}." for colour, number in zip(colours, numbers, strict=True)]
    return {
        "context": " ".join(lines),
        "known": f"{name} has the {colours[asked]} {thing}.",
        "question": f"What is the number of the {thing} of {name}?",
        "answer": numbers[asked],
    }
