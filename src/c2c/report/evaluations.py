"""Group runs into evaluations: one pair on the same data with the same settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np
import pandas as pd

from c2c.report.load import INDEX, Run
from c2c.report.names import POOLED


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Hold the runs of one pair that differ in fuser, seed and systems only.

    Attributes:
        runs: at least one, by seed and fuser.
        anchor: a name for links, different for each evaluation.
        variant: settings that tell it from others of the pair on the same data; empty without any.
    """

    runs: list[Run]
    anchor: str
    variant: str = ""

    @cached_property
    def values(self) -> pd.DataFrame:
        """All numbers, indexed as :attr:`Run.values`, with columns ``loss`` and ``runs`` (how many have the number).

        Of several runs, ``value`` is the mean, ``low`` and ``high`` are the lowest and the highest value, and ``loss``
        holds where it holds in any of them.
        """
        flagged = [flag_losses(run) for run in self.runs]
        if len(flagged) == 1:
            return flagged[0].assign(runs=1)
        columns = {"value": ("value", "mean"), "low": ("value", "min"), "high": ("value", "max")}
        groups = pd.concat(flagged).drop("mcnemar_p", level="measure", errors="ignore").groupby(level=INDEX, sort=False)
        return groups.agg(**columns, loss=("loss", "any"), runs=("value", "count"))

    @property
    def pair(self) -> str:
        """Receiver and sharer."""
        return f"{self.runs[0].receiver} \u2190 {self.runs[0].sharer}"

    @property
    def tasks(self) -> list[str]:
        """Titles of the data of any run; the pooled questions, if any, are the last."""
        return sorted(dict.fromkeys(task for run in self.runs for task in run.tasks), key=lambda task: task == POOLED)

    @property
    def systems(self) -> set[str]:
        """Names of the systems that have a score."""
        return set(self.values.index[self.values.index.get_level_values("measure") == "score"].get_level_values("name"))

    @property
    def data(self) -> str:
        """The data in a few words."""
        own = [task for task in self.tasks if task != POOLED]
        names = ", ".join(own) if len(own) <= 3 else f"{own[0]} and {len(own) - 1} others"
        return names + ", generated" * (self.runs[0].mode == "generate")

    @property
    def title(self) -> str:
        """The data, with the settings that tell it from other evaluations of the pair."""
        return f"{self.data}, {self.variant}" if self.variant else self.data

    @property
    def metric(self) -> str:
        """What the scores are."""
        unit = self.runs[0].unit
        titles = {"percent": "accuracy, %", "percent f1": "F1, %", "nats per token": "nats per token, lower is better"}
        return titles.get(unit, unit)

    @property
    def n(self) -> int:
        """Number of questions of the largest run."""
        return max(run.n for run in self.runs)


def flag_losses(run: Run) -> pd.DataFrame:
    """Return a run's values with a column ``loss``: matched is not shown to be better there.

    A difference is a loss where its interval is not wholly on the better side; ``D``, deranged - receiver, where it is
    there at all, since that part of the gain is not content. A ratio is one where a system is faster than matched.
    """
    values = run.values
    measure, letter = values.index.get_level_values("measure"), values.index.get_level_values("name")
    bound = np.minimum(values["low"] * run.sign, values["high"] * run.sign)
    lost = np.where(letter == "D", values["value"] * run.sign > 0, ~(bound > 0))
    return values.assign(loss=np.where(measure == "difference", lost, (measure == "ratio") & (values["value"] < 1)))


def group_runs(runs: Iterable[Run]) -> list[Evaluation]:
    """Group runs by what was compared: accuracies first, then by the names of the models, the largest first."""

    def order(run: Run) -> tuple[Any, ...]:
        unit = ["percent", "percent f1", run.unit].index(run.unit)
        seeds = [seed or 0 for seed in reversed(run.seeds)]
        return unit, run.receiver, run.sharer, -run.n, run.mode, run.tasks, run.key, seeds, run.fuser

    groups: dict[str, list[Run]] = {}
    names = attrgetter("receiver", "sharer", "mode", "tasks")
    for run in sorted(runs, key=order):
        groups.setdefault(run.key, []).append(run)
    evaluations = []
    for number, group in enumerate(groups.values(), 1):
        alike = [other[0].settings for other in groups.values() if names(other[0]) == names(group[0])]
        evaluations.append(Evaluation(group, f"evaluation-{number}", _variant(group[0].settings, alike)))
    return evaluations


def _variant(settings: dict[str, str], alike: list[dict[str, str]]) -> str:
    """Name the settings in which evaluations of the same title differ, at most three."""
    names = sorted({name for one in alike for name in one if name not in ("path", "dataset")})
    differing = [name for name in names if len({one.get(name) for one in alike}) > 1]
    words = [f"{name} {settings[name]}" if name in settings else f"default {name}" for name in differing]
    return ", ".join(words[:3]) + ", \u2026" * (len(words) > 3)
