"""How close a written answer is to its references: token F1 and exact match, as SQuAD counts them; and containment.

Rajpurkar et al., 2016, arXiv:1606.05250. F1 and exact match punish a right answer in a whole sentence; containment does
not, and rewards whoever writes much.
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


def holds(text: str, references: Sequence[str]) -> float:
    """1 if a reference stands in the answer, its words in a row; of numbers, if any that is named is one."""
    if all(_NUMBER.fullmatch(reference.strip()) for reference in references):
        named = {_value(number) for number in _NUMBER.findall(text)}
        return float(any(_value(reference) in named for reference in references))
    ours = words(text)
    return float(any(_within(words(reference), ours) for reference in references))


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    bare = "".join(" " if character in string.punctuation else character for character in text.lower())
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def _overlap(ours: Sequence[str], theirs: Sequence[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def _within(part: Sequence[str], whole: Sequence[str]) -> bool:
    if not part:
        return not whole
    return any(list(whole[start : start + len(part)]) == list(part) for start in range(len(whole) - len(part) + 1))


def _value(number: str) -> float:
    return float(number.replace(",", ""))
