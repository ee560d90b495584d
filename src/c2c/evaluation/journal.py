"""Per-item records on disk: the state that an interrupted run is resumed from, and what can be inspected afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from c2c.evaluation.config import EvaluationError
from c2c.utils import write_text

Record = dict[str, Any]
TIMED = "timed: "  # prefix of the source in records of costs


class Journal:
    """Records of each source and system, in the order of the items; with a folder line by line in ``items.jsonl``.

    Args:
        folder: output folder; None for memory only.
        key: hash of the evaluation; a journal with another one is not continued.
        batch: items per batch; a batch that was not written whole is done again.

    Raises:
        EvaluationError: the folder holds another evaluation.
    """

    def __init__(self, folder: str | None, key: str, batch: int) -> None:
        self.path = None if folder is None else Path(folder) / "items.jsonl"
        self.batch = batch
        self._header = json.dumps({"key": key}) + "\n"
        self._records: dict[tuple[str, str], list[Record]] = {}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._load(self.path, key)

    def records(self, source: str, system: str) -> list[Record]:
        """Return a system's records of a source so far."""
        return self._records.setdefault((source, system), [])

    def done(self, source: str, system: str, total: int) -> int:
        """Return how many of ``total`` items a system has done; those of an incomplete batch are dropped."""
        records = self.records(source, system)
        rest = len(records) % self.batch
        if rest and len(records) < total:
            del records[-rest:]
            if self.path is not None:
                lines = [_line(*name, record) for name, part in self._records.items() for record in part]
                write_text(self.path, self._header + "".join(lines))
        return len(records)

    def add(self, source: str, system: str, records: Sequence[Record]) -> None:
        """Append a system's records of a batch.

        Raises:
            EvaluationError: they can't be written, for instance to a full disk.
        """
        self.records(source, system).extend(records)
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("".join(_line(source, system, record) for record in records))
            except OSError as error:  # a line that was cut is dropped by the next run
                raise EvaluationError(
                    f"could not write {self.path}: {error.strerror}. What was written before is kept: make room, and "
                    "start the same command again to resume."
                ) from error

    def _load(self, path: Path, key: str) -> None:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [line + "\n" for line in text.split("\n")[:-1]]  # without the last one where it was cut
        if lines and json.loads(lines[0]).get("key") != key:
            raise EvaluationError(
                f"{path} holds another evaluation (other fuser, models, data or settings): choose another output "
                "folder, or delete it."
            )
        for line in lines[1:]:
            record = json.loads(line)
            self.records(record.pop("source"), record.pop("system")).append(record)
        if "".join(lines) != text or not lines:
            write_text(path, "".join(lines) or self._header)


def _line(source: str, system: str, record: Record) -> str:
    return json.dumps({"source": source, "system": system} | record, ensure_ascii=False) + "\n"
