"""Load result files of ``c2c eval`` into tidy pandas frames, grouped into evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from c2c.errors import C2CError
from c2c.evaluation.config import DIFFERENCES
from c2c.report.names import POOLED, mapping, provenance_lines, short_path, task_titles
from c2c.utils import RESULT_EXPECTED, find_results, read_json_object

INDEX = ["task", "measure", "name"]
# Changes of single answers from the receiver alone to matched.
CHANGES = ("mended", "spoiled", "gap_recovered")
# Settings that change numbers, with the value that holds where a file has none.
_DEFAULTS: dict[str, Any] = {"mode": "", "limit": None, "dtype": None, "message_tokens": 256}
_Estimate = tuple[float, float, float]  # a number and the bounds of its interval, NaN without one


class ReportError(C2CError, ValueError):
    """A file is not a result, or a report can't be made of the results."""


@dataclass(frozen=True, eq=False)
class Run:
    """Hold the numbers of one fuser on some data with one seed.

    Attributes:
        fuser: hash of the fuser's weights, empty where it is not recorded.
        seeds: of the evaluation and of the fuser's training, None where it is not recorded.
        values: all numbers. Index: ``task``, ``measure``, ``name``; columns: ``value``, ``low`` and ``high`` of the
            95 % interval, NaN without one, and ``loss``: matched is not shown to be better there. Measures by system:
            ``score``, ``exact``, ``holds``, costs such as ``seconds``, and ``ratio``, seconds over those of matched;
            ``difference``, by letter; ``change``, by kind; ``n`` and ``mcnemar_p``.
        files: the provenance of each of its files, label to text.
    """

    fuser: str
    seeds: tuple[int | None, int | None]
    values: pd.DataFrame
    files: list[dict[str, str]]

    @property
    def title(self) -> str:
        """Fuser and seeds."""
        seed, training_seed = self.seeds
        training = "" if training_seed is None else f", training seed {training_seed}"
        return f"fuser {self.fuser[:12] or 'not recorded'}{training}, seed {seed}"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Hold the runs of one pair that differ in fuser, seed and systems only.

    Attributes:
        pair: names of receiver and sharer; those of several sharers are joined by a plus.
        mode: how answers were read.
        kind: kind of the data.
        unit: of the scores: ``percent``, ``percent f1`` or ``nats per token``.
        settings: what tells it from other evaluations of the pair on the same data.
        runs: at least one, by seed and fuser.
        anchor: a name for links, different for each evaluation.
        variant: those of ``settings`` in which evaluations of the same title differ; empty without any.
    """

    pair: str
    mode: str
    kind: str
    unit: str
    settings: dict[str, str]
    runs: list[Run]
    anchor: str = ""
    variant: str = ""

    @cached_property
    def values(self) -> pd.DataFrame:
        """All numbers, as :attr:`Run.values`, and ``runs``: how many have the number.

        Of several runs, ``value`` is the mean, ``low`` and ``high`` are the lowest and the highest value, and ``loss``
        holds where it holds in any of them.
        """
        if len(self.runs) == 1:
            return self.runs[0].values.assign(runs=1)
        columns = {"value": ("value", "mean"), "low": ("value", "min"), "high": ("value", "max")}
        rows = pd.concat([run.values for run in self.runs]).drop("mcnemar_p", level="measure", errors="ignore")
        return rows.groupby(level=INDEX, sort=False).agg(**columns, loss=("loss", "any"), runs=("value", "count"))

    @property
    def tasks(self) -> list[str]:
        """Titles of the data; the pooled questions, if any, are the last."""
        return sorted(self.values.index.get_level_values("task").unique(), key=lambda task: task == POOLED)

    @property
    def systems(self) -> set[str]:
        """Names of the systems that have a score."""
        return set(self.values.xs("score", level="measure").index.get_level_values("name"))

    @property
    def data(self) -> str:
        """The data in a few words."""
        own = [task for task in self.tasks if task != POOLED]
        names = ", ".join(own) if len(own) <= 3 else f"{own[0]} and {len(own) - 1} others"
        return names + ", generated" * (self.mode == "generate")

    @property
    def title(self) -> str:
        """The data, with the settings that tell it from other evaluations of the pair."""
        return f"{self.data}, {self.variant}" if self.variant else self.data

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return -1 if "nats" in self.unit else 1

    @property
    def metric(self) -> str:
        """What the scores are."""
        titles = {"percent": "accuracy, %", "percent f1": "F1, %", "nats per token": "nats per token, lower is better"}
        return titles.get(self.unit, self.unit)

    @property
    def n(self) -> int:
        """Number of questions of the largest run."""
        return int(self.values.loc[(self.tasks[-1], "n", ""), "high"])


def load_evaluations(paths: Iterable[Path]) -> list[Evaluation]:
    """Load result files, and those in folders: accuracies first, then by the names of the models, the largest first.

    Files of one evaluation that hold other systems, or costs that the first has not, become one run.

    Raises:
        ReportError: nothing is there, a file is not a result, or two files contradict or repeat each other.
    """
    groups: dict[str, Evaluation] = {}
    runs: dict[tuple[str, str, Any], tuple[Run, Path]] = {}
    for path in find_results(paths, ReportError):
        try:
            comparison, evaluation, run = _read(read_json_object(path, ReportError))
        except ReportError as error:
            raise ReportError(f"{path} is not a result of c2c eval: {error} {RESULT_EXPECTED}") from error
        groups.setdefault(comparison, evaluation)
        key = (comparison, run.fuser, run.seeds)
        runs[key] = _merge(*runs[key], run, path) if key in runs else (run, path)
    for (comparison, _, _), (run, _) in runs.items():
        groups[comparison].runs.append(run)
    for evaluation in groups.values():
        evaluation.runs.sort(key=lambda run: ([seed or 0 for seed in reversed(run.seeds)], run.fuser))

    def order(comparison: str) -> tuple[Any, ...]:
        one = groups[comparison]
        return ["percent", "percent f1", one.unit].index(one.unit), one.pair, -one.n, one.mode, one.tasks, comparison

    ordered = [groups[comparison] for comparison in sorted(groups, key=order)]
    return [
        replace(one, anchor=f"evaluation-{number}", variant=_variant(one, ordered))
        for number, one in enumerate(ordered, 1)
    ]


def _variant(evaluation: Evaluation, others: Iterable[Evaluation]) -> str:
    """Name the settings in which evaluations of the same title differ, at most three."""
    own, title = evaluation.settings, (evaluation.pair, evaluation.data)
    alike = [one.settings for one in others if (one.pair, one.data) == title]
    names = sorted({name for one in alike for name in one if name not in ("path", "dataset")})
    differing = [name for name in names if len({one.get(name) for one in alike}) > 1]
    words = [f"{name} {own[name]}" if name in own else f"default {name}" for name in differing]
    return ", ".join(words[:3]) + ", \u2026" * (len(words) > 3)


def _merge(first: Run, first_path: Path, second: Run, path: Path) -> tuple[Run, Path]:
    """Join two files of one evaluation; where both have a number, that of the first stays."""
    same = f"{first_path} and {path} hold the same evaluation (same models, fuser, data, mode and seed)"
    if first.values.index.equals(second.values.index):
        raise ReportError(f"{same}: give one of them.")
    rows = pd.concat([first.values, second.values]).reset_index()
    scores = rows[rows["measure"].isin(["n", "score"])].drop_duplicates()
    contradictions = scores.loc[scores.duplicated(INDEX), "name"]
    if not contradictions.empty:
        raise ReportError(f"{same} with different numbers for {', '.join(contradictions.unique())}: give one of them.")
    values, files = rows.drop_duplicates(INDEX).set_index(INDEX), first.files + second.files
    return replace(first, values=values, files=files), first_path


def _read(data: Mapping[str, Any]) -> tuple[str, Evaluation, Run]:
    """Return a key that is equal for runs of the same models, data and settings; their evaluation; and the run."""
    provenance, unit = _get(data, "provenance", dict), _get(data, "unit", str)
    config, training = mapping(provenance, "config"), mapping(provenance, "training", "config")
    entries = config.get("data")
    used = [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    used = [{key: value for key, value in one.items() if value} for one in used]  # later versions may add keys
    models = [_models(provenance, role) for role in ("receiver", "sharer")]
    settings, hashes = _settings(config, training, used), mapping(provenance, "data")
    names = [str(source.get("path") or source.get("dataset")) for source in used]
    data_hashes = {name: hashes.get(name) for name in names or hashes}  # without the dev data of a router
    compared = [unit, [weights for _, weights in models], data_hashes, settings]
    seeds = [one.get("seed") if isinstance(one.get("seed"), int) else None for one in (config, training)]
    evaluation = Evaluation(
        pair=" \u2190 ".join(name for name, _ in models),
        mode=str(config.get("mode", "")),
        kind=str([source.get("kind") for source in used[:1]]),
        unit=unit,
        settings=_flatten(settings),
        runs=[],
    )
    values = _values(data, _only_task(provenance, used), evaluation.sign)
    run = Run(str(provenance.get("fuser") or ""), (seeds[0], seeds[1]), values, [provenance_lines(data)])
    return json.dumps(compared, sort_keys=True), evaluation, run


def _values(data: Mapping[str, Any], only_task: str, sign: int) -> pd.DataFrame:
    """Return all numbers of a result file, and where matched is not shown to be better.

    A difference is a loss where its interval is not wholly on the better side; ``D``, deranged - receiver, where it is
    there at all, since that part of the gain is not content. A ratio is one where a system is faster than matched.
    """
    sources = _get(data, "sources", dict) if data.get("sources") else {}
    titles = task_titles(sources)
    rows = [
        (titles[name], *row) for name in sources for row in _rows(_get(sources, name, dict, "sources."), f"{name}: ")
    ]
    rows += [(POOLED if sources else only_task, *row) for row in _rows(data)]
    values = pd.DataFrame(rows, columns=[*INDEX, "value", "low", "high"]).set_index(INDEX)
    measure, letter = values.index.get_level_values("measure"), values.index.get_level_values("name")
    bound = np.minimum(values["low"] * sign, values["high"] * sign)
    lost = np.where(letter == "D", values["value"] * sign > 0, ~(bound > 0))
    return values.assign(loss=np.where(measure == "difference", lost, (measure == "ratio") & (values["value"] < 1)))


def _settings(config: Mapping[str, Any], training: Mapping[str, Any], sources: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that change numbers, without defaults, systems, dev items, timing and seeds."""
    defaults = _DEFAULTS | ({"max_new_tokens": 32} if config.get("mode") == "generate" else {})
    settings = {key: config[key] for key, default in defaults.items() if config.get(key, default) != default}
    training = {key: value for key, value in training.items() if key != "seed"}
    return settings | {str(i): source for i, source in enumerate(sources)} | {"training": training}


def _flatten(settings: Mapping[Any, Any]) -> dict[str, str]:
    """Return the settings as text, nested ones under their own names."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        flat |= _flatten(value) if isinstance(value, dict) else {name: str(value)}
    return flat


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


def _only_task(provenance: Mapping[str, Any], sources: list[dict[str, Any]]) -> str:
    """Return the title of the only data source, with the form and number of its options where they are unusual."""
    source = next(iter(sources), {})
    names = [source.get("path") or source.get("dataset"), *mapping(provenance, "data"), "questions"]
    form, options = source.get("form", "letter"), source.get("options")
    how = ", ".join([form] * (form != "letter") + [f"{options} options"] * (options is not None))
    full = next(str(name) for name in names if name) + (f" ({how})" if how else "")
    return task_titles([full])[full]


def _models(provenance: Mapping[str, Any], role: str) -> tuple[str, Any]:
    """Return the name of a model or of several, and their hashes, since one model has many names."""
    given = provenance.get(role)
    several = given if isinstance(given, list) and given else []
    identities = [one if isinstance(one, dict) else {} for one in several or [given]]
    names = [_get(identity, "name", str, f"{role}.") for identity in identities]
    weights = [identity.get("weights") or name for identity, name in zip(identities, names, strict=True)]
    return " + ".join(short_path(name) for name in names), weights if several else weights[0]


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
