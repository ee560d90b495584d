"""Name systems, differences and data in a report, and shorten paths of the machine that measured them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

POOLED = "all questions"

_NAMES = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
# Systems in the order of the tables, each with what it is; a system that is not here comes after these.
SYSTEMS: dict[str, str] = _NAMES["systems"]
_TASKS: dict[str, str] = _NAMES["tasks"]
# Differences between two systems, by their letter.
DIFFERENCES: dict[str, list[str]] = _NAMES["differences"]
# Titles of measures that say more than their name, the most important first.
MEASURES: dict[str, str] = _NAMES["measures"]
LEGEND: str = _NAMES["legend"]
# Changes of single answers from the receiver alone to matched.
CHANGES = ("mended", "spoiled", "gap_recovered")
# Parts of the seconds, in the order in which they pass.
STAGES = ("sharer_prefill", "sharer_decode", "receiver_prefill", "fuse", "decode")
COSTS = ("seconds", "first_token", *STAGES, "tokens", "bytes", "memory")


def in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Sort names in the known order, unknown ones after them by the alphabet."""
    rank = {name: position for position, name in enumerate(known)}
    return sorted(set(names), key=lambda name: (rank.get(name, len(rank)), name))


def spaced(name: str) -> str:
    """Write the name of a system or field with spaces."""
    return name.replace("_", " ")


def task_titles(sources: Iterable[str]) -> dict[str, str]:
    """Map data files to short titles; a title that several files share stays the whole name."""
    short = {source: task_title(source) for source in sources}
    titles = list(short.values())
    return {source: title if titles.count(title) == 1 else source for source, title in short.items()}


def task_title(source: str) -> str:
    """Shorten the name of a data file: ``arc_easy/test.jsonl (8 options)`` is ``ARC-Easy (8 options)``."""
    match = re.fullmatch(r"(?P<path>.+?)\.jsonl?(?P<options> \(.*\))?", source, flags=re.DOTALL)
    if match is None:
        return short_path(source)
    *folders, name = re.split(r"[/\\]", short_path(match["path"], 2))
    folder, options = folders[-1] if folders else "", match["options"] or ""
    if folder and name == "test":
        return _TASKS.get(folder, folder) + options
    if folder in _TASKS:
        return f"{_TASKS[folder]} {name}{options}"
    return _TASKS.get(name, f"{folder}/{name}" if folder else name) + options


def short_path(path: str, parts: int = 1) -> str:
    """Shorten a path that starts at a machine's root or home to its last ``parts`` names; others stay as they are."""
    if not re.match(r"[/~]|[A-Za-z]:[/\\]", path):
        return path
    inside = re.sub(
        r"^(~[^/\\]*|/root|/home/[^/]+|/Users/[^/]+|[A-Za-z]:([/\\]Users[/\\][^/\\]+)?)(?=[/\\]|$)", "", path
    )
    return "/".join([name for name in re.split(r"[/\\]", inside) if name][-parts:]) or "home"


def short_command(command: str) -> str:
    """Shorten all paths of a command line, so that it shows no folders of a machine."""
    try:
        words = shlex.split(command)
    except ValueError:  # an open quote
        words = command.split()
    shortened = []
    for word in words:
        option, equals, path = word.rpartition("=")
        short = short_path(path, 2)
        shortened.append(option + equals + (path if short == path else f".../{short}"))
    return shlex.join(shortened)
