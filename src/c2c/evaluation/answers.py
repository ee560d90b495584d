"""Reading the chosen letter from generated text, in the order of the published evaluation.

An answer phrase first, then a lone letter at the end or before punctuation, then any lone letter, then any capital.
Unlike there, the letters are those of the item (E and further too), and "a" as a word is no answer.
"""

from __future__ import annotations

import re

from c2c.data.config import LETTERS

_PHRASES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"correct\s+answer\s+is\s*:?",
        r"correct\s+answer\s*:",
        r"answer\s+is\s*:?",
        r"answer\s*:",
        r"correct\s+(?:option|choice)\s+is\s*:?",
        r"(?:option|choice)\s*:",
        r"(?:option|choice)\s",
        r"答案(?:是|为)?\s*[::]?",
        r"jibu\s*(?:ni|sahihi)?\s*:?",
    )
]


def read_letter(text: str, options: int) -> int | None:
    """The index of the option that a text chooses, or None where it names none.

    Args:
        text: the generated answer.
        options: how many options the item has.
    """
    letters = LETTERS[:options]
    for phrase in _PHRASES:
        for match in phrase.finditer(text):
            rest = text[match.end() :].split("\n", 1)[0]
            found = re.search(rf"(?<![A-Za-z])([{letters}])(?![A-Za-z])", rest)
            if found:
                return letters.index(found.group(1))
    for pattern in (
        rf"(?<![A-Za-z])([{letters}])(?=[.):,\]]|\s*$)",
        rf"(?<![A-Za-z])([{letters}])(?![A-Za-z'’])",
    ):
        lone = [m for m in re.finditer(pattern, text) if not _is_article(text, m)]
        if lone:
            return letters.index(lone[-1].group(1))
    lower = re.fullmatch(rf"\W*([{letters.lower()}])\W*", text)
    return letters.lower().index(lower.group(1)) if lower else None


def _is_article(text: str, match: re.Match[str]) -> bool:
    """Whether an A opens a phrase ("A lamp")."""
    return match.group(1) == "A" and re.match(r"\s+[a-z]", text[match.end() :]) is not None
