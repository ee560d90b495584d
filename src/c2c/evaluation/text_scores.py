"""How close a written answer is to its references: token F1 and exact match, as SQuAD counts them.

Rajpurkar et al., 2016, arXiv:1606.05250.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def f1(text: str, references: Sequence[str]) -> float:
    """The best overlap of words with a reference, 0 to 1: harmonic mean of precision and recall."""
    return max(_overlap(words(text), words(reference)) for reference in references)


def exact(text: str, references: Sequence[str]) -> float:
    """1 if the answer is a reference but for case, punctuation and articles; a number if it is the last one named."""
    if all(_NUMBER.fullmatch(reference.strip()) for reference in references):
        named = _NUMBER.findall(text)
        return float(bool(named) and any(_value(named[-1]) == _value(reference) for reference in references))
    return float(any(words(text) == words(reference) for reference in references))


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    bare = "".join(" " if character in string.punctuation else character for character in text.lower())
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def _overlap(ours: Sequence[str], theirs: Sequence[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def _value(number: str) -> float:
    return float(number.replace(",", ""))
