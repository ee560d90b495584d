"""Result files of ``c2c eval``: found, read, and checked before anything is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from c2c.errors import C2CError
from c2c.files import read_json_object
from c2c.reporting.names import GAINS, POOLED, portable_command, relative, task_titles
from c2c.reporting.text import Estimate, Unit

_EXPECTED = "Expected the result.json that `c2c eval --output-dir FOLDER` writes, or a folder that holds such files."


class ReportError(C2CError, ValueError):
    """Something that is not a result, or a report that can't be made of the results."""


@dataclass(frozen=True)
class Numbers:
    """All numbers over some items.

    Attributes:
        task: title of the data.
        n: number of items.
        scores: accuracy or mean of each system.
        gains: differences to matched, by their letter.
        costs: per system what a question costs, by field.
        mended: percent of items that only matched has right, against the receiver.
        spoiled: percent of items that only the receiver has right.
        gap_recovered: G in percent of the distance between receiver and sharer.
        mcnemar_p: of mended against spoiled.
    """

    task: str
    n: int
    scores: dict[str, Estimate]
    gains: dict[str, Estimate]
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    mended: float | None = None
    spoiled: float | None = None
    gap_recovered: float | None = None
    mcnemar_p: float | None = None


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
        same: what two evaluations have in common of which only fuser and seed differ.
        provenance: what to show of where the numbers come from, label to text.
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


def read_results(paths: Iterable[Path]) -> list[Result]:
    """Read result files, and those in folders.

    Raises:
        ReportError: nothing is there, a file is not a result, or two files hold the same evaluation.
    """
    files = _find(paths)
    results: list[Result] = []
    seen: dict[tuple[str, str, int | None], Path] = {}
    for file in files:
        result = read_result(file)
        key = (result.same, result.fuser, result.seed)
        if key in seen:
            raise ReportError(
                f"{seen[key]} and {file} hold the same evaluation (same models, fuser, data, mode and seed): give "
                "one of them."
            )
        seen[key] = file
        results.append(result)
    return results


def read_result(path: Path) -> Result:
    """Read one result file.

    Raises:
        ReportError: it is not the result of an evaluation; the message says what is wrong with it.
    """
    data = _json(path)
    try:
        return _result(data)
    except _Broken as broken:
        raise ReportError(f"{path} is not a result of c2c eval: {broken}. {_EXPECTED}") from None


class _Broken(Exception):
    """What is wrong with a file's content."""


def _find(paths: Iterable[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise ReportError(f"{path} does not exist. {_EXPECTED}")
        files = sorted(path.rglob("result.json")) if path.is_dir() else [path]
        if not files:
            raise ReportError(f"the folder {path} holds no result.json, nor does a folder in it. {_EXPECTED}")
        found |= {file.resolve(): file for file in files}
    if not found:
        raise ReportError(f"no results were given. {_EXPECTED}")
    return list(found.values())


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, ReportError)
    except ReportError as error:
        hint = " items.jsonl holds the single answers; the numbers lie in result.json beside it."
        raise ReportError(f"{error} {_EXPECTED}{hint if path.suffix == '.jsonl' else ''}") from error


def _result(data: Mapping[str, Any]) -> Result:
    provenance = _mapping(data.get("provenance"), "provenance")
    config = _mapping(provenance.get("config", {}), "provenance.config")
    unit = Unit(_text(data.get("unit"), "unit"))
    sources = _mapping(data.get("sources", {}), "sources")
    titles = task_titles(sources)
    tasks = [_numbers(part, titles[name], f"sources.{name}") for name, part in sources.items()]
    tasks.append(_numbers(data, POOLED if tasks else _single_task(provenance, config), ""))
    seed = config.get("seed")
    return Result(
        receiver=_model(provenance, "receiver"),
        sharer=_model(provenance, "sharer"),
        fuser=str(provenance.get("fuser") or ""),
        seed=seed if isinstance(seed, int) else None,
        trained_seed=_training(provenance).get("seed"),
        mode=str(config.get("mode", "")),
        unit=unit,
        tasks=tasks,
        same=_same(provenance, config, unit),
        provenance=_shown(data, provenance),
    )


def _numbers(data: Any, task: str, where: str) -> Numbers:
    part = _mapping(data, where)
    prefix = f"{where}." if where else ""
    systems = _mapping(part.get("systems"), f"{prefix}systems")
    if not systems:
        raise _Broken(f"{prefix}systems is empty")
    n = part.get("n")
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise _Broken(f"{prefix}n is {n!r}, expected the number of items")
    scores = {name: _score(system, f"{prefix}systems.{name}") for name, system in systems.items()}
    return Numbers(
        task=task,
        n=n,
        scores=scores,
        gains=_gains(part, scores, prefix),
        costs={name: costs for name, system in systems.items() if (costs := _costs(system))},
        **{key: _optional(part.get(key), prefix + key) for key in ("mended", "spoiled", "gap_recovered", "mcnemar_p")},
    )


def _score(system: Any, where: str) -> Estimate:
    values = _mapping(system, where)
    key = "accuracy" if "accuracy" in values else "mean"
    if key not in values:
        raise _Broken(f"{where} has neither 'accuracy' nor 'mean'")
    return _estimate(values[key], values.get("ci95"), f"{where}.{key}")


def _gains(part: Mapping[str, Any], scores: Mapping[str, Estimate], prefix: str) -> dict[str, Estimate]:
    """All differences in the file, and without an interval those that follow from the scores."""
    letters = [key.removesuffix("_ci95") for key in part if key.endswith("_ci95")]
    gains = {
        letter: _estimate(part[letter], part[f"{letter}_ci95"], prefix + letter) for letter in letters if letter in part
    }
    for letter, (system, other) in GAINS.items():
        if letter not in gains and system in scores and other in scores:
            gains[letter] = Estimate(scores[system].value - scores[other].value)
    return gains


def _costs(system: Mapping[str, Any]) -> dict[str, float]:
    """Every further number of a system: seconds, tokens, bytes, and what later versions measure."""
    rest = {key: value for key, value in system.items() if key not in ("accuracy", "mean", "ci95")}
    return {key: float(value) for key, value in rest.items() if _is_number(value)}


def _estimate(value: Any, bounds: Any, where: str) -> Estimate:
    number = _number(value, where)
    if bounds is None:
        return Estimate(number)
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise _Broken(f"the interval of {where} is {bounds!r}, expected [low, high]")
    low, high = (_number(bound, f"the interval of {where}") for bound in bounds)
    return Estimate(number, low, high)


def _single_task(provenance: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The title of the only data source, with the form of its questions as the evaluation names it."""
    entries = config.get("data")
    source = entries[0] if isinstance(entries, list) and entries and isinstance(entries[0], dict) else {}
    names = [source.get("path") or source.get("dataset"), *_mapping(provenance.get("data", {}), "provenance.data")]
    name = next((str(name) for name in names if name), "questions")
    form, options = source.get("form", "letter"), source.get("options")
    how = [str(form)] * (form != "letter") + [f"{options} options"] * (options is not None)
    full = f"{name} ({', '.join(how)})" if how else name
    return task_titles([full])[full]


def _model(provenance: Mapping[str, Any], role: str) -> str:
    """A model's name, or several sharers' names."""
    given = provenance.get(role)
    identities = given if isinstance(given, list) and given else [given]
    names = [_text(_mapping(one, f"provenance.{role}").get("name"), f"provenance.{role}.name") for one in identities]
    return " + ".join(relative(name) for name in names)


def _same(provenance: Mapping[str, Any], config: Mapping[str, Any], unit: Unit) -> str:
    """Receiver, sharer, data and settings, without what may differ between the runs of one comparison."""
    ignored = ("seed", "systems", "batch_size", "receiver", "sharer")
    settings = {key: value for key, value in config.items() if key not in ignored}
    models = [_who(provenance.get(role)) for role in ("receiver", "sharer")]
    trained = {key: value for key, value in _training(provenance).items() if key != "seed"}
    return json.dumps([unit.name, models, provenance.get("data"), settings, trained], sort_keys=True)


def _training(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the fuser was trained with, as far as they are recorded."""
    training = provenance.get("training")
    config = training.get("config") if isinstance(training, dict) else None
    return dict(config) if isinstance(config, dict) else {}


def _who(identity: Any) -> Any:
    """What tells a model from others: its weights, since one model lies under many names."""
    if isinstance(identity, list):
        return [_who(one) for one in identity]
    return identity.get("weights") or identity.get("name")


def _shown(data: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, str]:
    shown = {"command": portable_command(str(provenance.get("command", "")))}
    versions = provenance.get("versions")
    if isinstance(versions, dict):
        shown["versions"] = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    shown["fuser"] = str(provenance.get("fuser") or "not recorded")
    for role in ("receiver", "sharer"):
        identity = provenance.get(role)
        if isinstance(identity, dict) and identity.get("weights"):
            shown[f"{role} weights"] = str(identity["weights"])
    hashes = provenance.get("data")
    if isinstance(hashes, dict):
        for name, digest in sorted(hashes.items()):
            label = f"data {relative(name, 2)}"
            shown[label if label not in shown else f"data {name}"] = str(digest or "not a file")
    dropped = data.get("dropped")
    if isinstance(dropped, dict):
        shown |= {f"not evaluated, {relative(reason, 2)}": str(count) for reason, count in sorted(dropped.items())}
    shown["evaluation"] = str(provenance.get("key") or "not recorded")
    return {label: text for label, text in shown.items() if text}


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Broken(f"{where or 'the file'} is {_kind(value)}, expected an object")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise _Broken(f"{where} is {_kind(value)}, expected a text")
    return value


def _number(value: Any, where: str) -> float:
    if not _is_number(value):
        raise _Broken(f"{where} is {value!r}, expected a number")
    return float(value)


def _optional(value: Any, where: str) -> float | None:
    return None if value is None else _number(value, where)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
