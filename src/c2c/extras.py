"""Optional packages: how to install what a feature needs."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement

DISTRIBUTION = "cache2cache"


def install_command(extra: str) -> str:
    """A command that installs an extra's packages, wherever this package came from.

    Args:
        extra: its name in ``pyproject.toml``, such as ``report``.
    """
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a folder of sources
        return f"pip install '.[{extra}]' in the clone"
    optional = [one for one in map(Requirement, lines) if one.marker is not None and "extra" in str(one.marker)]
    wanted = [f"{one.name}{one.specifier}" for one in optional if one.marker and one.marker.evaluate({"extra": extra})]
    return " ".join(["pip install", *(f"'{one}'" for one in wanted)])
