"""Relay: a random key that only the sharer has read is asked of the receiver. The simplest test of transfer.

Nothing in a question hints at its answer, so a receiver alone, or one with a wrong message, is right by luck only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from c2c.data.synthetic.base import WORDS, generate


def relay(split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Generate rows with ``context``, ``question`` and ``answer``, without end.

    Keys of the split ``test`` never occur in ``train``.
    """
    return generate("relay", lambda draw: draw.choice((_number, _thing))(draw), split, random.Random(f"{split} {seed}"))


def _number(draw: random.Random) -> dict[str, str]:
    name, thing = draw.choice(WORDS["names"]), draw.choice(WORDS["numbers"])
    key = "".join(draw.choice("0123456789") for _ in range(draw.randint(3, 5)))
    other = draw.choice([one for one in WORDS["names"] if one != name])
    noise = draw.choice(("", f"{other} has left for {draw.choice(WORDS['towns'])}. ", f"{other} is late today. "))
    return {
        "context": f"{noise}The {thing} of {name} is {key}.",
        "question": f"What is the {thing} of {name}?",
        "answer": key,
    }


def _thing(draw: random.Random) -> dict[str, str]:
    name, colour = draw.choice(WORDS["names"]), draw.choice([*WORDS["colours"], "silver"])
    thing, town = draw.choice(WORDS["objects"]), draw.choice(WORDS["towns"])
    return {
        "context": f"{name} bought the {colour} {thing} in {town}.",
        "question": f"What did {name} buy, of which colour, and where?",
        "answer": f"the {colour} {thing} in {town}",
    }
