"""Benchmarks by name: one module per benchmark, each with a list ``TASKS``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from c2c.config import ConfigError, build
from c2c.data.config import DataSource
from c2c.errors import did_you_mean


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: the task's name in ``--data`` and in configurations.
        file: JSONL file below ``data_dir``, which is taken where it exists.
        dataset: id for the ``datasets`` library, for where it does not.
        subset: configuration of the data set; ``"*"`` for all.
        split: split of the data set.
        kind: kind of rows, see :class:`~c2c.data.config.DataSource`.
        keep: only rows of the data set with these values.
    """

    name: str
    file: str
    dataset: str
    subset: str = "main"
    split: str = "test"
    kind: str = "multiple_choice"
    keep: Mapping[str, Any] = field(default_factory=dict)

    def source(self, data_dir: Path) -> dict[str, Any]:
        """Return keys of :class:`~c2c.data.config.DataSource`, for the file or else the data set."""
        if (data_dir / self.file).is_file():
            return {"path": self.file, "kind": self.kind}
        hub = {"dataset": self.dataset, "subset": self.subset, "split": self.split, "keep": dict(self.keep)}
        return hub | {"kind": self.kind}


@cache
def tasks() -> dict[str, Task]:
    """Return all tasks by name."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return {task.name: task for module in modules for task in getattr(module, "TASKS", ())}


def source(entry: Any, data_dir: Path, where: str) -> DataSource:
    """Make a data source from an entry of a configuration, which may name a task.

    Args:
        entry: a path, the name of a task, or keys of :class:`~c2c.data.config.DataSource`, with ``task`` in place of
            ``path``.
        data_dir: folder of the tasks' files.
        where: name of the entry in an error.

    Raises:
        ConfigError: unknown keys, an unknown task, or a task together with a path.
    """
    known = tasks()
    if isinstance(entry, DataSource):
        return entry
    if isinstance(entry, str):
        entry = {"task": entry} if entry in known else {"path": entry}
    if isinstance(entry, dict) and "task" in entry:
        entry = _of_task(dict(entry), data_dir, where)
    found = build(DataSource, entry, where)
    if found.path is not None and not (data_dir / found.path).exists() and not Path(found.path).suffix:
        hint = did_you_mean(found.path, known)
        if hint:
            raise ConfigError(f"{where}: no such data file or task: {found.path}.{hint} Known: {', '.join(known)}.")
    return found


def _of_task(entry: dict[str, Any], data_dir: Path, where: str) -> dict[str, Any]:
    name, known = entry.pop("task"), tasks()
    if not isinstance(name, str) or name not in known or "path" in entry or "dataset" in entry:
        raise ConfigError(
            f"{where}: task {name!r}; expected one of {', '.join(known)}, without a path of its own."
            f"{did_you_mean(name, known) if str(name) not in known else ''}"
        )
    return known[name].source(data_dir) | entry
