"""What larger sharers bring: accuracies of several evaluations of one receiver, by the size of the sharer.

Cache-to-Cache (ICLR 2026, arXiv:2510.03215, figure 6) finds that the gain of fusion grows faster with the sharer's size
than that of text. Only result files of ``c2c eval`` are read; nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from c2c.analysis.drawing import band, done, legend, panels
from c2c.analysis.record import check_output, publish
from c2c.analysis.settings import AnalysisError
from c2c.errors import C2CError
from c2c.reporting.canvas import Plot
from c2c.reporting.names import relative
from c2c.utils import command, file_hash, read_json_object, versions

NAME = "scaling"
SYSTEMS = ("receiver", "sharer", "matched", "deranged", "text")
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)
_UNITS = {"b": 1e9, "m": 1e6}


@dataclass(frozen=True)
class Evaluated:
    """One result file.

    Attributes:
        path: where it was read.
        data: its content.
    """

    path: Path
    data: dict[str, Any]

    @property
    def sharer(self) -> dict[str, Any]:
        """Identity of the sharer."""
        identity: dict[str, Any] = self.data["provenance"]["sharer"]
        return identity

    @property
    def compared(self) -> dict[str, Any]:
        """What all files must agree in: the receiver's weights, the data, and how questions were put."""
        provenance = self.data["provenance"]
        config = provenance.get("config", {})
        receiver = provenance["receiver"]
        return {
            "receiver": receiver.get("weights") or receiver.get("name"),
            "data": provenance.get("data"),
            "n": self.data.get("n"),
            "mode": config.get("mode"),
            "form": [source.get("form") for source in config.get("data", [])],
        }


def measure_scaling(
    results: Sequence[str], parameters: Mapping[str, float] | None = None, output_dir: str | None = None
) -> dict[str, Any]:
    """Accuracies by the sharer's parameter count.

    The count comes from ``parameters``, else from the identity in the result, else from the model's config where the
    model lies on this machine, else from the size in its name ("1.5b"); each row says which.

    Args:
        results: result files of ``c2c eval``, or folders that hold ``result.json`` files.
        parameters: parameter counts by the sharer's name, where they are not known otherwise.
        output_dir: where the table and the plot go; None keeps no files.

    Returns:
        ``rows``, by parameter count: ``sharer``, ``parameters``, ``counted`` (where from), ``systems`` (accuracy and
        ``ci95``), ``G`` and ``P`` with intervals where the result has them, ``fuser`` (hash), ``seed``; ``receiver``.

    Raises:
        AnalysisError: fewer than two results, a file that is not the result of an evaluation of accuracy, results that
            can't be compared, or a sharer of unknown size.
    """
    check_output(output_dir)
    found = [_read(path) for path in _files(results)]
    if len(found) < 2:
        raise AnalysisError(f"got {len(found)} result; give at least two, of different sharers.")
    _check_comparable(found)
    rows = sorted((_row(one, parameters or {}) for one in found), key=lambda row: (row["parameters"], row["sharer"]))
    numbers = {
        "receiver": relative(str(found[0].data["provenance"]["receiver"]["name"])),
        "n": found[0].data["n"],
        "rows": rows,
        "provenance": {
            "results": {str(relative(str(one.path), 3)): file_hash(one.path) for one in found},
            "compared": found[0].compared,
            "command": command(),
            "versions": versions(),
        },
    }
    return publish(NAME, numbers, lambda: _draw(numbers), output_dir)


def count_parameters(identity: Mapping[str, Any], given: Mapping[str, float]) -> tuple[int, str]:
    """A model's parameter count, and where it is from: ``given``, ``identity``, ``config`` or ``name``.

    Raises:
        AnalysisError: none of them knows.
    """
    name = str(identity.get("name"))
    known = given.get(name, given.get(Path(name).name))
    if known is not None:
        return int(known), "given"
    if isinstance(identity.get("parameters"), int):
        return int(identity["parameters"]), "identity"
    counted = _from_config(name)
    if counted is not None:
        return counted, "config"
    match = _SIZE.search(Path(name).name.replace("_", "-"))
    if match is None:
        raise AnalysisError(f"the number of parameters of {name} is not known: give it, --parameters {name}=COUNT.")
    return int(float(match[1]) * _UNITS[match[2].lower()]), "name"


def _from_config(name: str) -> int | None:
    """Count the parameters of a model that lies here, without its weights; None where it does not."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from c2c.hub_aliases import ALIASES, local_path

    try:
        folder = local_path(name) if name in ALIASES else Path(name).expanduser()
        if not (folder / "config.json").is_file():
            return None
        config = AutoConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (C2CError, OSError, ValueError, KeyError):
        return None
    return int(sum(parameter.numel() for parameter in model.parameters()))


def _files(results: Sequence[str]) -> list[Path]:
    files: dict[Path, Path] = {}
    for given in results:
        path = Path(given).expanduser()
        if not path.exists():
            raise AnalysisError(
                f"{given} does not exist. Expected result.json files of c2c eval, or folders with them."
            )
        inside = sorted(path.rglob("result.json")) if path.is_dir() else [path]
        if not inside:
            raise AnalysisError(f"the folder {given} holds no result.json.")
        files |= {file.resolve(): file for file in inside}
    return list(files.values())


def _read(path: Path) -> Evaluated:
    data = read_json_object(path, AnalysisError)
    systems, provenance = data.get("systems"), data.get("provenance")
    whole = isinstance(systems, dict) and isinstance(provenance, dict)
    if not whole or not all(isinstance(provenance.get(role), dict) for role in ("receiver", "sharer")):  # type: ignore[union-attr]
        raise AnalysisError(f"{path} is not a result of c2c eval with one sharer (systems and provenance are missing).")
    missing = [name for name in ("receiver", "sharer", "matched") if "accuracy" not in (systems or {}).get(name, {})]
    if missing:
        raise AnalysisError(f"{path} has no accuracy of {', '.join(missing)}: evaluate these systems too.")
    return Evaluated(path, data)


def _check_comparable(found: Sequence[Evaluated]) -> None:
    first = found[0]
    for other in found[1:]:
        differing = [name for name, value in first.compared.items() if other.compared[name] != value]
        if differing:
            raise AnalysisError(
                f"{first.path} and {other.path} differ in {', '.join(differing)}; compare results of one receiver on "
                "the same items."
            )


def _row(one: Evaluated, parameters: Mapping[str, float]) -> dict[str, Any]:
    count, counted = count_parameters(one.sharer, parameters)
    data, provenance = one.data, one.data["provenance"]
    gains = {key: data[key] for letter in ("G", "P") for key in (letter, f"{letter}_ci95") if key in data}
    systems = {
        name: {key: data["systems"][name][key] for key in ("accuracy", "ci95")}
        for name in SYSTEMS
        if name in data["systems"]
    }
    return {
        "sharer": relative(str(one.sharer["name"])),
        "parameters": count,
        "counted": counted,
        "systems": systems,
        **gains,
        "fuser": provenance.get("fuser"),
        "seed": provenance.get("config", {}).get("seed"),
    }


def _draw(numbers: Mapping[str, Any]) -> Plot:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, (axes,) = panels(["Accuracy, percent"], [240])
    rows = numbers["rows"]
    looks = {"receiver": "receiver", "sharer": "sharer", "matched": "matched", "deranged": "control", "text": "other"}
    markers = {"receiver": "o", "sharer": "s", "matched": "D", "deranged": "v", "text": "^"}
    for name, colour in looks.items():
        points = [row for row in rows if name in row["systems"]]
        if points:
            estimates = [row["systems"][name] for row in points]
            band(axes, [row["parameters"] for row in points], estimates, colour, marker=markers[name], ms=5, label=name)
    axes.set_xscale("log")
    axes.set_xticks(sorted({row["parameters"] for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("parameters of the sharer")
    legend(figure, axes)
    caption = f"Receiver {numbers['receiver']}, {numbers['n']} questions; shaded: 95 % intervals."
    return done(NAME, "Accuracy by the size of the sharer", caption, figure)


def _size(count: float) -> str:
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
