"""Results side by side: the runs of one pair on the same data, which differ in fuser, seed and systems only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from c2c.reporting.names import POOLED, READING, SYSTEMS, in_order, system_title
from c2c.reporting.results import Numbers, Result
from c2c.reporting.text import Unit, plural

_SHOWN = 3  # settings in a line


@dataclass(frozen=True)
class Section:
    """The runs of one pair, with the same data and mode.

    Attributes:
        runs: at least one, by seed and fuser.
        slug: a name for files and anchors, different for every section.
        variant: settings that tell it from other sections of the pair on the same data, in words; empty without any.
    """

    runs: list[Result]
    slug: str
    variant: str = ""

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
    def size(self) -> int:
        """Most questions of a run."""
        return max(numbers.n for numbers in self.numbers(self.headline))

    @property
    def systems(self) -> list[str]:
        """Every system of any run, in the order of the tables."""
        return in_order((name for run in self.runs for numbers in run.tasks for name in numbers.scores), SYSTEMS)

    @property
    def subtitle(self) -> str:
        """Mode, data and runs in a line."""
        own = [task for task in self.tasks if task != POOLED]
        data = ", ".join(own) if len(own) <= 4 else plural(len(own), "task")
        parts = [data, *self._counts(), *[f"mode {self.mode}"] * bool(self.mode), *[self.variant] * bool(self.variant)]
        return " \u00b7 ".join(parts)

    def numbers(self, task: str) -> list[Numbers]:
        """What the runs say of a task."""
        return [numbers for run in self.runs for numbers in run.tasks if numbers.task == task]

    def _counts(self) -> list[str]:
        sizes = sorted({numbers.n for numbers in self.numbers(self.headline)})
        questions = plural(sizes[0], "question") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} questions"
        return [questions, *[plural(len(self.runs), "run")] * (len(self.runs) > 1)]


def group(results: Iterable[Result]) -> list[Section]:
    """Results as sections: accuracies first, then by the names of the models, those of most questions first."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda run: (run.trained_seed or 0, run.seed or 0, run.fuser)):
        groups.setdefault(result.same, []).append(result)
    ordered = sorted(groups.items(), key=lambda item: (-item[1][0].unit.sign, *_names(item[1][0]), item[0]))
    slugs: list[str] = []
    sections = []
    for _, runs in ordered:
        slugs.append(_slug(runs[0], slugs))
        alike = [other[0].settings for _, other in ordered if _names(other[0]) == _names(runs[0])]
        sections.append(Section(runs, slugs[-1], _variant(runs[0].settings, alike)))
    return sorted(sections, key=lambda one: (-one.unit.sign, *_names(one.runs[0])[:2], -one.size))


def systems_in(sections: Iterable[Section]) -> list[tuple[str, str]]:
    """Title and meaning of every system; no meaning where this version does not know it."""
    names = in_order((name for section in sections for name in section.systems), SYSTEMS)
    return [(system_title(name), SYSTEMS[name][1] if name in SYSTEMS else "") for name in names]


def readings(sections: Iterable[Section]) -> list[tuple[str, str, str]]:
    """Letter, difference and meaning of the gains; of D, T and A only where one of the sections has it."""
    there = {letter for section in sections for run in section.runs for one in run.tasks for letter in one.gains}
    return [reading for reading in READING if reading[0] in there or reading[0] in "GPS"]


def run_title(run: Result) -> str:
    """Fuser and seeds of a run."""
    parts = [f"fuser {run.fuser[:12]}" if run.fuser else "fuser not recorded"]
    if run.trained_seed is not None:
        parts.insert(0, f"training seed {run.trained_seed}")
    elif run.seed is not None:
        parts.append(f"seed {run.seed}")
    return ", ".join(parts)


def _variant(settings: dict[str, Any], alike: list[dict[str, Any]]) -> str:
    """The settings in which sections of the same name differ, in words."""
    flat = [_flat(one) for one in alike]
    differing = [key for key in sorted({key for one in flat for key in one}) if len({one.get(key) for one in flat}) > 1]
    own = _flat(settings)
    words = [f"{key} {own[key]}" if key in own else f"default {key}" for key in differing]
    return ", ".join(words[:_SHOWN]) + ", \u2026" * (len(words) > _SHOWN)


def _flat(settings: dict[str, Any]) -> dict[str, str]:
    """Every setting by its own name, those inside others too; of the sources of data only how they are read."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        inner = value if isinstance(value, list) and key == "data" else [value]
        for one in inner:
            named = _flat(one) if isinstance(one, dict) else {key: str(one)}
            flat |= {name: text for name, text in named.items() if name not in ("path", "dataset")}
    return flat


def _names(run: Result) -> tuple[str, str, str, list[str]]:
    return run.receiver, run.sharer, run.mode, [numbers.task for numbers in run.tasks]


def _slug(run: Result, taken: list[str]) -> str:
    words = f"{run.receiver} from {run.sharer} {run.mode}".lower()
    slug = re.sub(r"[^a-z0-9.]+", "-", words).strip("-.") or "pair"
    numbered = [slug, *(f"{slug}-{count}" for count in range(2, len(taken) + 2))]
    return next(name for name in numbered if name not in taken)
