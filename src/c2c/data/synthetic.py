"""Synthetic rows without end: questions whose answer only the context gives."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import yaml

Fields = dict[str, Any]
Generator = Callable[[str, int], Iterator[Fields]]
WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
GENERATORS: dict[str, Generator] = {}
_TEST = 5  # one key in so many is kept for tests
_ELEMENTS = 3  # in a page


def generator(
    key: Callable[[Fields], str] = lambda row: row["answer"], salt: str = ""
) -> Callable[[Callable[[random.Random], Fields]], Generator]:
    """Make a kind of rows of a function that draws the fields of one.

    It generates rows of a split (``train`` or ``test``) and seed without end; keys of the test split never occur in
    training, whatever the seeds.

    Args:
        key: the part of a row that decides its split.
        salt: put before split and seed.
    """

    def register(make: Callable[[random.Random], Fields]) -> Generator:
        @wraps(make)
        def rows(split: str, seed: int) -> Iterator[Fields]:
            draw, count = random.Random(f"{salt}{split} {seed}"), 0
            while True:
                row = make(draw)
                if (zlib.crc32(key(row).encode()) % _TEST == 0) == (split == "test"):
                    yield {"id": f"{make.__name__}/{split}/{count}"} | row
                    count += 1

        GENERATORS[make.__name__] = rows
        return rows

    return register


@generator()
def relay(draw: random.Random) -> Fields:
    """Draw ``context``, ``question`` and ``answer``: a random key that the context alone holds.

    The simplest test of transfer. Nothing in a question hints at its answer, so a receiver alone, or one with a wrong
    message, is right by luck only.
    """
    if draw.choice((True, False)):
        name, thing = draw.choice(WORDS["names"]), draw.choice(WORDS["numbers"])
        key = _digits(draw)
        other = draw.choice([one for one in WORDS["names"] if one != name])
        noise = draw.choice(("", f"{other} has left for {draw.choice(WORDS['towns'])}. ", f"{other} is late today. "))
        context, question = f"{noise}The {thing} of {name} is {key}.", f"What is the {thing} of {name}?"
        return {"context": context, "question": question, "answer": key}
    name, colour = draw.choice(WORDS["names"]), draw.choice([*WORDS["colours"], "silver"])
    thing, town = draw.choice(WORDS["objects"]), draw.choice(WORDS["towns"])
    return {
        "context": f"{name} bought the {colour} {thing} in {town}.",
        "question": f"What did {name} buy, of which colour, and where?",
        "answer": f"the {colour} {thing} in {town}",
    }


@generator(key=lambda row: f"{row['question']} {row['answer']}")
def facts(draw: random.Random) -> Fields:
    """Draw ``context``, ``question`` and ``answer``: two to five facts, one of which is asked for.

    With one fact per page a receiver need only repeat what was handed over. Most pages say the same of everybody, so
    that only the name in the question tells them apart. What the test split asks about whom is never trained.
    """
    count, number = draw.randint(2, 5), draw.choice(WORDS["numbers"])
    same = draw.choice(WORDS["facts"])
    kinds = [same if draw.random() < 0.7 else draw.choice(WORDS["facts"]) for _ in range(count)]
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


@generator(key=lambda row: row["answer"].partition(", ")[2])
def halves(draw: random.Random) -> Fields:
    """Draw ``context``, ``known``, ``question`` and ``answer``: both models have read a half of the answer.

    For instance the receiver has read what was ordered, the sharer where the customer lives, and the label needs both.
    Neither model alone can write it, and nothing has to be inferred. What the sharer reads in the test split is never
    trained, whoever it is about.
    """
    kind = draw.choice(("label", "visit", "code"))
    if kind == "code":
        mine, theirs = (str(draw.randint(100, 999)) for _ in range(2))
        context, known = f"The second part of the code is {theirs}.", f"The first part of the code is {mine}."
        question = "Write the code: the first part and the second part."
    elif kind == "label":
        name = draw.choice(WORDS["names"])
        mine = f"{draw.randint(2, 9)} {draw.choice(WORDS['colours'])} {draw.choice(WORDS['goods'])}"
        theirs = f"{draw.randint(11, 99)} {draw.choice(WORDS['streets'])}"
        context, known = f"{name} lives at {theirs}.", f"{name} has ordered {mine}."
        question = f"Write the label of the parcel for {name}: what is in it, and the address."
    else:
        name = draw.choice(WORDS["names"])
        mine, theirs = f"{draw.randint(8, 17)}:{draw.choice(WORDS['minutes'])}", f"room {draw.randint(100, 999)}"
        context, known = f"{name} is expected in {theirs}.", f"{name} comes at {mine}."
        question = f"Write the note for {name}: the time and the room."
    return {"context": context, "known": known, "question": question, "answer": f"{mine}, {theirs}"}


@generator(key=lambda row: row["answer"].partition(">")[0], salt="skeleton ")
def skeleton(draw: random.Random) -> Fields:
    """Draw ``context``, ``question`` and ``answer``: a text is to be written into an element of a page.

    The Coder-to-Writer story of the original work as rows that can be scored: the text stands in the question, and
    which element it belongs into, with its tag, id and class, only in the page. An element's topic precedes it, since
    the sharer's entry of a token depends only on what precedes the token. Elements of the test split are never trained.
    """
    topics, tags = draw.sample(WORDS["topics"], _ELEMENTS), [draw.choice(WORDS["tags"]) for _ in range(_ELEMENTS)]
    names = zip(tags, draw.sample(WORDS["ids"], _ELEMENTS), draw.sample(WORDS["classes"], _ELEMENTS), strict=True)
    openings = [f'<{tag} id="{name}" class="{kind}">' for tag, name, kind in names]
    asked = draw.randrange(_ELEMENTS)
    text = " ".join(draw.choice(WORDS[part]) for part in ("subjects", "predicates", "times")) + "."
    lines = [f"<!-- {topic} --> {o}</{tag}>" for o, topic, tag in zip(openings, topics, tags, strict=True)]
    return {
        "context": "<body>\n" + "\n".join(lines) + "\n</body>",
        "question": f"Write the element of the page for the {topics[asked]}, with this text in it: {text}",
        "answer": f"{openings[asked]}{text}</{tags[asked]}>",
    }


def _digits(draw: random.Random) -> str:
    return "".join(draw.choice("0123456789") for _ in range(draw.randint(3, 5)))


def _sentence(form: str, who: str, what: str, number: str) -> str:
    text = form.format(who=who, what=what, number=number)
    return text[0].upper() + text[1:]


def _new_value(draw: random.Random, kind: str, taken: set[str]) -> str:
    while (value := _VALUES[kind](draw)) in taken:
        pass
    return value


def _person(draw: random.Random) -> str:
    first: str = draw.choice(WORDS["names"] + WORDS["more_names"])
    return first if draw.random() < 0.5 else f"{first} {draw.choice(WORDS['surnames'])}"


_VALUES: dict[str, Callable[[random.Random], str]] = {
    "person": _person,
    "house": lambda draw: f"the {draw.choice(WORDS['houses'])}",
    "key": _digits,
    "town": lambda draw: draw.choice(WORDS["towns"] + WORDS["more_towns"]),
    "job": lambda draw: draw.choice(WORDS["jobs"]),
    "object": lambda draw: f"{draw.choice(WORDS['fact_colours'])} {draw.choice(WORDS['objects'])}",
    "year": lambda draw: str(draw.randint(1840, 2010)),
    "time": lambda draw: f"{draw.choice(WORDS['days'])} at {draw.choice(WORDS['hours'])}",
}
