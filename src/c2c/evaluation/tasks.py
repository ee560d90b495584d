"""The benchmarks of the field by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from c2c.config import ConfigError, build
from c2c.data.config import DataSource
from c2c.errors import did_you_mean

# Below data_dir as JSONL files; where there are none, from the hub through the datasets library. C-Eval's test answers
# were never published; the items of MMLU-Redux that its authors found wrong are left out.
TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "openbookqa": (
        {"path": "openbookqa/test.jsonl"},
        {"dataset": "allenai/openbookqa", "subset": "main", "split": "test"},
    ),
    "arc_challenge": (
        {"path": "arc_challenge/test.jsonl"},
        {"dataset": "allenai/ai2_arc", "subset": "ARC-Challenge", "split": "test"},
    ),
    "arc_easy": (
        {"path": "arc_easy/test.jsonl"},
        {"dataset": "allenai/ai2_arc", "subset": "ARC-Easy", "split": "test"},
    ),
    "mmlu_redux": (
        {"path": "mmlu_redux/test_ok.jsonl"},
        {"dataset": "edinburgh-dawg/mmlu-redux-2.0", "subset": "*", "split": "test", "keep": {"error_type": "ok"}},
    ),
    "ceval": (
        {"path": "ceval/val.jsonl"},
        {"dataset": "ceval/ceval-exam", "subset": "*", "split": "val"},
    ),
    "gsm8k": (
        {"path": "gsm8k/test.jsonl", "kind": "question"},
        {"dataset": "openai/gsm8k", "subset": "main", "split": "test", "kind": "question"},
    ),
}


def source(entry: Any, data_dir: Path, where: str) -> DataSource:
    """A source of items from an entry of a configuration, which may name a task.

    Args:
        entry: a path, the name of a task, or keys of :class:`~c2c.data.config.DataSource`, with ``task`` in place
            of ``path``.
        data_dir: where the files of tasks are looked for.
        where: what to call the entry in an error.

    Raises:
        ConfigError: unknown keys, an unknown task, or a task together with a path.
    """
    if isinstance(entry, DataSource):
        return entry
    if isinstance(entry, str):
        entry = {"task": entry} if entry in TASKS else {"path": entry}
    if isinstance(entry, dict) and "task" in entry:
        entry = _task(dict(entry), data_dir, where)
    found: DataSource = build(DataSource, entry, where)
    if found.path is not None and not (data_dir / found.path).exists() and not Path(found.path).suffix:
        hint = did_you_mean(found.path, TASKS)
        if hint:
            raise ConfigError(f"{where}: no such data file or task: {found.path}.{hint} Known: {', '.join(TASKS)}.")
    return found


def _task(entry: dict[str, Any], data_dir: Path, where: str) -> dict[str, Any]:
    name = entry.pop("task")
    if name not in TASKS or "path" in entry or "dataset" in entry:
        raise ConfigError(
            f"{where}: task {name!r}; expected one of {', '.join(TASKS)}, without a path of its own."
            f"{did_you_mean(name, TASKS) if name not in TASKS else ''}"
        )
    local, hub = TASKS[name]
    return (local if (data_dir / local["path"]).is_file() else hub) | entry
