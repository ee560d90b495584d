"""Scores of generated answers: the chosen letter; token F1, exact match and containment of the references.

F1 and exact match are SQuAD's (Rajpurkar et al. 2016, arXiv:1606.05250); they punish a right answer in a whole
sentence. Containment does not, and rewards long answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from c2c.data.config import LETTERS

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
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
    """Return the index of the option that a generated text chooses, or None where it names none.

    In the order of the published evaluation: an answer phrase, a lone letter at the end or before punctuation, any
    lone letter. Unlike there, the letters are the item's own (E and further too), and "a" as a word is no answer.

    Args:
        text: the generated answer.
        options: number of options of the item.
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
        lone = [match for match in re.finditer(pattern, text) if not _is_article(text, match)]
        if lone:
            return letters.index(lone[-1].group(1))
    lower = re.fullmatch(rf"\W*([{letters.lower()}])\W*", text)
    return letters.lower().index(lower.group(1)) if lower else None


def f1(text: str, references: Sequence[str]) -> float:
    """Return the best overlap of words with a reference, 0 to 1: harmonic mean of precision and recall."""

    def overlap(theirs: list[str]) -> float:
        if not ours or not theirs:
            return float(ours == theirs)
        return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))

    ours = _words(text)
    return max(overlap(_words(reference)) for reference in references)


def exact(text: str, references: Sequence[str]) -> float:
    """Return 1 if the answer is a reference but for case, punctuation and articles; a number if it is the last one."""
    numbers = _values(references)
    if numbers:
        return float(any(value in numbers for value in _values(_NUMBER.findall(text)[-1:])))
    return float(any(_words(text) == _words(reference) for reference in references))


def contains(text: str, references: Sequence[str]) -> float:
    """Return 1 if the words of a reference stand in a row in the answer; of numbers, if any in the answer is one."""
    numbers = _values(references)
    if numbers:
        return float(any(value in numbers for value in _values(_NUMBER.findall(text))))
    answer = f" {' '.join(_words(text))} "
    return float(any(f" {' '.join(_words(reference))} " in answer for reference in references))


def _words(text: str) -> list[str]:
    """Return lower-case words without punctuation and articles."""
    bare = "".join(" " if character in string.punctuation else character for character in text.lower())
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def _values(texts: Sequence[str]) -> list[float]:
    """Return the numbers that texts are; none unless all are."""
    if not all(_NUMBER.fullmatch(text.strip()) for text in texts):
        return []
    return [float(text.replace(",", "")) for text in texts]


def _is_article(text: str, match: re.Match[str]) -> bool:
    """Whether an A opens a phrase ("A lamp")."""
    return match.group(1) == "A" and re.match(r"\s+[a-z]", text[match.end() :]) is not None
