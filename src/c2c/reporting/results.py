"""Result files of ``c2c eval`` as Python objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from c2c.errors import C2CError
from c2c.reporting.text import Estimate, Unit


class ReportError(C2CError, ValueError):
    """Something that is not a result, or a report that can't be made of the results."""


@dataclass(frozen=True)
class Numbers:
    """All numbers over some items.

    Attributes:
        task: title of the data.
        n: number of items.
        scores: accuracy or mean of each system.
        written: percent of written answers that are a reference word for word (``exact``) and that hold one
            (``holds``), of each system that was scored so.
        gains: differences to matched, by their letter.
        costs: per system what a question costs, by field.
        timed: number of items that costs were measured on.
        speed: how many times as long as matched a system takes.
        mended: percent of items that only matched has right, against the receiver.
        spoiled: percent of items that only the receiver has right.
        gap_recovered: G in percent of the distance between receiver and sharer.
        mcnemar_p: of mended against spoiled.
    """

    task: str
    n: int
    scores: dict[str, Estimate]
    gains: dict[str, Estimate]
    written: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    timed: int | None = None
    speed: dict[str, Estimate] = field(default_factory=dict)
    mended: float | None = None
    spoiled: float | None = None
    gap_recovered: float | None = None
    mcnemar_p: float | None = None


@dataclass(frozen=True)
class Routing:
    """What the router did: the share of questions that went to the sharer, and the share that was meant to."""

    sent: float
    asked: float


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy and spoiled answers, in percent, when this share of the questions gets the fused cache."""

    share: float
    accuracy: float
    spoiled: float


@dataclass(frozen=True)
class Abstention:
    """What abstention did.

    Attributes:
        margin: that dev chose, in nats; None where it chose all or none of the questions.
        share_fused: of the questions that were answered from the fused cache.
        curve: for every share of the questions.
    """

    margin: float | None
    share_fused: float
    curve: list[CurvePoint]


@dataclass(frozen=True)
class Result:
    """One evaluation of one fuser.

    Attributes:
        receiver: name of the receiver.
        sharer: name of the sharer.
        fuser: hash of the fuser's weights, empty where it is not known.
        seed: of the draw of items and of the intervals.
        trained_seed: of the fuser's training, None where it is not recorded.
        mode: how answers were read.
        unit: what scores are counted in.
        tasks: one entry per data source, and last the pooled one where there are several.
        same: what two evaluations have in common of which only fuser, seed and systems differ.
        provenance: what to show of where the numbers come from, label to text.
        settings: what may tell it from other evaluations of the pair on the same data.
        routing: what the router did, if it ran.
        abstention: what abstention did, if it ran.
        answer_tokens: the longest answer that was allowed where one was generated.
        message_tokens: the same for the sharer's message in text-to-text.
    """

    receiver: str
    sharer: str
    fuser: str
    seed: int | None
    trained_seed: int | None
    mode: str
    unit: Unit
    tasks: list[Numbers]
    same: str
    provenance: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    routing: Routing | None = None
    abstention: Abstention | None = None
    answer_tokens: int | None = None
    message_tokens: int | None = None
