"""Checkpoints that a kill can't spoil: one counts only when it was written whole, and only for the run it is of."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from c2c.training.config import ConfigError, TrainConfig
from c2c.utils import check_writable, read_json_object, write_json

_MARK = "complete"
_RUN = "run.json"
# what may change when a run goes on: where things lie, how long it takes, and how often it tells
_FREE = frozenset(
    {
        "data_dir",
        "output_dir",
        "store_dir",
        "store_budget_gb",
        "report_to",
        "epochs",
        "max_steps",
        "eval_steps",
        "save_steps",
        "logging_steps",
        "fill",
        "prefill_batch",
        "device_map",
    }
)


class CompleteCheckpoints(TrainerCallback):
    """Marks each checkpoint after its last file was written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer when a checkpoint is there."""
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _MARK).touch()


def last_complete(folder: Path) -> str | None:
    """The last whole checkpoint of a run, None if there is none; what a kill left half written is removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step and (path / _MARK).exists():
            found[int(step[1])] = path
        elif step:
            shutil.rmtree(path, ignore_errors=True)
    return str(found[max(found)]) if found else None


def find_start(config: TrainConfig, resume: bool) -> str | None:
    """The checkpoint that a run goes on from, None for a fresh start; looked for before anything is loaded.

    Raises:
        ConfigError: ``output_dir`` can't be written to, or holds the run of another configuration.
    """
    check_writable(config.output_dir, "output_dir", ConfigError)
    last = last_complete(Path(config.output_dir)) if resume else None
    noted = Path(config.output_dir) / _RUN
    if last is not None and noted.is_file():
        before = read_json_object(noted, ConfigError)
        now = _facts(config)
        other = [f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if before.get(key, now[key]) != now[key]]
        if other:
            raise ConfigError(
                f"{config.output_dir} holds the run of another configuration: {'; '.join(other)}. Choose another "
                "output_dir (--output-dir), take the old values, or start afresh with --no-resume."
            )
    return last


def note_run(config: TrainConfig) -> None:
    """Write down what the checkpoints to come are of."""
    write_json(Path(config.output_dir) / _RUN, _facts(config))


def _facts(config: TrainConfig) -> dict[str, Any]:
    facts = {key: value for key, value in config.to_dict().items() if key not in _FREE}
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))  # as it will be read again
    return plain
