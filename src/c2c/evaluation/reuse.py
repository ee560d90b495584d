"""Answers that an evaluation of another fuser already holds: those of systems that it took no part in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from c2c.data.formats import Row
from c2c.evaluation.config import EvaluationError
from c2c.evaluation.journal import Journal, Record
from c2c.utils import read_json_object

# Both models alone, text between them, and the receiver's adapter. Further fusers are told apart by their hash.
WITHOUT_FUSER = frozenset(
    {
        "receiver",
        "sharer",
        "text",
        "text_published",
        "adapter",
        "reader",
        "draft_text",
        "summary_50",
        "summary_100",
        "summary_200",
    }
)
_SAME = ("receiver", "sharer", "data", "config")


class Earlier:
    """A finished evaluation of the same models, items and settings, perhaps with another fuser.

    Args:
        folder: its ``output_dir``.
        provenance: of the evaluation to come.
        batch: its batch size.

    Raises:
        EvaluationError: the folder holds no finished evaluation, or one of other models, items or settings.
    """

    def __init__(self, folder: str, provenance: dict[str, Any], batch: int) -> None:
        self.folder = Path(folder)
        missing = [name for name in ("result.json", "items.jsonl") if not (self.folder / name).is_file()]
        if missing:
            raise EvaluationError(
                f"reuse: {folder} holds no {' and no '.join(missing)}; expected the output_dir of an evaluation that "
                "was finished."
            )
        before = read_json_object(self.folder / "result.json", EvaluationError).get("provenance", {})
        now = json.loads(json.dumps(provenance))  # as it was written
        other = [difference for name in _SAME for difference in _differences(name, before.get(name), now[name])]
        if other:
            raise EvaluationError(
                f"reuse: {folder} was evaluated otherwise: {'; '.join(other)}. Answers can be taken over where models, "
                "items and settings are the same, and only the fuser is another one."
            )
        self.fuser: str = before["fuser"]
        self._journal = Journal(folder, before["key"], batch)

    def answers(self, source: str, label: str, rows: Sequence[Row]) -> list[Record]:
        """A system's records of a source, marked with the fuser they were made beside; empty where it has none.

        Raises:
            EvaluationError: they are of other items.
        """
        records = self._journal.records(source, label)
        if records and [record["id"] for record in records] != [row.id for row in rows]:
            raise EvaluationError(
                f"reuse: the items of {source} in {self.folder} are others than those that this fuser can read."
            )
        return [record | {"reused": self.fuser[:12]} for record in records]


def _differences(where: str, before: Any, now: Any) -> list[str]:
    """What is not the same, key by key, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [text for key in keys for text in _differences(f"{where}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{where} was {before!r}, is {now!r}"]
