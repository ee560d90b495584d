"""Checkpoints that a kill can't spoil: each counts only when it was written whole, and only for its own run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from c2c.config import ConfigError
from c2c.training.config import TrainConfig
from c2c.utils import check_writable, read_json_object, write_json

COMPLETE = "complete"
_RUN = "run.json"
# fields that may change when a run is resumed: paths, lengths, and how often it reports
_FREE = {"data_dir", "output_dir", "store_dir", "store_budget_gb", "report_to", "epochs", "max_steps"}
_FREE |= {"eval_steps", "save_steps", "logging_steps", "fill", "prefill_batch", "device_map"}


def last_complete(folder: Path) -> str | None:
    """Return the last whole checkpoint of a run, None if there is none; half-written ones are removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step and (path / COMPLETE).exists():
            found[int(step[1])] = path
        elif step:
            shutil.rmtree(path, ignore_errors=True)
    return str(found[max(found)]) if found else None


def find_checkpoint(config: TrainConfig, resume: bool) -> str | None:
    """Return the checkpoint to resume from, None for a fresh start; called before anything is loaded.

    Raises:
        ConfigError: ``output_dir`` can't be written to, or holds the run of another configuration.
    """
    check_writable(config.output_dir, "output_dir", ConfigError)
    last = last_complete(Path(config.output_dir)) if resume else None
    recorded = Path(config.output_dir) / _RUN
    if last is not None and recorded.is_file():
        before = read_json_object(recorded, ConfigError)
        now = _fixed_fields(config)
        other = [f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if before.get(key, now[key]) != now[key]]
        if other:
            raise ConfigError(
                f"{config.output_dir} holds the run of another configuration: {'; '.join(other)}. Choose another "
                "output_dir (--output-dir), take the old values, or start afresh with --no-resume."
            )
    return last


def record_run(config: TrainConfig) -> None:
    """Write the configuration that the checkpoints to come belong to."""
    write_json(Path(config.output_dir) / _RUN, _fixed_fields(config))


def _fixed_fields(config: TrainConfig) -> dict[str, Any]:
    fields = {key: value for key, value in config.to_dict().items() if key not in _FREE}
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))  # as it will be read again
    return plain
