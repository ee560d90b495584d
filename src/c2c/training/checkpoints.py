"""Checkpoints that a kill can't spoil: one counts only when it was written whole."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

_MARK = "complete"


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
