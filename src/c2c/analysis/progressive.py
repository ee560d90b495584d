"""Progressive fusion: how accuracy grows with the share of the positions that are fused.

Cache-to-Cache (ICLR 2026, arXiv:2510.03215) fuses only a share of the prompt, from its start ("former") or up to its
end ("latter"). There accuracy first falls, then rises, and the latter positions matter more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import DynamicCache

from c2c.alignment import Alignment
from c2c.analysis.drawing import band, done, legend, level, panels
from c2c.analysis.inputs import Subject
from c2c.analysis.record import check_output, publish
from c2c.analysis.scores import Right, accuracies, difference, right_answers
from c2c.analysis.settings import Settings
from c2c.reporting.canvas import Plot
from c2c.training.shared_context import SharedBatch, SharedContextObjective
from c2c.utils import OnProgress

Order = Literal["former", "latter"]
NAME = "progressive"
FRACTIONS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
ORDERS: tuple[Order, ...] = ("former", "latter")


def part_of(alignment: Alignment, fraction: float, order: Order) -> Alignment:
    """The first (``former``) or last (``latter``) pairs of every row, ``floor(fraction * pairs)`` of them."""
    kept = []
    for row in alignment.rows.unique():
        index = (alignment.rows == row).nonzero().flatten()
        index = index[alignment.receiver[index].argsort(stable=True)]
        count = math.floor(fraction * len(index))
        kept.append(index[:count] if order == "former" else index[len(index) - count :])
    chosen = torch.cat(kept).sort().values
    return Alignment(alignment.rows[chosen], alignment.receiver[chosen], alignment.sharer[chosen])


@torch.no_grad()
def partly_fused(training: SharedContextObjective, batch: SharedBatch, fraction: float, order: Order) -> DynamicCache:
    """The receiver's cache with only a share of the aligned positions fused; clean where that is none of them."""
    part = part_of(batch.matched, fraction, order)
    return training.fused(replace(batch, matched=part), "matched" if len(part) else "none")


def measure_progressive(settings: Settings, progress: OnProgress | None = None) -> dict[str, Any]:
    """Accuracy by the share of the aligned positions that are fused, from the start and up to the end.

    Aligned positions are those that the fuser works on, so that fraction 1 is ``matched`` and 0 the receiver alone. The
    paper counts prompt tokens; the two differ by the template before the first message.

    Args:
        settings: what to measure on.
        progress: called with (stage, items done, items).

    Returns:
        ``former`` and ``latter``: a list of ``fraction``, ``accuracy`` (percent) and ``ci95``; ``deranged`` and
        ``zero``: the same numbers with another item's cache and with zeros, all positions fused; ``G`` and ``P``:
        matched - receiver and matched - deranged in ``points`` with ``ci95``.

    Raises:
        AnalysisError: see :class:`~c2c.analysis.inputs.Subject`.
    """
    check_output(settings.output_dir)
    subject = Subject.open(settings)
    right: dict[str, Right] = {}
    for batch in subject.batches("answering", progress):
        for name, answers in _answers(subject.training, batch).items():
            right.setdefault(name, []).extend(answers)
    scores = accuracies(right, settings.seed)
    curves = {str(order): [{"fraction": f} | scores[_name(f, order)] for f in FRACTIONS] for order in ORDERS}
    numbers: dict[str, Any] = (
        curves
        | {
            "deranged": scores["deranged"],
            "zero": scores["zero"],
            "G": difference(right["matched"], right["receiver"], settings.seed),
            "P": difference(right["matched"], right["deranged"], settings.seed),
        }
        | subject.facts()
    )
    return publish(NAME, numbers, lambda: _draw(numbers), settings.output_dir)


def _answers(training: SharedContextObjective, batch: SharedBatch) -> dict[str, Right]:
    answers = {
        _name(fraction, order): right_answers(training, batch, partly_fused(training, batch, fraction, order))
        for order in ORDERS
        for fraction in FRACTIONS
        if order == "former" or 0 < fraction < 1
    }
    with torch.no_grad():
        answers["deranged"] = right_answers(training, batch, training.fused(batch, "deranged"))
        answers["zero"] = right_answers(training, batch, training.fused(batch, "zero"))
    return answers


def _name(fraction: float, order: Order) -> str:
    return {0.0: "receiver", 1.0: "matched"}.get(fraction, f"{order} {fraction}")


def _draw(numbers: Mapping[str, Any]) -> Plot:
    figure, (axes,) = panels(["Accuracy, percent"], [230])
    for order, colour, marker in (("former", "sharer", "s"), ("latter", "matched", "D")):
        points: Sequence[dict[str, Any]] = numbers[order]
        band(axes, [p["fraction"] for p in points], points, colour, marker=marker, ms=5, lw=1.6, label=f"{order} part")
    level(axes, numbers["deranged"]["accuracy"], "control", "deranged, all")
    axes.set_xticks(FRACTIONS, ["0", "\u215b", "\u00bc", "\u00bd", "\u00be", "1"])
    axes.set_xlabel("share of the aligned positions that are fused")
    legend(figure, axes)
    caption = (
        f"{numbers['n']} questions; shaded: 95 % intervals. 0 is the receiver alone and 1 the whole fused cache. "
        "Dotted: all positions fused with another question's cache."
    )
    return done(NAME, "Progressive fusion", caption, figure)
