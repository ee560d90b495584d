"""Files of one evaluation as one result: systems and costs that were measured in several goes."""

from __future__ import annotations

from dataclasses import replace

from c2c.reporting.names import listed_titles
from c2c.reporting.results import Numbers, ReportError, Result


def merge(first: Result, second: Result, files: str) -> Result:
    """Both files of an evaluation in one result.

    Args:
        first: a result of the same models, fuser, data, mode and seed.
        second: another one.
        files: what to call them in an error.

    Raises:
        ReportError: they hold the same numbers, or contradict each other.
    """
    if [one.task for one in first.tasks] != [one.task for one in second.tasks]:
        raise ReportError(f"{files} name their data differently, and are of one evaluation: give one of them.")
    pairs = list(zip(first.tasks, second.tasks, strict=True))
    differing = {name for pair in pairs for name in _differing(*pair)}
    if differing:
        raise ReportError(
            f"{files} hold the same evaluation (same models, fuser, data, mode and seed) with different numbers for "
            f"{listed_titles(differing)}: give one of them."
        )
    tasks = [_merged(*pair) for pair in pairs]
    if first.tasks == second.tasks:
        raise ReportError(
            f"{files} hold the same evaluation (same models, fuser, data, mode and seed): give one of them."
        )
    again = {label: text for label, text in second.provenance.items() if first.provenance.get(label) != text}
    return replace(
        first,
        tasks=tasks,
        provenance=first.provenance | {_free(label, first.provenance): text for label, text in again.items()},
        routing=first.routing or second.routing,
        abstention=first.abstention or second.abstention,
    )


def _differing(one: Numbers, other: Numbers) -> set[str]:
    """Systems that have other scores in both."""
    if one.n != other.n:
        return {*one.scores, *other.scores}
    return {name for name in one.scores if name in other.scores and one.scores[name] != other.scores[name]}


def _merged(one: Numbers, other: Numbers) -> Numbers:
    """All numbers of both, those of the first where both have some; ratios are each of one run."""
    optional = ("mended", "spoiled", "gap_recovered", "mcnemar_p")
    return replace(
        one,
        scores=one.scores | other.scores,
        gains=other.gains | one.gains,
        written={key: other.written.get(key, {}) | one.written.get(key, {}) for key in other.written | one.written},
        costs=other.costs | one.costs,
        timed=one.timed if one.timed is not None else other.timed,
        speed=other.speed | one.speed,
        **{key: getattr(one, key) if getattr(one, key) is not None else getattr(other, key) for key in optional},
    )


def _free(label: str, taken: dict[str, str]) -> str:
    """A label for the second file's line that the first does not use."""
    numbered = [label, *(f"{label} {count}" for count in range(2, len(taken) + 3))]
    return next(name for name in numbered if name not in taken)
