"""Load result files of ``c2c eval`` into tidy pandas frames."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from c2c.errors import C2CError
from c2c.report.names import CHANGES, DIFFERENCES, POOLED, short_path, task_titles
from c2c.report.provenance import comparison_key, data_sources, flatten, mapping, provenance_lines, settings_of
from c2c.utils import RESULT_EXPECTED, find_results, read_json_object

INDEX = ["task", "measure", "name"]
_Estimate = tuple[float, float, float]  # a number and the bounds of its interval, NaN without one


class ReportError(C2CError, ValueError):
    """A file is not a result, or a report can't be made of the results."""


@dataclass(frozen=True, eq=False)
class Run:
    """Hold the numbers of one fuser on some data with one seed.

    Attributes:
        sharer: name of the sharer; those of several are joined by a plus.
        fuser: hash of the fuser's weights, empty where it is not recorded.
        seeds: of the evaluation and of the fuser's training, None where it is not recorded.
        mode: how answers were read.
        kind: kind of the data.
        unit: of the scores: ``percent``, ``percent f1`` or ``nats per token``.
        key: equal for runs that differ only in fuser, seed and systems.
        settings: what tells it from other evaluations of the pair on the same data.
        values: all numbers. Index: ``task``, ``measure``, ``name``; columns: ``value``, and ``low`` and ``high`` of the
            95 % interval, NaN without one. Measures by system: ``score``, ``exact``, ``holds``, costs such as
            ``seconds``, and ``ratio``, seconds over those of matched; ``difference``, by letter; ``change``, by kind;
            ``n`` and ``mcnemar_p``.
        files: the provenance of each of its files, label to text.
    """

    receiver: str
    sharer: str
    fuser: str
    seeds: tuple[int | None, int | None]
    mode: str
    kind: str
    unit: str
    key: str
    settings: dict[str, str]
    values: pd.DataFrame
    files: list[dict[str, str]]

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return -1 if "nats" in self.unit else 1

    @property
    def tasks(self) -> list[str]:
        """Titles of the data, the pooled questions last."""
        return sorted(self.values.index.get_level_values("task").unique(), key=lambda task: task == POOLED)

    @property
    def n(self) -> int:
        """Number of questions."""
        return int(self.values.loc[(self.tasks[-1], "n", ""), "value"])

    @property
    def title(self) -> str:
        """Fuser and seeds."""
        seed, training_seed = self.seeds
        training = "" if training_seed is None else f", training seed {training_seed}"
        return f"fuser {self.fuser[:12] or 'not recorded'}{training}, seed {seed}"


def load_results(paths: Iterable[Path]) -> list[Run]:
    """Load result files, and those in folders.

    Files of one evaluation that hold other systems, or costs that the first has not, become one run.

    Raises:
        ReportError: nothing is there, a file is not a result, or two files contradict or repeat each other.
    """
    runs: dict[tuple[Any, ...], tuple[Run, Path]] = {}
    for path in find_results(paths, ReportError):
        try:
            run = _run(read_json_object(path, ReportError))
        except ReportError as error:
            raise ReportError(f"{path} is not a result of c2c eval: {error} {RESULT_EXPECTED}") from error
        key = (run.key, run.fuser, run.seeds)
        if key in runs:
            first, first_path = runs[key]
            run, path = _merge(first, run, f"{first_path} and {path}"), first_path
        runs[key] = run, path
    return [run for run, _ in runs.values()]


def _merge(first: Run, second: Run, paths: str) -> Run:
    """Join two files of one evaluation; where both have a number, that of the first stays."""
    same = f"{paths} hold the same evaluation (same models, fuser, data, mode and seed)"
    if first.values.index.equals(second.values.index):
        raise ReportError(f"{same}: give one of them.")
    rows = pd.concat([first.values, second.values]).reset_index()
    scores = rows[rows["measure"].isin(["n", "score"])].drop_duplicates()
    contradictions = scores.loc[scores.duplicated(INDEX), "name"]
    if not contradictions.empty:
        raise ReportError(f"{same} with different numbers for {', '.join(contradictions.unique())}: give one of them.")
    return replace(first, values=rows.drop_duplicates(INDEX).set_index(INDEX), files=first.files + second.files)


def _run(data: Mapping[str, Any]) -> Run:
    provenance = _get(data, "provenance", dict)
    unit = _get(data, "unit", str)
    sources = _get(data, "sources", dict) if data.get("sources") else {}
    titles = task_titles(sources)
    rows = [
        (titles[name], *row) for name in sources for row in _rows(_get(sources, name, dict, "sources."), f"{name}: ")
    ]
    rows += [(POOLED if sources else _only_task(provenance), *row) for row in _rows(data)]
    seeds = (mapping(provenance, *keys).get("seed") for keys in (("config",), ("training", "config")))
    seed, training_seed = (seed if isinstance(seed, int) else None for seed in seeds)
    return Run(
        receiver=_model(provenance, "receiver"),
        sharer=_model(provenance, "sharer"),
        fuser=str(provenance.get("fuser") or ""),
        seeds=(seed, training_seed),
        mode=str(mapping(provenance, "config").get("mode", "")),
        kind=str([source.get("kind") for source in data_sources(provenance)[:1]]),
        unit=unit,
        key=comparison_key(unit, provenance),
        settings=flatten(settings_of(provenance)),
        values=pd.DataFrame(rows, columns=[*INDEX, "value", "low", "high"]).set_index(INDEX),
        files=[provenance_lines(data)],
    )


def _rows(data: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, str, *_Estimate]]:
    """Yield measure, name and estimate of all numbers over the items of a task."""
    n = float(_get(data, "n", int, where))
    yield "n", "", n, n, n
    scores = {}
    for name in _get(data, "systems", dict, where):
        numbers, place = _get(data["systems"], name, dict, f"{where}systems."), f"{where}systems.{name}."
        key = next((key for key in ("accuracy", "f1", "mean") if key in numbers), "accuracy, f1 or mean")
        scores[name] = _estimate(numbers, key, place, "ci95")
        yield "score", name, *scores[name]
        for field, value in numbers.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and field != key:
                yield field, name, *_estimate(numbers, field, place)
    for letter in dict.fromkeys([*DIFFERENCES, *(key.removesuffix("_ci95") for key in data if key.endswith("_ci95"))]):
        system, other = DIFFERENCES.get(letter, ("", ""))
        if letter in data:
            yield "difference", letter, *_estimate(data, letter, where, f"{letter}_ci95")
        elif system in scores and other in scores:
            yield "difference", letter, scores[system][0] - scores[other][0], math.nan, math.nan
    speed = _get(data, "speed", dict, where) if data.get("speed") else {}
    for name in speed:
        yield "ratio", name, *_estimate(_get(speed, name, dict, "speed."), "ratio", f"speed.{name}.", "ci95")
    for measure, field in (*(("change", field) for field in CHANGES), ("mcnemar_p", "mcnemar_p")):
        if data.get(field) is not None:
            yield measure, field.removeprefix("mcnemar_p"), *_estimate(data, field, where)


def _only_task(provenance: Mapping[str, Any]) -> str:
    """Return the title of the only data source, with the form and number of its options where they are unusual."""
    source = next(iter(data_sources(provenance)), {})
    names = [source.get("path") or source.get("dataset"), *mapping(provenance, "data"), "questions"]
    form, options = source.get("form", "letter"), source.get("options")
    how = ", ".join([form] * (form != "letter") + [f"{options} options"] * (options is not None))
    full = next(str(name) for name in names if name) + (f" ({how})" if how else "")
    return task_titles([full])[full]


def _model(provenance: Mapping[str, Any], role: str) -> str:
    """Return a model's name, or several sharers' names."""
    given = provenance.get(role)
    identities = given if isinstance(given, list) and given else [given]
    names = [_get(identity if isinstance(identity, dict) else {}, "name", str, f"{role}.") for identity in identities]
    return " + ".join(short_path(name) for name in names)


def _get(data: Mapping[str, Any], key: str, kind: type, where: str = "") -> Any:
    """Return what is under a key, if it is of the expected type and not empty."""
    value = data.get(key)
    if not isinstance(value, kind) or not value:
        names = {dict: "an object", str: "a text", int: "a number"}
        raise ReportError(f"{where}{key} is {value!r:.80}, expected {names[kind]} that is not empty or 0.")
    return value


def _estimate(data: Mapping[str, Any], key: str, where: str, interval: str = "") -> _Estimate:
    """Return a number and the bounds of its interval."""

    def number(value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ReportError(f"{where}{name} is {value!r:.80}, expected a number.")
        return float(value)

    value, bounds = number(data.get(key), key), data.get(interval)
    if bounds is None:
        return value, math.nan, math.nan
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise ReportError(f"{where}{interval} is {bounds!r:.80}, expected [low, high].")
    return value, number(bounds[0], interval), number(bounds[1], interval)
