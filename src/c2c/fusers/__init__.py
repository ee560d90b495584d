"""Fusers, one family per file, found by name.

A third party adds one with the entry point group ``c2c.fusers``: ``name = "module:FuserClass"``.
"""

from __future__ import annotations

from c2c.errors import FuserError, did_you_mean
from c2c.fusers.base import Entries, Fuser, FuserConfig
from c2c.fusers.bottleneck import BottleneckFuser
from c2c.fusers.c2c import C2CFuser
from c2c.fusers.copy import CopyFuser
from c2c.fusers.linear import LinearFuser
from c2c.fusers.memory import MemoryFuser
from c2c.utils import plugins

__all__ = [
    "BottleneckFuser",
    "C2CFuser",
    "CopyFuser",
    "Entries",
    "Fuser",
    "FuserConfig",
    "LinearFuser",
    "MemoryFuser",
    "families",
]


def families() -> dict[str, type[Fuser]]:
    """Return all fuser families by name, those of other packages included."""
    return plugins(Fuser, __name__, "family")


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
