"""Every way in which matched loses, row by row: the rules behind the words of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from c2c.reporting.names import CONTROLS, system_title
from c2c.reporting.results import Numbers
from c2c.reporting.text import Estimate, Unit

# In the order of a verdict; the rules of further systems, "ahead NAME" and "level NAME", come last.
RULES = ("wrong better", "no content", "harm", "no gain", "sharer", "sharer quicker", "deranged")


@dataclass(frozen=True)
class Loss:
    """One way in which matched loses in one row of a table.

    Attributes:
        rule: what was looked at; losses of one rule are told in one sentence.
        words: a few words for the table.
        column: the system or the gain whose number is marked, empty if none is.
    """

    rule: str
    words: str
    column: str


def losses(numbers: Numbers, unit: Unit) -> list[Loss]:
    """Every rule that fires for one row."""
    rules = (_content, _gain, _sharer, _others, _deranged)
    return [loss for rule in rules for loss in rule(numbers, unit)]


def marked(rows: Sequence[Numbers], unit: Unit) -> set[str]:
    """Systems and gains to mark in what one or several runs say of a task.

    A loss shows there, or a system is ahead of matched, in half of the runs or more.
    """
    found = [{loss.column for loss in losses(row, unit)} | _ahead(row, unit) for row in rows]
    return {column for one in found for column in one if 2 * sum(column in other for other in found) >= len(rows)}


def loss_words(rows: Sequence[Numbers], unit: Unit) -> dict[str, int]:
    """The losses of some rows in a few words each, in the order of a verdict, and in how many rows they are."""
    found = [{loss.words: rank(loss.rule) for loss in losses(row, unit)} for row in rows]
    ranks = {words: rank for one in found for words, rank in one.items()}
    return {words: sum(words in one for one in found) for words in sorted(ranks, key=lambda words: ranks[words])}


def rank(rule: str) -> tuple[int, str]:
    """Where a rule stands in a verdict."""
    return RULES.index(rule) if rule in RULES else len(RULES), rule


# The rules, one row of a table at a time. None has a threshold of its own: an interval that reaches zero, or a
# score below another's, is all it takes, so that no loss is left to the reader's eye.


def _content(numbers: Numbers, unit: Unit) -> Iterable[Loss]:
    stands = standing(numbers.gains.get("P"), unit)
    if stands == "below":
        yield Loss("wrong better", "wrong message better", "P")
    elif stands == "open":
        yield Loss("no content", "no content shown", "P")


def _gain(numbers: Numbers, unit: Unit) -> Iterable[Loss]:
    stands = standing(numbers.gains.get("G"), unit)
    if stands == "below":
        yield Loss("harm", "worse than the receiver", "G")
    elif stands == "open":
        yield Loss("no gain", "no gain shown", "G")


def _sharer(numbers: Numbers, unit: Unit) -> Iterable[Loss]:
    behind = _behind(numbers, "sharer", unit)
    sooner = quicker(numbers, "sharer")
    if behind is not None and behind > 0:
        yield Loss("sharer", "sharer alone better" + " and quicker" * sooner, "S")
    elif sooner and behind is not None and standing(numbers.gains.get("S"), unit) != "above":
        yield Loss("sharer quicker", "sharer alone quicker, as good within chance", "")


def _deranged(numbers: Numbers, unit: Unit) -> Iterable[Loss]:
    scores = numbers.scores
    if "deranged" in scores and "receiver" in scores:
        raised = (scores["deranged"].value - scores["receiver"].value) * unit.sign
        if raised > 0:
            yield Loss("deranged", "deranged above receiver", "deranged")


def _others(numbers: Numbers, unit: Unit) -> Iterable[Loss]:
    """Every other system that is ahead, or as good and quicker, known to this version or not."""
    for name in numbers.scores:
        behind = _behind(numbers, name, unit)
        if name in ("receiver", "sharer", "matched", "deranged") or behind is None:
            continue  # these have their own rules
        title, sooner = system_title(name), quicker(numbers, name)
        if behind > 0:
            yield Loss(f"ahead {name}", f"{title} better" + " and quicker" * sooner, name)
        elif behind == 0 and sooner:
            yield Loss(f"level {name}", f"{title} as good and quicker", "")


def quicker(numbers: Numbers, system: str) -> bool:
    """Whether a system takes fewer seconds than matched; a control costs what matched costs and is no choice."""
    costs = numbers.costs
    ours, theirs = (costs.get(name, {}).get("seconds") for name in ("matched", system))
    return system not in CONTROLS and ours is not None and theirs is not None and theirs < ours


def _ahead(numbers: Numbers, unit: Unit) -> set[str]:
    """All systems that are ahead of matched."""
    return {name for name in numbers.scores if (_behind(numbers, name, unit) or 0) > 0}


def _behind(numbers: Numbers, other: str, unit: Unit) -> float | None:
    """How far matched is behind another system; None if either is missing."""
    if "matched" not in numbers.scores or other not in numbers.scores:
        return None
    return (numbers.scores[other].value - numbers.scores["matched"].value) * unit.sign


def standing(estimate: Estimate | None, unit: Unit) -> str | None:
    """``above`` zero with the whole interval, ``below`` it, or ``open``; an estimate without an interval is open."""
    if estimate is None:
        return None
    if estimate.low is None or estimate.holds_zero():
        return "open"
    return "above" if estimate.value * unit.sign > 0 else "below"
