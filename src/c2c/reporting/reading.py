"""Result files of ``c2c eval``: found, read, and checked before anything is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from c2c.reporting.merging import merge
from c2c.reporting.names import GAINS, POOLED, WRITTEN, relative, task_titles
from c2c.reporting.provenance import data_hashes, settings_of, shown, training, who
from c2c.reporting.results import Abstention, CurvePoint, Numbers, ReportError, Result, Routing
from c2c.reporting.text import Estimate, Unit
from c2c.utils import read_json_object

_EXPECTED = "Expected the result.json that `c2c eval --output-dir FOLDER` writes, or a folder that holds such files."


def read_results(paths: Iterable[Path]) -> list[Result]:
    """Read result files, and those in folders.

    Files of one evaluation that hold other systems, or costs that the first has not, become one result.

    Raises:
        ReportError: nothing is there, a file is not a result, or two files hold the same evaluation.
    """
    results: dict[tuple[str, str, int | None], tuple[Result, Path]] = {}
    for file in _find(paths):
        result = read_result(file)
        key = (result.same, result.fuser, result.seed)
        if key in results:
            first, where = results[key]
            result, file = merge(first, result, f"{where} and {file}"), where
        results[key] = (result, file)
    return [result for result, _ in results.values()]


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
    settings = settings_of(provenance, config)
    return Result(
        receiver=_model(provenance, "receiver"),
        sharer=_model(provenance, "sharer"),
        fuser=str(provenance.get("fuser") or ""),
        seed=seed if isinstance(seed, int) else None,
        trained_seed=training(provenance).get("seed"),
        mode=str(config.get("mode", "")),
        unit=unit,
        tasks=tasks,
        same=json.dumps([unit.name, who(provenance), data_hashes(provenance, config), settings], sort_keys=True),
        provenance=shown(data, provenance),
        settings=settings,
        routing=_routing(data.get("router")),
        abstention=_abstention(data.get("abstain")),
        answer_tokens=_count(config.get("max_new_tokens")),
        message_tokens=_count(config.get("message_tokens")),
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
    timed = [count for system in systems.values() if (count := _count(system.get("timed"))) is not None]
    return Numbers(
        task=task,
        n=n,
        scores=scores,
        gains=_gains(part, scores, prefix),
        written={key: found for key in WRITTEN if (found := _written(systems, key, prefix))},
        costs={name: costs for name, system in systems.items() if (costs := _costs(system))},
        timed=max(timed, default=None),
        speed=_speed(part.get("speed", {}), f"{prefix}speed"),
        **{key: _optional(part.get(key), prefix + key) for key in ("mended", "spoiled", "gap_recovered", "mcnemar_p")},
    )


def _written(systems: Mapping[str, Any], key: str, prefix: str) -> dict[str, float]:
    return {
        name: _number(system[key], f"{prefix}systems.{name}.{key}") for name, system in systems.items() if key in system
    }


def _score(system: Any, where: str) -> Estimate:
    values = _mapping(system, where)
    key = next((name for name in ("accuracy", "f1") if name in values), "mean")
    if key not in values:
        raise _Broken(f"{where} has no 'accuracy', 'f1' or 'mean'")
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
    rest = {
        key: value for key, value in system.items() if key not in ("accuracy", "f1", *WRITTEN, "mean", "ci95", "timed")
    }
    return {key: float(value) for key, value in rest.items() if _is_number(value)}


def _speed(ratios: Any, where: str) -> dict[str, Estimate]:
    """How many times as long as matched each system takes."""
    found = {}
    for name, one in _mapping(ratios, where).items():
        values = _mapping(one, f"{where}.{name}")
        found[name] = _estimate(values.get("ratio"), values.get("ci95"), f"{where}.{name}.ratio")
    return found


def _routing(facts: Any) -> Routing | None:
    if facts is None:
        return None
    values = _mapping(facts, "router")
    sent, asked = (_number(values.get(key), f"router.{key}") for key in ("share_routed", "share_asked"))
    return Routing(sent, asked)


def _abstention(facts: Any) -> Abstention | None:
    if facts is None:
        return None
    values = _mapping(facts, "abstain")
    curve = values.get("curve", [])
    if not isinstance(curve, list):
        raise _Broken(f"abstain.curve is {_kind(curve)}, expected a list")
    points = [_mapping(point, "abstain.curve") for point in curve]
    keys = ("share_fused", "accuracy", "spoiled")
    return Abstention(
        margin=_optional(values.get("margin"), "abstain.margin"),
        share_fused=_number(values.get("share_fused"), "abstain.share_fused"),
        curve=[CurvePoint(*(_number(point.get(key), f"abstain.curve.{key}") for key in keys)) for point in points],
    )


def _count(value: Any) -> int | None:
    return int(value) if _is_number(value) else None


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
