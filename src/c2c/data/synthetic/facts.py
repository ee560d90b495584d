"""Facts: a page with several facts of one kind, one of which is asked for.

With one fact per page a receiver need only repeat what was handed over. Here the name in the question decides.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from c2c.data.synthetic.base import WORDS, generate

KINDS: list[dict[str, Any]] = WORDS["facts"]
_FIRST_NAMES = WORDS["names"] + WORDS["more_names"]
_TOWNS = WORDS["towns"] + WORDS["more_towns"]


def facts(split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Generate rows with ``context``, ``question`` and ``answer``, without end.

    What is asked about whom in the split ``test`` is never asked in ``train``.
    """
    draw = random.Random(f"{split} {seed}")
    return generate("facts", _page, split, draw, key=lambda row: f"{row['question']} {row['answer']}")


def _page(draw: random.Random) -> dict[str, str]:
    """Two to five sentences; most pages say the same of everybody, so that only the name tells them apart."""
    count, number = draw.randint(2, 5), draw.choice(WORDS["numbers"])
    same = draw.choice(KINDS)
    kinds = [same if draw.random() < 0.7 else draw.choice(KINDS) for _ in range(count)]
    values: list[tuple[str, str]] = []
    for kind in kinds:
        taken = {value for pair in values for value in pair}
        values.append((_new_value(draw, kind["who"], taken), _new_value(draw, kind["what"], taken)))
    said = [
        _sentence(draw.choice(kind["statements"]), who, what, number)
        for kind, (who, what) in zip(kinds, values, strict=True)
    ]
    kind, (who, what) = draw.choice(list(zip(kinds, values, strict=True)))
    reverse = bool(kind["reverse"]) and draw.random() < 0.25
    question = _sentence(kind["reverse"] if reverse else draw.choice(kind["questions"]), who, what, number)
    return {"context": " ".join(said), "question": question, "answer": who if reverse else what}


def _sentence(form: str, who: str, what: str, number: str) -> str:
    text = form.format(who=who, what=what, number=number)
    return text[0].upper() + text[1:]


def _new_value(draw: random.Random, kind: str, taken: set[str]) -> str:
    while (value := _VALUES[kind](draw)) in taken:
        pass
    return value


def _person(draw: random.Random) -> str:
    first: str = draw.choice(_FIRST_NAMES)
    return first if draw.random() < 0.5 else f"{first} {draw.choice(WORDS['surnames'])}"


_VALUES: dict[str, Callable[[random.Random], str]] = {
    "person": _person,
    "house": lambda draw: f"the {draw.choice(WORDS['houses'])}",
    "key": lambda draw: "".join(draw.choice("0123456789") for _ in range(draw.randint(3, 5))),
    "town": lambda draw: draw.choice(_TOWNS),
    "job": lambda draw: draw.choice(WORDS["jobs"]),
    "object": lambda draw: f"{draw.choice(WORDS['fact_colours'])} {draw.choice(WORDS['objects'])}",
    "year": lambda draw: str(draw.randint(1840, 2010)),
    "time": lambda draw: f"{draw.choice(WORDS['days'])} at {draw.choice(WORDS['hours'])}",
}
