"""Skeletons: the sharer reads the skeleton of a page, and the receiver writes a text into an element of it.

The Coder-to-Writer story of the original work as rows that can be scored: the text stands in the question, and which
element it belongs into, with its tag, id and class, only in the page. An element's topic precedes it, since the
sharer's entry of a token depends only on what precedes the token.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from c2c.data.synthetic.base import WORDS, generate

_ELEMENTS = 3  # in a page


def skeleton(split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Generate rows with ``context``, ``question`` and ``answer``, without end.

    Elements that the split ``test`` asks for, with tag, id and class, never occur in ``train``.
    """
    draw = random.Random(f"skeleton {split} {seed}")
    return generate("skeleton", _page, split, draw, key=lambda row: row["answer"].partition(">")[0])


def _page(draw: random.Random) -> dict[str, str]:
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
