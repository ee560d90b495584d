"""Results side by side: the runs of one pair on the same data, which differ in fuser or seed only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from c2c.reporting.names import POOLED, SYSTEMS, in_order, system_title
from c2c.reporting.results import Numbers, Result
from c2c.reporting.text import Unit, plural


@dataclass(frozen=True)
class Section:
    """The runs of one pair, with the same data and mode.

    Attributes:
        runs: at least one, by seed and fuser.
        slug: a name for files and anchors, different for every section.
    """

    runs: list[Result]
    slug: str

    @property
    def title(self) -> str:
        """Receiver and sharer."""
        return f"{self.runs[0].receiver} \u2190 {self.runs[0].sharer}"

    @property
    def unit(self) -> Unit:
        """What scores are counted in."""
        return self.runs[0].unit

    @property
    def mode(self) -> str:
        """How answers were read."""
        return self.runs[0].mode

    @property
    def tasks(self) -> list[str]:
        """Titles of the data, the pooled one last."""
        names = dict.fromkeys(numbers.task for run in self.runs for numbers in run.tasks)
        return sorted(names, key=lambda name: name == POOLED)

    @property
    def headline(self) -> str:
        """The task that stands for all: the pooled one, or the only one."""
        return self.tasks[-1]

    @property
    def systems(self) -> list[str]:
        """Every system of any run, in the order of the tables."""
        return in_order((name for run in self.runs for numbers in run.tasks for name in numbers.scores), SYSTEMS)

    @property
    def subtitle(self) -> str:
        """Mode, data and runs in a line."""
        own = [task for task in self.tasks if task != POOLED]
        data = ", ".join(own) if len(own) <= 4 else plural(len(own), "task")
        parts = [data, *self._counts(), *[f"mode {self.mode}"] * bool(self.mode)]
        return " \u00b7 ".join(parts)

    def numbers(self, task: str) -> list[Numbers]:
        """What the runs say of a task."""
        return [numbers for run in self.runs for numbers in run.tasks if numbers.task == task]

    def _counts(self) -> list[str]:
        sizes = sorted({numbers.n for numbers in self.numbers(self.headline)})
        questions = plural(sizes[0], "question") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} questions"
        return [questions, *[plural(len(self.runs), "run")] * (len(self.runs) > 1)]


def group(results: Iterable[Result]) -> list[Section]:
    """Results as sections: accuracies first, then by the names of the models."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda run: (run.trained_seed or 0, run.seed or 0, run.fuser)):
        groups.setdefault(result.same, []).append(result)
    ordered = sorted(groups.items(), key=lambda item: (-item[1][0].unit.sign, *_names(item[1][0]), item[0]))
    slugs: list[str] = []
    sections = []
    for _, runs in ordered:
        slugs.append(_slug(runs[0], slugs))
        sections.append(Section(runs, slugs[-1]))
    return sections


def systems_in(sections: Iterable[Section]) -> list[tuple[str, str]]:
    """Title and meaning of every system; no meaning where this version does not know it."""
    names = in_order((name for section in sections for name in section.systems), SYSTEMS)
    return [(system_title(name), SYSTEMS[name][1] if name in SYSTEMS else "") for name in names]


def run_title(run: Result) -> str:
    """Fuser and seeds of a run."""
    parts = [f"fuser {run.fuser[:12]}" if run.fuser else "fuser not recorded"]
    if run.trained_seed is not None:
        parts.insert(0, f"training seed {run.trained_seed}")
    elif run.seed is not None:
        parts.append(f"seed {run.seed}")
    return ", ".join(parts)


def _names(run: Result) -> tuple[str, str, str, list[str]]:
    return run.receiver, run.sharer, run.mode, [numbers.task for numbers in run.tasks]


def _slug(run: Result, taken: list[str]) -> str:
    words = f"{run.receiver} from {run.sharer} {run.mode}".lower()
    slug = re.sub(r"[^a-z0-9.]+", "-", words).strip("-.") or "pair"
    numbered = [slug, *(f"{slug}-{count}" for count in range(2, len(taken) + 2))]
    return next(name for name in numbered if name not in taken)
