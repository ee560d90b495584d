"""Names in a report: of systems, data and settings, without the folders of the machine that measured them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

POOLED = "all questions"
_NAMES = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
# Systems in the order of the tables, each with what it is; a system that is not here comes after these.
SYSTEMS: dict[str, str] = _NAMES["systems"]
_TASKS: dict[str, str] = _NAMES["tasks"]
# Titles of measures that say more than their name, the most important first.
MEASURES: dict[str, str] = _NAMES["measures"]
LEGEND: str = _NAMES["legend"]


def in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Sort names in the known order, unknown ones after them by the alphabet."""
    rank = {name: position for position, name in enumerate(known)}
    return sorted(set(names), key=lambda name: (rank.get(name, len(rank)), name))


def spaced(name: str) -> str:
    """Write the name of a system or field with spaces."""
    return name.replace("_", " ")


def task_titles(sources: Iterable[str]) -> dict[str, str]:
    """Map data files to short titles; a title that several files share stays the whole name."""
    short = {source: _task_title(source) for source in sources}
    titles = list(short.values())
    return {source: title if titles.count(title) == 1 else source for source, title in short.items()}


def _task_title(source: str) -> str:
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
    home = r"^(~[^/\\]*|/root|/home/[^/]+|/Users/[^/]+|[A-Za-z]:([/\\]Users[/\\][^/\\]+)?)(?=[/\\]|$)"
    return "/".join([name for name in re.split(r"[/\\]", re.sub(home, "", path)) if name][-parts:]) or "home"


def short_command(command: str) -> str:
    """Shorten all paths of a command line, so that it shows no folders of a machine."""
    try:
        words = shlex.split(command)
    except ValueError:  # an open quote
        words = command.split()
    options = (word.rpartition("=") for word in words)
    shortened = ((option, equals, path, short_path(path, 2)) for option, equals, path in options)
    return shlex.join(
        option + equals + (path if short == path else f".../{short}") for option, equals, path, short in shortened
    )


def provenance_lines(data: Mapping[str, Any]) -> dict[str, str]:
    """Return what a report shows of where the numbers of a result file come from, label to text."""
    provenance = mapping(data, "provenance")
    lines = {
        "command": short_command(str(provenance.get("command", ""))),
        "seed": mapping(provenance, "config").get("seed"),
        "versions": ", ".join(f"{name} {version}" for name, version in mapping(provenance, "versions").items()),
        "fuser": provenance.get("fuser") or "not recorded",
    }
    labels = {"fusers": "fuser", "reused": "fuser of the reused answers of", "data": "data"}
    for key, label in labels.items():
        lines |= {f"{label} {short_path(name, 2)}": value for name, value in mapping(provenance, key).items()}
    for role in ("receiver", "sharer"):
        lines[f"{role} weights"] = mapping(provenance, role).get("weights")
    for rule in ("router", "abstain"):
        numbers = mapping(data, rule).items()
        lines[rule] = ", ".join(f"{key} {value:g}" for key, value in numbers if isinstance(value, int | float))
    for reason, count in mapping(data, "dropped").items():
        lines[f"not evaluated, {short_path(reason, 2)}"] = count
    lines["evaluation"] = provenance.get("key")
    return {label: str(text) for label, text in lines.items() if text not in (None, "")}


def mapping(data: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return the object under nested keys, empty where there is none."""
    value: Any = data
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}
