"""Results of an analysis: intervals, provenance, and the files ``NAME.json`` and ``NAME.svg``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from c2c.analysis.config import AnalysisError
from c2c.evaluation.statistics import summarise
from c2c.utils import OnProgress, command, file_hash, install_command, short_path, versions, write_json, write_text

# Where files lie and what runs the models: neither makes it another analysis.
_NOT_COMPARED = ("output_dir", "store_dir", "store_budget_gb", "fuser", "model", "data", "shots_data", "device_map")

Measure = Callable[..., dict[str, Any]]


def analysis(name: str) -> Callable[[Measure], Measure]:
    """Make a function ``(config, progress=None) -> numbers`` an analysis that writes its result.

    With ``config.output_dir`` the numbers go to ``NAME.json`` and a plot to ``NAME.svg``, each whole or not at all.
    Numbers whose name starts with ``_`` are for the plot alone.

    The analysis returns the numbers with ``analysis`` (its name) and, where files were written, ``files`` (their names)
    and ``caption``. It raises AnalysisError where the folder can't be used, before anything is computed.
    """

    def decorate(measure: Measure) -> Measure:
        @wraps(measure)
        def run(config: Any, progress: OnProgress | None = None) -> dict[str, Any]:
            if config.output_dir is not None:
                check_drawing()
                if Path(config.output_dir).expanduser().is_file():
                    raise AnalysisError(f"output_dir {config.output_dir} is a file; give a folder.")
            numbers = measure(config, progress)
            result = {"analysis": name} | {key: value for key, value in numbers.items() if not key.startswith("_")}
            if config.output_dir is not None:
                result |= _write(result, numbers, Path(config.output_dir).expanduser())
            return result

        return run

    return decorate


def check_drawing() -> None:
    """Refuse to draw without the optional packages.

    Raises:
        AnalysisError: matplotlib or scikit-learn is not installed.
    """
    modules = {"matplotlib": "matplotlib", "scikit-learn": "sklearn"}
    if missing := [name for name, module in modules.items() if find_spec(module) is None]:
        raise AnalysisError(
            f"plots need {' and '.join(missing)}: {install_command('analysis')}. Numbers alone (c2c analyze without "
            "--output-dir, c2c inspect without --plot) do not."
        )


def _write(result: dict[str, Any], numbers: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    from c2c.analysis.plots import ANALYSES

    name = result["analysis"]
    plot = ANALYSES[name](numbers)
    written = {"caption": plot.caption, "files": [f"{name}.json", f"{name}.svg"]}
    try:
        write_text(folder / f"{name}.svg", plot.svg())
        write_json(folder / f"{name}.json", result | written)
    except OSError as error:
        raise AnalysisError(f"the result could not be written to {folder}: {error}.") from error
    return written


def provenance(facts: Mapping[str, Any], config: Mapping[str, Any], files: Sequence[str]) -> dict[str, Any]:
    """Collect what is needed to repeat an analysis.

    Returns:
        ``facts``; ``data``, hashes of ``files``; ``config`` without what can't change the numbers; ``key``, a hash of
        these; ``command`` and ``versions``.
    """
    compared = {
        **facts,
        "data": {short_path(name): file_hash(Path(name).expanduser()) for name in files},
        "config": {name: value for name, value in config.items() if name not in _NOT_COMPARED},
    }
    key = hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()
    return compared | {"key": key, "command": command(), "versions": versions()}


def difference(first: Sequence[float], second: Sequence[float], seed: int) -> dict[str, Any]:
    """Return first minus second on the same items: ``points`` and their 95 % paired bootstrap interval ``ci95``."""
    return gains(summarise({"matched": first, "receiver": second}, seed))["G"]


def gains(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return ``G`` and ``P`` of a summary, those that it has, as ``points`` and ``ci95``."""
    return {
        letter: {"points": summary[letter], "ci95": summary[f"{letter}_ci95"]} for letter in "GP" if letter in summary
    }
