"""Where numbers come from: the command, versions, and what a fuser was trained with."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from c2c.files import file_hash
from c2c.fusers.base import resolve
from c2c.version import __version__


def command() -> str:
    """The command line of this process."""
    return shlex.join(["c2c", *sys.argv[1:]])


def versions(*more: str) -> dict[str, str]:
    """Versions of this library, of what it stands on, and of further packages."""
    found = {"c2c": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def short_path(path: str) -> str:
    """A file by its folder and name: what tells data apart, and not where it lies on this machine."""
    return "/".join(Path(path).parts[-2:])


def fuser_hash(folder: str) -> str:
    """Hash of a fuser's weights."""
    return file_hash(resolve(folder) / "model.safetensors")


def training_facts(fuser: Any) -> dict[str, Any]:
    """What tells one trained fuser from another, without its lists of data."""
    record = fuser.config.training or {}
    config = record.get("config")
    settings = config if isinstance(config, dict) else {}
    return {
        "family": fuser.family,
        "step": record.get("step"),
        "config": {key: value for key, value in settings.items() if key not in ("train", "dev", "exclude")},
    }
