"""What larger sharers bring: accuracies of several evaluations of one receiver, by the size of the sharer.

Cache-to-Cache (ICLR 2026, arXiv:2510.03215, figure 6) finds that the gain of fusion grows faster with the sharer's size
than that of text. Only result files of ``c2c eval`` are read; nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from c2c.analysis.config import AnalysisError, ScalingConfig
from c2c.analysis.experiment import analysis
from c2c.errors import C2CError
from c2c.utils import OnProgress, command, file_hash, find_results, read_json_object, short_path, versions

SYSTEMS = ("receiver", "sharer", "matched", "deranged", "text")
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)
_UNITS = {"b": 1e9, "m": 1e6}


@analysis("scaling")
def measure_scaling(config: ScalingConfig, progress: OnProgress | None = None) -> dict[str, Any]:
    """Order the accuracies of several evaluations by the sharer's parameter count, see :func:`count_parameters`.

    Returns:
        ``rows``, by parameter count: ``sharer``, ``parameters``, ``counted`` (where from), ``systems`` (accuracy and
        ``ci95``), ``G`` and ``P`` with intervals where the result has them, ``fuser`` (hash), ``seed``; ``receiver``.

    Raises:
        AnalysisError: fewer than two results, a file that is not the result of an evaluation of accuracy, results that
            can't be compared, or a sharer of unknown size.
    """
    found = {path.resolve(): _read(path) for path in find_results(map(Path, config.results), AnalysisError)}
    if len(found) < 2:
        raise AnalysisError(f"got {len(found)} result; give at least two, of different sharers.")
    (first_path, first), *others = found.items()
    compared = _compared(first)
    for path, other in others:
        if differing := [name for name, value in _compared(other).items() if value != compared[name]]:
            raise AnalysisError(
                f"{first_path} and {path} differ in {', '.join(differing)}; compare results of one receiver on the "
                "same items."
            )
    rows = [_row(result, config.parameters) for result in found.values()]
    return {
        "receiver": _short_name(first["provenance"]["receiver"]["name"]),
        "n": first["n"],
        "rows": sorted(rows, key=lambda row: (row["parameters"], row["sharer"])),
        "provenance": {
            "results": {short_path(str(path)): file_hash(path) for path in found},
            "compared": compared,
            "command": command(),
            "versions": versions(),
        },
    }


def count_parameters(name: str, given: Mapping[str, float]) -> tuple[int, str]:
    """Count the parameters of a model by its name in a result file.

    Returns:
        The count and its source: ``given`` by the user, ``config`` of a model on this machine, or ``name`` ("1.5b").

    Raises:
        AnalysisError: none of them has the count.
    """
    if (known := given.get(name, given.get(Path(name).name))) is not None:
        return int(known), "given"
    if (counted := _count_from_config(name)) is not None:
        return counted, "config"
    if (match := _SIZE.search(Path(name).name.replace("_", "-"))) is not None:
        return int(float(match[1]) * _UNITS[match[2].lower()]), "name"
    raise AnalysisError(f"the number of parameters of {name} is not known: give it, --parameters {name}=COUNT.")


def _count_from_config(name: str) -> int | None:
    """Count the parameters of a model on this machine without loading its weights; None where it is not here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from c2c.hub_aliases import ALIASES, local_path

    try:
        folder = local_path(name) if name in ALIASES else Path(name).expanduser()
        if not (folder / "config.json").is_file():
            return None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(folder)))
    except (C2CError, OSError, ValueError, KeyError):
        return None
    return int(sum(parameter.numel() for parameter in model.parameters()))


def _short_name(name: str) -> str:
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def _read(path: Path) -> dict[str, Any]:
    result = read_json_object(path, AnalysisError)
    systems, about = result.get("systems"), result.get("provenance")
    models = [about.get(role) for role in ("receiver", "sharer")] if isinstance(about, dict) else [None]
    if not all(isinstance(part, dict) for part in (systems, *models)):
        raise AnalysisError(f"{path} is not a result of c2c eval with one sharer (systems and provenance are missing).")
    if missing := [name for name in SYSTEMS[:3] if "accuracy" not in result["systems"].get(name, {})]:
        raise AnalysisError(f"{path} has no accuracy of {', '.join(missing)}: evaluate these systems too.")
    return result


def _compared(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all results must agree in: the receiver's weights, the data, and the prompt form."""
    provenance = result["provenance"]
    config, receiver = provenance.get("config", {}), provenance["receiver"]
    return {
        "receiver": receiver.get("weights") or receiver.get("name"),
        "data": provenance.get("data"),
        "n": result.get("n"),
        "mode": config.get("mode"),
        "form": [source.get("form") for source in config.get("data", [])],
    }


def _row(result: Mapping[str, Any], parameters: Mapping[str, float]) -> dict[str, Any]:
    provenance, systems = result["provenance"], result["systems"]
    name = str(provenance["sharer"].get("name"))
    count, counted = count_parameters(name, parameters)
    scores = {name: {key: systems[name][key] for key in ("accuracy", "ci95")} for name in SYSTEMS if name in systems}
    return {
        "sharer": _short_name(name),
        "parameters": count,
        "counted": counted,
        "systems": scores,
        **{key: result[key] for key in ("G", "G_ci95", "P", "P_ci95") if key in result},
        "fuser": provenance.get("fuser"),
        "seed": provenance.get("config", {}).get("seed"),
    }
