"""Reuse of another fuser's evaluation: the answers of systems that need no fuser."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from c2c.data.formats import Row
from c2c.evaluation.config import EvaluationError
from c2c.evaluation.journal import Journal, Record
from c2c.utils import read_json_object

# Further fusers are distinguished by their hash.
WITHOUT_FUSER = ("receiver", "sharer", "text", "text_published", "adapter", "reader", "draft_text", "summary")
_COMPARED = ("receiver", "sharer", "data", "config")


class EarlierEvaluation:
    """A finished evaluation of the same models, items and settings, perhaps with another fuser.

    Args:
        folder: its ``output_dir``.
        provenance: of the new evaluation.
        batch: its batch size.

    Raises:
        EvaluationError: the folder holds no finished evaluation, or one of other models, items or settings.
    """

    def __init__(self, folder: str, provenance: dict[str, Any], batch: int) -> None:
        self.folder = Path(folder)
        missing = [name for name in ("result.json", "items.jsonl") if not (self.folder / name).is_file()]
        if missing:
            raise EvaluationError(
                f"reuse: {folder} holds no {' and no '.join(missing)}; expected the output_dir of a finished "
                "evaluation."
            )
        before = read_json_object(self.folder / "result.json", EvaluationError).get("provenance", {})
        now = json.loads(json.dumps(provenance))  # as it was written
        other = [difference for name in _COMPARED for difference in _differences(name, before.get(name), now[name])]
        if other:
            raise EvaluationError(
                f"reuse: {folder} is another evaluation: {'; '.join(other)}. Answers can be reused where models, items "
                "and settings are the same, and only the fuser is another one."
            )
        self.fuser: str = before["fuser"]
        self._journal = Journal(folder, before["key"], batch)

    def records(self, source: str, system: str, rows: Sequence[Row]) -> list[Record]:
        """Return a system's records of a source, marked with the fuser of their evaluation; empty where it has none.

        Raises:
            EvaluationError: they are of other items.
        """
        records = self._journal.records(source, system)
        if records and [record["id"] for record in records] != [row.id for row in rows]:
            raise EvaluationError(
                f"reuse: the items of {source} in {self.folder} are others than those that this fuser can read."
            )
        return [record | {"reused": self.fuser[:12]} for record in records]


def _differences(where: str, before: Any, now: Any) -> list[str]:
    """Describe what is not the same, key by key."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [text for key in keys for text in _differences(f"{where}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{where} was {before!r}, is {now!r}"]
