"""Facts: a page with several facts of one kind, one of which is asked for.

With one fact per page a receiver need only repeat what was handed over. Here the name in the question decides.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from c2c.data.synthetic.base import NAMES, NUMBERS, OBJECTS, TOWNS, generate

_FIRST = (*NAMES, "Maria", "Nils", "Olga", "Peter", "Rosa", "Simon", "Tessa", "Viktor", "Wanda", "Yusuf", "Zoe", "Ben")
_LAST = ("Berger", "Holm", "Costa", "Novak", "Lind", "Moreau", "Okafor", "Sato", "Weber", "Rossi", "Khan", "Dunn")
_TOWNS = (*TOWNS, "Warsaw", "Paris", "Boston", "Lagos", "Delhi", "Seoul", "Perth", "Geneva", "Malta", "Bergen", "Turin")
_JOBS = ("nurse", "baker", "pilot", "teacher", "plumber", "lawyer", "farmer", "painter", "driver", "chemist", "cook")
_COLOURS = ("red", "blue", "green", "white", "black", "yellow", "purple", "brown", "grey", "silver")
_HOUSES = ("boat house", "town hall", "old mill", "library", "station", "lighthouse", "school", "bridge", "theatre")
_HOURS = ("eight", "nine", "ten", "eleven", "noon", "two", "three", "four", "five", "six")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Kind:
    """Templates of one kind of fact.

    Attributes:
        statements: sentences with ``{who}``, ``{what}`` and perhaps ``{number}``.
        questions: questions with ``{who}``, answered by ``{what}``.
        reverse: a question with ``{what}``, answered by ``{who}``; empty where there is none.
        who: kind of value of ``{who}``.
        what: kind of value of ``{what}``.
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    reverse: str
    who: str
    what: str


KINDS = (
    Kind(
        ("The {number} of {who} is {what}.", "{who} has {number} {what}."),
        ("What is the {number} of {who}?", "Which {number} does {who} have?"),
        "Whose {number} is {what}?",
        "person",
        "key",
    ),
    Kind(
        ("{who} lives in {what}.", "The home of {who} is in {what}."),
        ("Where does {who} live?", "In which town does {who} live?"),
        "Who lives in {what}?",
        "person",
        "town",
    ),
    Kind(
        ("{who} works as a {what}.", "{who} is a {what}."),
        ("What does {who} work as?", "What is the job of {who}?"),
        "Who is a {what}?",
        "person",
        "job",
    ),
    Kind(
        ("{who} was born in {what}.",), ("When was {who} born?", "In what year was {who} born?"), "", "person", "year"
    ),
    Kind(
        ("{who} bought a {what}.", "The {what} was bought by {who}."),
        ("What did {who} buy?",),
        "Who bought the {what}?",
        "person",
        "object",
    ),
    Kind(("{who} comes on {what}.",), ("When does {who} come?", "On which day does {who} come?"), "", "person", "time"),
    Kind(
        ("{who} was built in {what}.", "{who} dates from {what}."),
        ("When was {who} built?", "In what year was {who} built?"),
        "",
        "house",
        "year",
    ),
    Kind(
        ("{who} was built by {what}.", "{what} built {who}."),
        ("Who built {who}?",),
        "What did {what} build?",
        "house",
        "person",
    ),
)


def facts(split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Generate rows with ``context``, ``question`` and ``answer``, without end.

    What is asked about whom in ``test`` is never asked in ``train``.

    Args:
        split: ``train`` or ``test``.
        seed: of the draw.
    """
    return generate("facts", _page, split, random.Random(f"{split} {seed}"), key=_asked)


def _page(draw: random.Random) -> dict[str, str]:
    """Two to five sentences; most pages say the same of everybody, so that only the name tells them apart."""
    count, number = draw.randint(2, 5), draw.choice(NUMBERS)
    same = draw.choice(KINDS)
    kinds = [same if draw.random() < 0.7 else draw.choice(KINDS) for _ in range(count)]
    values: list[tuple[str, str]] = []
    for kind in kinds:
        taken = {value for pair in values for value in pair}
        values.append((_value(draw, kind.who, taken), _value(draw, kind.what, taken)))
    said = [
        _sentence(draw.choice(kind.statements), who, what, number)
        for kind, (who, what) in zip(kinds, values, strict=True)
    ]
    kind, (who, what) = draw.choice(list(zip(kinds, values, strict=True)))
    reverse = bool(kind.reverse) and draw.random() < 0.25
    question = _sentence(kind.reverse if reverse else draw.choice(kind.questions), who, what, number)
    return {"context": " ".join(said), "question": question, "answer": who if reverse else what}


def _sentence(form: str, who: str, what: str, number: str) -> str:
    text = form.format(who=who, what=what, number=number)
    return text[0].upper() + text[1:]


def _value(draw: random.Random, kind: str, taken: set[str]) -> str:
    """A value that the page does not have yet."""
    while (value := _VALUES[kind](draw)) in taken:
        pass
    return value


def _person(draw: random.Random) -> str:
    first = draw.choice(_FIRST)
    return first if draw.random() < 0.5 else f"{first} {draw.choice(_LAST)}"


_VALUES: dict[str, Callable[[random.Random], str]] = {
    "person": _person,
    "house": lambda draw: f"the {draw.choice(_HOUSES)}",
    "key": lambda draw: "".join(draw.choice("0123456789") for _ in range(draw.randint(3, 5))),
    "town": lambda draw: draw.choice(_TOWNS),
    "job": lambda draw: draw.choice(_JOBS),
    "object": lambda draw: f"{draw.choice(_COLOURS)} {draw.choice(OBJECTS)}",
    "year": lambda draw: str(draw.randint(1840, 2010)),
    "time": lambda draw: f"{draw.choice(_DAYS)} at {draw.choice(_HOURS)}",
}


def _asked(row: dict[str, str]) -> str:
    return f"{row['question']} {row['answer']}"
