"""Systems: the ways in which a receiver and a sharer answer, one class per file, found by name.

A third party adds one with the entry point group ``c2c.systems``: ``name = "module:SystemClass"``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from c2c.errors import SystemUnavailableError, did_you_mean
from c2c.systems.base import System, SystemOptions
from c2c.utils import plugins

if TYPE_CHECKING:
    from c2c.model import C2CModel

__all__ = ["System", "SystemOptions", "make_system", "systems"]


@cache
def systems() -> dict[str, type[System]]:
    """Return all system classes by name, those of other packages included."""
    return plugins(System, __name__, "name")


def make_system(name: str, model: C2CModel, options: SystemOptions | None = None) -> System:
    """Make the system of a name.

    Args:
        name: ``receiver``, ``reader``, ``sharer``, ``text``, ``c2c`` and others, see :func:`systems`; ``summary_N`` is
            ``summary`` with at most N tokens.
        model: the receiver with its sharers and fusers.
        options: of all systems; each takes what concerns it.

    Raises:
        SystemUnavailableError: no such system, or these models can't answer in this way.
    """
    options = options or SystemOptions()
    found, tokens = find_system(name)
    if tokens is not None:
        options = replace(options, message_tokens=tokens)
    reason = found.unavailable(model, options)
    if reason is not None:
        raise SystemUnavailableError(f"system {name!r} can't answer here: {reason}")
    return found(model, options)


def find_system(name: str) -> tuple[type[System], int | None]:
    """Return the class of a system, and the tokens that its name gives for a message (``summary_64``).

    Raises:
        SystemUnavailableError: no such system.
    """
    known = systems()
    match = re.fullmatch(r"(\w+?)_([1-9][0-9]{0,5})", name)
    kind = match[1] if match else name
    if kind not in known:
        raise SystemUnavailableError(
            f"unknown system {name!r}.{did_you_mean(name, known)} Known: {', '.join(sorted(known))}."
        )
    return known[kind], int(match[2]) if match else None
