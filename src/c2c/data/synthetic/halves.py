"""Halves: answers that need both what the sharer has read and what the receiver alone has read.

For instance the receiver has read what was ordered, the sharer where the customer lives, and the label needs both.
Neither model alone can write it, and nothing has to be inferred: each half stands in the text of one of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from c2c.data.synthetic.base import WORDS, generate


def halves(split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Generate rows with ``context``, ``known``, ``question`` and ``answer``, without end.

    What the sharer reads in the split ``test`` it never reads in ``train``, whoever it is about.
    """
    draw = random.Random(f"{split} {seed}")
    return generate("halves", _row, split, draw, key=lambda row: row["answer"].partition(", ")[2])


def _row(draw: random.Random) -> dict[str, str]:
    return draw.choice((_label, _visit, _code))(draw)


def _label(draw: random.Random) -> dict[str, str]:
    name = draw.choice(WORDS["names"])
    what = f"{draw.randint(2, 9)} {draw.choice(WORDS['colours'])} {draw.choice(WORDS['goods'])}"
    where = f"{draw.randint(11, 99)} {draw.choice(WORDS['streets'])}"
    return {
        "context": f"{name} lives at {where}.",
        "known": f"{name} has ordered {what}.",
        "question": f"Write the label of the parcel for {name}: what is in it, and the address.",
        "answer": f"{what}, {where}",
    }


def _visit(draw: random.Random) -> dict[str, str]:
    name = draw.choice(WORDS["names"])
    hour = f"{draw.randint(8, 17)}:{draw.choice(WORDS['minutes'])}"
    room = f"room {draw.randint(100, 999)}"
    return {
        "context": f"{name} is expected in {room}.",
        "known": f"{name} comes at {hour}.",
        "question": f"Write the note for {name}: the time and the room.",
        "answer": f"{hour}, {room}",
    }


def _code(draw: random.Random) -> dict[str, str]:
    first, second = (str(draw.randint(100, 999)) for _ in range(2))
    return {
        "context": f"The second part of the code is {second}.",
        "known": f"The first part of the code is {first}.",
        "question": "Write the code: the first part and the second part.",
        "answer": f"{first}, {second}",
    }
