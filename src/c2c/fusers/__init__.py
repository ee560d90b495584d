"""Fusers, one family per file, found by name.

A third party adds one with the entry point group ``c2c.fusers``: ``name = "module:FuserClass"``.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from c2c.errors import FuserError, did_you_mean
from c2c.fusers.base import Entries, Fuser, FuserConfig
from c2c.fusers.bottleneck import BottleneckConfig, BottleneckFuser
from c2c.fusers.c2c import C2CFuser, C2CFuserConfig
from c2c.fusers.linear import LinearConfig, LinearFuser
from c2c.fusers.memory import MemoryConfig, MemoryFuser

_FAMILIES: dict[str, type[Fuser]] = {
    "bottleneck": BottleneckFuser,
    "c2c": C2CFuser,
    "linear": LinearFuser,
    "memory": MemoryFuser,
}


def families() -> dict[str, type[Fuser]]:
    """All fuser families by name, those of other packages included."""
    found = dict(_FAMILIES)
    for entry in entry_points(group="c2c.fusers"):
        if entry.name not in found:
            found[entry.name] = entry.load()
    return found


def family(name: str) -> type[Fuser]:
    """The fuser class of a family.

    Raises:
        FuserError: no such family.
    """
    found = families()
    if name not in found:
        raise FuserError(
            f"unknown fuser family {name!r}.{did_you_mean(name, found)} Known: {', '.join(sorted(found))}."
        )
    return found[name]


__all__ = [
    "BottleneckConfig",
    "BottleneckFuser",
    "C2CFuser",
    "C2CFuserConfig",
    "Entries",
    "Fuser",
    "FuserConfig",
    "LinearConfig",
    "LinearFuser",
    "MemoryConfig",
    "MemoryFuser",
    "families",
    "family",
]
