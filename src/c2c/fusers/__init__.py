"""Fusers, one family per file, found by name.

A third party adds one with the entry point group ``c2c.fusers``: ``name = "module:FuserClass"``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from c2c.errors import FuserError, did_you_mean
from c2c.fusers.base import Entries, Fuser, FuserConfig
from c2c.fusers.bottleneck import BottleneckConfig, BottleneckFuser
from c2c.fusers.c2c import C2CFuser, C2CFuserConfig
from c2c.fusers.linear import LinearConfig, LinearFuser
from c2c.fusers.memory import MemoryConfig, MemoryFuser


def families() -> dict[str, type[Fuser]]:
    """Return all fuser families by name: of the modules beside this one, and of other packages by entry point."""
    modules = [import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__)]
    kinds = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    own = {kind.family: kind for kind in kinds if issubclass(kind, Fuser) and "family" in vars(kind)}
    others = [entry for entry in entry_points(group="c2c.fusers") if entry.name not in own]
    return own | {entry.name: entry.load() for entry in others}


def family(name: str) -> type[Fuser]:
    """Return the fuser class of a family.

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
