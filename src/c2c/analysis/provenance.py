"""All that is needed to repeat an analysis: hashes, identities, settings, versions, command."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from c2c.files import file_hash
from c2c.fusers import Fuser
from c2c.fusers.base import resolve
from c2c.version import __version__

# Places on a machine: they don't make it another analysis.
_NOT_COMPARED = ("output_dir", "store_dir", "store_budget_gb", "fuser", "model", "data", "shots_data", "device_map")


def provenance(facts: Mapping[str, Any], settings: Any, files: Sequence[str]) -> dict[str, Any]:
    """Facts about an analysis, and under ``key`` a hash of those that decide its numbers.

    Args:
        facts: identities and hashes of what was analysed.
        settings: a dataclass.
        files: data files, each of which is hashed.
    """
    config = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _NOT_COMPARED}
    deciding = {**facts, "data": {short(name): file_hash(Path(name).expanduser()) for name in files}, "config": config}
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    return deciding | {"key": digest, "command": command(), "versions": versions()}


def fuser_facts(folder: str, fuser: Fuser) -> dict[str, Any]:
    """Hash of a fuser's weights, and what it was trained with, without its lists of data."""
    record = fuser.config.training or {}
    given = record.get("config")
    config = given if isinstance(given, dict) else {}
    settings = {key: value for key, value in config.items() if key not in ("train", "dev", "exclude")}
    return {
        "fuser": file_hash(resolve(folder) / "model.safetensors"),
        "training": {"family": fuser.family, "step": record.get("step"), "config": settings},
    }


def short(path: str) -> str:
    """A file by its folder and name: what tells data apart, and not where it lies on this machine."""
    return "/".join(Path(path).parts[-2:])


def command() -> str:
    """The command line of this process."""
    return shlex.join(["c2c", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of this library and of what its numbers depend on."""
    return {
        "c2c": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
