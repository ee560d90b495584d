"""Journal of an evaluation: the record of each answer on disk, and the provenance that says which answers they are.

An interrupted run is resumed from its journal, and the evaluation of another fuser takes what needs no fuser from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from c2c.data.config import DataSource
from c2c.evaluation.config import EvalConfig, EvaluationError
from c2c.evaluation.pair import Pair
from c2c.fusers.base import fuser_hash, training_facts
from c2c.utils import command, file_hash, json_line, read_json_object, short_path, versions, write_text

Record = dict[str, Any]
TIMED = "timed: "  # prefix of the source in records of costs
# Paths of a machine, and what may be added later: they do not make it another evaluation.
_NOT_COMPARED = {"output_dir", "reuse", "store_dir", "store_budget_gb", "data_dir", "device_map"}
_NOT_COMPARED |= {"fuser", "systems", "fusers", "adapter", "routed", "timed", "think", "realign"}


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
            self.replace(source, system, records[:-rest])
        return len(self.records(source, system))

    def replace(self, source: str, system: str, records: Sequence[Record]) -> None:
        """Put other records in the place of a system's, and write all anew."""
        self._records[source, system] = list(records)
        if self.path is not None:
            lines = [_line(*name, record) for name, part in self._records.items() for record in part]
            write_text(self.path, self._header + "".join(lines))

    def add(self, source: str, system: str, records: Sequence[Record]) -> None:
        """Append a system's records of a batch.

        Raises:
            EvaluationError: they can't be written, for instance to a full disk.
        """
        self.records(source, system).extend(records)
        if self.path is None:
            return
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


def read_earlier(folder: str, provenance: dict[str, Any], batch: int) -> tuple[Journal, str]:
    """Read the journal of a finished evaluation that differs in nothing but the fuser; return it with the fuser's hash.

    Args:
        folder: its ``output_dir``.
        provenance: of the new evaluation.
        batch: its batch size.

    Raises:
        EvaluationError: the folder holds no finished evaluation, or one of other models, items or settings.
    """
    missing = [name for name in ("result.json", "items.jsonl") if not (Path(folder) / name).is_file()]
    if missing:
        raise EvaluationError(
            f"reuse: {folder} holds no {' and no '.join(missing)}; expected the output_dir of a finished evaluation."
        )
    before = read_json_object(Path(folder) / "result.json", EvaluationError).get("provenance", {})
    now = json.loads(json.dumps(provenance))  # as it was written
    compared = ("receiver", "sharer", "data", "config")
    other = [difference for name in compared for difference in _differences(name, before.get(name), now[name])]
    if other:
        raise EvaluationError(
            f"reuse: {folder} is another evaluation: {'; '.join(other)}. Answers can be reused where models, items "
            "and settings are the same, and only the fuser is another one."
        )
    return Journal(folder, before["key"], batch), before["fuser"]


def provenance(config: EvalConfig, pair: Pair) -> dict[str, Any]:
    """Return hashes, identities, versions and command, and under ``key`` a hash of what determines the answers."""
    compared = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_COMPARED}
    for name in ("data", "dev"):
        compared[name] = [dataclasses.asdict(one) | {"path": source_name(one)} for one in getattr(config, name)]
    files = {source_name(one): one.path and Path(config.data_dir) / one.path for one in (*config.data, *config.dev)}
    facts = {
        "fuser": fuser_hash(config.fuser),
        "receiver": pair.receiver.identity.to_dict(),
        "sharer": pair.sharer.identity.to_dict(),
        "data": {name: file_hash(path) if path else None for name, path in files.items()},
        "config": compared,
    }
    return facts | {
        "systems": list(config.systems),
        "fusers": {name: fuser_hash(folder) for name, folder in config.fusers.items()},
        "training": training_facts(pair.model.fusers[0]),
        "key": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        "command": command(),
        "versions": versions(),
    }


def source_name(source: DataSource) -> str:
    """Return a file's folder and name, which tell tasks apart without the folders of a machine; or the data set."""
    if source.path is not None:
        return short_path(source.name)
    return f"{source.name}/{source.subset}" if source.subset not in (None, "*") else source.name


def _differences(where: str, before: Any, now: Any) -> list[str]:
    """Describe what is not the same, key by key."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [text for key in keys for text in _differences(f"{where}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{where} was {before!r}, is {now!r}"]


def _line(source: str, system: str, record: Record) -> str:
    return json_line({"source": source, "system": system} | record) + "\n"
