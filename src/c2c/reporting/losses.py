"""Every way in which matched loses, row by row: the rules behind the words of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from c2c.reporting.names import CONTROLS, LETTERS, system_title
from c2c.reporting.results import Numbers
from c2c.reporting.text import Estimate, Unit, ratio_of

# In the order of a verdict; the rules of further systems, "ahead NAME" and "level NAME", come last.
RULES = (
    "wrong better",
    "no content",
    "harm",
    "no gain",
    "sharer",
    "sharer quicker",
    "ahead text",
    "text quicker",
    "slower",
    "ahead adapter",
    "adapter",
    "deranged",
)


# Systems with rules of their own.
_OWN = frozenset({"receiver", "sharer", "matched", "deranged", "text", "adapter"})


@dataclass(frozen=True)
class Loss:
    """One way in which matched loses in one row of a table.

    Attributes:
        rule: what was looked at; losses of one rule are told in one sentence.
        words: a few words for the table.
        column: the system, the gain or ``speed SYSTEM`` whose number is marked, empty if none is.
        system: what matched was compared with.
    """

    rule: str
    words: str
    column: str
    system: str


def losses(numbers: Numbers, unit: Unit) -> list[Loss]:
    """Every rule that fires for one row."""
    rules = (_content, _gain, _sharer, _text, _adapter, _others, _held, _deranged)
    return [loss for rule in rules for loss in rule(numbers, unit)]


def marked(rows: Sequence[Numbers], unit: Unit) -> set[str]:
    """Systems and gains to mark in what one or several runs say of a task.

    A loss shows there, or a system is ahead of matched, in half of the runs that measured it, or more.
    """
    found = [{loss.column for loss in losses(row, unit)} | _ahead(row, unit) for row in rows]
    counts = {column: sum(column in one for one in found) for one in found for column in one}
    return {column for column, count in counts.items() if 2 * count >= sum(_measured(row, column) for row in rows)}


def loss_words(rows: Sequence[Numbers], unit: Unit) -> dict[str, tuple[int, int]]:
    """The losses of some rows in a few words each, in the order of a verdict; in how many rows they are, and of how
    many that measured them.
    """
    found = [{loss.words: loss for loss in losses(row, unit)} for row in rows]
    every = {words: loss for one in found for words, loss in one.items()}
    return {
        words: (sum(words in one for one in found), sum(every[words].system in row.scores for row in rows))
        for words in sorted(every, key=lambda words: rank(every[words].rule))
    }


def worst_words(rows: Sequence[Numbers], unit: Unit) -> list[str]:
    """The losses of some rows in fewer words: for each comparison only the worst, in the order of a verdict."""
    worst: dict[tuple[str, bool], Loss] = {}
    for loss in sorted((loss for row in rows for loss in losses(row, unit)), key=lambda loss: rank(loss.rule)):
        worst.setdefault((loss.system, loss.rule == "deranged"), loss)
    return list(dict.fromkeys(loss.words.removesuffix(" and quicker") for loss in worst.values()))


def rank(rule: str) -> tuple[int, str]:
    """Where a rule stands in a verdict."""
    return RULES.index(rule) if rule in RULES else len(RULES), rule


# The rules, one row of a table at a time. None has a threshold of its own: an interval that reaches zero, or a
# score below another's, is all it takes, so that no loss is left to the reader's eye.


def _content(numbers: Numbers, unit: Unit) -> Iterable[Loss]:
    stands = standing(numbers.gains.get("P"), unit)
    if stands == "below":
        yield Loss("wrong better", "wrong message better", "P", "deranged")
    elif stands == "open":
        yield Loss("no content", "no content shown", "P", "deranged")


def _gain(numbers: Numbers, unit: Unit) -> Iterable[Loss]:
    stands = standing(numbers.gains.get("G"), unit)
    if stands == "below":
        yield Loss("harm", "worse than the receiver", "G", "receiver")
    elif stands == "open":
        yield Loss("no gain", "no gain shown", "G", "receiver")


def _sharer(numbers: Numbers, unit: Unit) -> Iterable[Loss]:
    behind = _behind(numbers, "sharer", unit)
    sooner = quicker(numbers, "sharer")
    if behind is not None and behind > 0:
        yield Loss("sharer", "sharer alone better" + " and quicker" * sooner, "S", "sharer")
    elif sooner and behind is not None and standing(numbers.gains.get("S"), unit) != "above":
        yield Loss("sharer quicker", "sharer alone quicker, as good within chance", "", "sharer")


def _text(numbers: Numbers, unit: Unit) -> Iterable[Loss]:
    """The sharer could have said it in words: better, or as good within chance and quicker, or only quicker."""
    behind, sooner = _behind(numbers, "text", unit), quicker(numbers, "text")
    if behind is not None and behind > 0:
        yield Loss("ahead text", "text-to-text better" + " and quicker" * sooner, "T", "text")
    elif sooner and behind is not None and standing(numbers.gains.get("T"), unit) != "above":
        yield Loss("text quicker", "text-to-text quicker, as good within chance", "speed text", "text")
    elif sooner:
        yield Loss("slower", "slower than text-to-text", "speed text", "text")


def _adapter(numbers: Numbers, unit: Unit) -> Iterable[Loss]:
    """Training the receiver alone would do: no sharer has to run for it."""
    behind = _behind(numbers, "adapter", unit)
    if behind is not None and behind > 0:
        yield Loss("ahead adapter", "adapter better" + " and quicker" * quicker(numbers, "adapter"), "A", "adapter")
    elif behind is not None and standing(numbers.gains.get("A"), unit) != "above":
        yield Loss("adapter", "no gain over the adapter shown", "A", "adapter")


def _deranged(numbers: Numbers, unit: Unit) -> Iterable[Loss]:
    scores = numbers.scores
    if "deranged" in scores and "receiver" in scores:
        raised = (scores["deranged"].value - scores["receiver"].value) * unit.sign
        if raised > 0:
            within = " within chance" * (standing(numbers.gains.get("D"), unit) == "open" and _known(numbers, "D"))
            yield Loss("deranged", f"deranged above receiver{within}", "deranged", "deranged")


def _others(numbers: Numbers, unit: Unit) -> Iterable[Loss]:
    """Every other system that is ahead, or as good and quicker, known to this version or not."""
    for name in numbers.scores:
        behind = _behind(numbers, name, unit)
        if name in _OWN or behind is None:
            continue
        title, sooner = system_title(name), quicker(numbers, name)
        if behind > 0:
            yield Loss(f"ahead {name}", f"{title} better" + " and quicker" * sooner, name, name)
        elif behind == 0 and sooner:
            yield Loss(f"level {name}", f"{title} as good and quicker", "", name)


def _known(numbers: Numbers, letter: str) -> bool:
    """Whether a difference has an interval, and not only a value."""
    estimate = numbers.gains.get(letter)
    return estimate is not None and estimate.low is not None


def _held(numbers: Numbers, unit: Unit) -> Iterable[Loss]:
    """Who has the right words in more of its answers, however long; F1 and exact answers favour brevity."""
    held = numbers.written.get("holds", {})
    for name, share in held.items():
        if name not in CONTROLS and share > held.get("matched", share):
            yield Loss(f"holds {name}", "others have the right words more often", "", name)


def quicker(numbers: Numbers, system: str) -> bool:
    """Whether a system takes less time than matched; a control costs what matched costs and is no choice."""
    ratio = ratio_of(numbers.speed, numbers.costs, system)
    return system not in CONTROLS and ratio is not None and ratio.value < 1


def _ahead(numbers: Numbers, unit: Unit) -> set[str]:
    """All systems that are ahead of matched, and their gains; and text-to-text where it is quicker."""
    systems = {name for name in numbers.scores if (_behind(numbers, name, unit) or 0) > 0}
    sooner = {"speed text"} if quicker(numbers, "text") else set()
    return systems | {LETTERS[name] for name in systems if name in LETTERS} | sooner


def _measured(numbers: Numbers, column: str) -> bool:
    """Whether a row has what a column shows."""
    speed = column.removeprefix("speed ")
    if speed != column:
        return ratio_of(numbers.speed, numbers.costs, speed) is not None
    return column in numbers.scores or column in numbers.gains


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
