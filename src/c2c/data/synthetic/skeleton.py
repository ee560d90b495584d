"""Skeletons: the sharer reads the skeleton of a page, and the receiver writes a text into an element of it.

The Coder-to-Writer story of the original work as rows that can be scored: the text stands in the question, and which
element it belongs into, with its tag, id and class, only in the page. An element's topic precedes it, since the
sharer's entry of a token depends only on what precedes the token.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from c2c.data.synthetic.base import generate, words

_TOPICS = ("opening hours", "address", "prices", "contact", "history", "news", "team", "directions", "menu", "events")
_TAGS = ("p", "div", "section", "li", "span", "article", "aside", "footer")
_IDS = words("amber birch cedar delta ember fjord grove haven inlet jade kiosk lotus maple")
_CLASSES = ("wide", "note", "small", "bold", "dark", "plain", "round", "left", "muted", "framed", "large", "quiet")
_SUBJECTS = words("The shop, Our kitchen, The museum, The harbour, My brother, The library, Everybody, The team", ", ")
_DOINGS = words(
    "opens, is closed, moves to the market square, sells tea, meets us, has a new door, rests, sings",
    ", ",
)
_TIMES = ("at nine", "on Mondays", "in summer", "after lunch", "every day", "until six", "in winter", "before noon")
_ELEMENTS = 3  # in a page


def skeleton(split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Generate rows with ``context``, ``question`` and ``answer``, without end.

    Elements that ``test`` asks for never occur in ``train``.

    Args:
        split: ``train`` or ``test``.
        seed: of the draw.
    """
    return generate("skeleton", _page, split, random.Random(f"skeleton {split} {seed}"), key=_element)


def _page(draw: random.Random) -> dict[str, str]:
    topics, tags = draw.sample(_TOPICS, _ELEMENTS), [draw.choice(_TAGS) for _ in range(_ELEMENTS)]
    names = zip(tags, draw.sample(_IDS, _ELEMENTS), draw.sample(_CLASSES, _ELEMENTS), strict=True)
    openings = [f'<{tag} id="{name}" class="{kind}">' for tag, name, kind in names]
    asked = draw.randrange(_ELEMENTS)
    text = f"{draw.choice(_SUBJECTS)} {draw.choice(_DOINGS)} {draw.choice(_TIMES)}."
    lines = [f"<!-- {topic} --> {o}</{tag}>" for o, topic, tag in zip(openings, topics, tags, strict=True)]
    return {
        "context": "<body>\n" + "\n".join(lines) + "\n</body>",
        "question": f"Write the element of the page for the {topics[asked]}, with this text in it: {text}",
        "answer": f"{openings[asked]}{text}</{tags[asked]}>",
    }


def _element(row: dict[str, str]) -> str:
    """The opening tag that is asked for, whatever the text in it."""
    return row["answer"].partition(">")[0]
