"""``evaluate``: every system on the same items, item by item on disk, and the numbers at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from c2c.evaluation.config import EvalConfig, EvaluationError
from c2c.evaluation.numbers import summarise
from c2c.evaluation.systems import answer
from c2c.files import file_hash, write_json, write_text
from c2c.fusers.base import resolve
from c2c.model import C2CModel
from c2c.training.config import DataSource
from c2c.training.examples import Example, build_examples
from c2c.training.rows import Row, load_rows
from c2c.training.step import FuserTraining
from c2c.training.store import PrefillStore
from c2c.version import __version__

OnProgress = Callable[[str, int, int], None]
Item = dict[str, Any]


def evaluate(config: EvalConfig, progress: OnProgress | None = None) -> dict[str, Any]:
    """Run all systems on all items.

    With ``output_dir`` each batch is written as soon as it is done, and a run that was stopped goes on from there.

    Args:
        config: what to evaluate.
        progress: called with (source, items done, items).

    Returns:
        The numbers of :func:`~c2c.evaluation.numbers.summarise` over all items, the same per source under
        ``sources`` where there are several, and under ``provenance`` all that is needed to repeat them.

    Raises:
        EvaluationError: the items don't suit the mode, or ``output_dir`` holds another evaluation.
        ConfigError: missing or broken data.
    """
    rows = _rows(config)
    model = C2CModel.from_pretrained(
        config.fuser,
        receiver=config.receiver,
        sharer=config.sharer,
        dtype=config.dtype,
        device_map=config.device_map,
    )
    if len(model.sharers) != 1:
        raise EvaluationError(
            f"{config.fuser} has {len(model.sharers)} sharers; one is evaluated at a time: give one of its fusers."
        )
    receiver_store, sharer_store = _stores(model, config)
    training = FuserTraining(model, receiver_store, sharer_store).eval()
    provenance = _provenance(config, model)
    journal = Journal(config.output_dir, provenance["key"], config.batch_size)
    dropped: dict[str, int] = {}
    for name, drawn in rows.items():
        examples, reasons = build_examples(model, drawn, model.receiver.context_length or 10**9, 10**9)
        dropped |= {f"{name}: {reason}": count for reason, count in reasons.items()}
        _check(examples, name, config)
        for start in range(journal.done(name, len(examples)), len(examples), config.batch_size):
            part = examples[start : start + config.batch_size]
            journal.add(name, _answer(training, part, examples[start - 1], config))
            if progress is not None:
                progress(name, min(start + config.batch_size, len(examples)), len(examples))
    result = _result(journal.items, config) | {"dropped": dropped, "provenance": provenance}
    if config.output_dir is not None:
        write_json(Path(config.output_dir) / "result.json", result)
    return result


class Journal:
    """The items done, in memory and, with a folder, line by line in ``items.jsonl``.

    Args:
        folder: where to write; None for memory only.
        key: what the evaluation is; a journal of another one is not continued.
        batch: items per batch; a batch that was not written whole is done again.

    Raises:
        EvaluationError: the folder holds another evaluation.
    """

    def __init__(self, folder: str | None, key: str, batch: int) -> None:
        self.path = None if folder is None else Path(folder) / "items.jsonl"
        self.batch = batch
        self.items: dict[str, list[Item]] = {}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._resume(self.path, key)

    def done(self, source: str, total: int) -> int:
        """How many items of a source are done; whole batches only."""
        items = self.items.setdefault(source, [])
        if len(items) < total:
            del items[len(items) - len(items) % self.batch :]
        return len(items)

    def add(self, source: str, items: Sequence[Item]) -> None:
        """Note the items of a batch."""
        self.items[source] += items
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps({"source": source} | item, ensure_ascii=False) + "\n" for item in items))

    def _resume(self, path: Path, key: str) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        lines = [line for line in lines if line.endswith("\n")]  # the last one may have been cut
        if lines and json.loads(lines[0]).get("key") != key:
            raise EvaluationError(
                f"{path} holds another evaluation (other fuser, models, data or settings): choose another output "
                "folder, or delete it."
            )
        for line in lines[1:]:
            item = json.loads(line)
            self.items.setdefault(item.pop("source"), []).append(item)
        for source, items in self.items.items():
            self.done(source, len(items) + 1)
        self._rewrite(path, key)

    def _rewrite(self, path: Path, key: str) -> None:
        records = [{"key": key}] + [{"source": name} | item for name, items in self.items.items() for item in items]
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _rows(config: EvalConfig) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for source in config.data:
        limited = replace(source, limit=config.limit if config.limit is not None else source.limit)
        how = [source.form] * (source.form != "letter") + [f"{source.options} options"] * (source.options is not None)
        name = f"{_short(source)} ({', '.join(how)})" if how else _short(source)
        rows[name if name not in rows else f"{name} #{len(rows)}"] = load_rows(
            [limited], Path(config.data_dir), config.seed
        )[0]
    return rows


def _short(source: DataSource) -> str:
    """A file by its folder and name: what tells tasks apart in a table, and not where they lie on this machine."""
    return "/".join(Path(source.name).parts[-2:]) if source.path is not None else source.name


def _stores(model: C2CModel, config: EvalConfig) -> tuple[PrefillStore, PrefillStore]:
    """Stores of whole caches: the sharer alone needs all its layers."""
    folder = Path(config.store_dir) if config.store_dir is not None else None
    budget = int(config.store_budget_gb * 5e8) if folder is not None else 0
    receiver, sharer = (
        PrefillStore(side, range(side.geometry.layers), folder=folder, budget=budget, batch=4)
        for side in (model.receiver, model.sharers[0])
    )
    return receiver, sharer


def _answer(training: FuserTraining, part: Sequence[Example], before: Example, config: EvalConfig) -> list[Item]:
    """All systems' answers to some items, one record per item."""
    padded = list(part) if len(part) > 1 else [*part, before]  # a derangement needs two
    batch = training.collate(padded)
    records: list[Item] = [{"id": example.row.id, "answer": example.row.answer} for example in part]
    for system in config.systems:
        answers = answer(system, training, batch, config)
        for row, record in enumerate(records):
            for key, values in (("chosen", answers.chosen), ("texts", answers.texts), ("nll", answers.losses)):
                if values:
                    record.setdefault(key, {})[system] = values[row]
    return records


def _check(examples: Sequence[Example], name: str, config: EvalConfig) -> None:
    if len(examples) < 2:
        raise EvaluationError(f"{name}: {len(examples)} items are left to evaluate; at least 2 are needed.")
    if config.mode != "nll" and not all(example.choice_ids for example in examples):
        raise EvaluationError(f"{name}: mode {config.mode!r} needs multiple-choice items; use mode 'nll' for others.")


def _result(items: Mapping[str, list[Item]], config: EvalConfig) -> dict[str, Any]:
    def numbers(records: Sequence[Item]) -> dict[str, Any]:
        if config.mode == "nll":
            scores = {system: [record["nll"][system] for record in records] for system in config.systems}
            return summarise(scores, config.seed, percent=False)
        right = {
            system: [float(record["chosen"][system] == record["answer"]) for record in records]
            for system in config.systems
        }
        return summarise(right, config.seed)

    result = numbers([record for records in items.values() for record in records])
    if len(items) > 1:
        result["sources"] = {name: numbers(records) for name, records in items.items()}
    return result


def _provenance(config: EvalConfig, model: C2CModel) -> dict[str, Any]:
    folder = resolve(config.fuser)
    facts = {
        "fuser": file_hash(folder / "model.safetensors"),
        "receiver": model.receiver.identity.to_dict(),
        "sharer": model.sharers[0].identity.to_dict(),
        "data": {_short(s): file_hash(Path(config.data_dir) / s.path) if s.path else None for s in config.data},
        "config": {key: value for key, value in config.to_dict().items() if key not in _NOT_COMPARED}
        | {"data": [dataclasses.asdict(source) | {"path": _short(source)} for source in config.data]},
    }
    return facts | {
        "training": _training(model.fusers[0]),
        "key": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        "command": shlex.join(["c2c", *sys.argv[1:]]),
        "versions": {
            "c2c": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _training(fuser: Any) -> dict[str, Any]:
    """What tells one trained fuser from another, without its lists of data."""
    record = fuser.config.training or {}
    config = record.get("config")
    settings = config if isinstance(config, dict) else {}
    return {
        "family": fuser.family,
        "step": record.get("step"),
        "config": {key: value for key, value in settings.items() if key not in ("train", "dev", "exclude")},
    }


_NOT_COMPARED = ("output_dir", "store_dir", "store_budget_gb", "data_dir", "fuser", "device_map")
