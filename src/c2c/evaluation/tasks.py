"""The benchmarks of the field by their names."""

from __future__ import annotations

from typing import Any

from c2c.training.config import ConfigError, DataSource, build

# As JSONL files below data_dir, in the format of docs/formats.md. C-Eval's test answers were never published; the
# items of MMLU-Redux that its authors found wrong are left out.
TASKS: dict[str, dict[str, Any]] = {
    "openbookqa": {"path": "openbookqa/test.jsonl"},
    "arc_challenge": {"path": "arc_challenge/test.jsonl"},
    "arc_easy": {"path": "arc_easy/test.jsonl"},
    "mmlu_redux": {"path": "mmlu_redux/test_ok.jsonl"},
    "ceval": {"path": "ceval/val.jsonl"},
    "gsm8k": {"path": "gsm8k/test.jsonl", "kind": "question"},
}


def source(entry: Any, where: str) -> DataSource:
    """A source of items from an entry of a configuration, which may name a task.

    Args:
        entry: keys of :class:`~c2c.training.config.DataSource`, and ``task`` in place of ``path``.
        where: what to call the entry in an error.

    Raises:
        ConfigError: unknown keys, an unknown task, or a task together with a path.
    """
    if isinstance(entry, DataSource):
        return entry
    if isinstance(entry, str):
        entry = {"task": entry} if entry in TASKS else {"path": entry}
    if isinstance(entry, dict) and "task" in entry:
        rest = dict(entry)
        task = rest.pop("task")
        if task not in TASKS or "path" in rest or "dataset" in rest:
            raise ConfigError(f"{where}: task {task!r}; expected one of {', '.join(TASKS)}, without a path of its own.")
        entry = TASKS[task] | rest
    found: DataSource = build(DataSource, entry, where)
    return found
