"""Task: a benchmark's items, as a file below ``data_dir`` or a data set of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
