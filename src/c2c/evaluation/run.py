"""``evaluate``: all systems on the same items, item by item on disk, and the numbers at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from c2c.data.config import DataSource
from c2c.data.formats import Row
from c2c.data.sources import load_rows
from c2c.evaluation.answers import Answerer
from c2c.evaluation.config import (
    PRIVATE_SYSTEMS,
    ROUTER,
    SHARED_SYSTEMS,
    EvalConfig,
    EvaluationError,
    system_kind,
)
from c2c.evaluation.journal import TIMED, Journal, Record
from c2c.evaluation.metrics import contains
from c2c.evaluation.pair import Pair
from c2c.evaluation.profiling import measure
from c2c.evaluation.provenance import provenance, source_name
from c2c.evaluation.reuse import WITHOUT_FUSER, EarlierEvaluation
from c2c.evaluation.router import embed, route
from c2c.evaluation.statistics import mean_costs, speed, summarise
from c2c.fusers.base import fuser_hash
from c2c.utils import OnProgress, check_writable, file_hash, write_json

_DEV = "dev: "
_CONTROLS = ("deranged", "zero", "untrained", "draft_deranged", ROUTER)  # their cost is that of matched or draft


@dataclass(frozen=True)
class Items:
    """The items of one source.

    Attributes:
        name: of the source; dev sources begin with ``dev:``.
        rows: the items that both models can read.
        systems: the systems that answer them.
    """

    name: str
    rows: list[Row]
    systems: list[str]


def evaluate(config: EvalConfig, progress: OnProgress | None = None) -> dict[str, Any]:
    """Run all systems on all items.

    With ``output_dir`` each batch is written as soon as it is done, and an interrupted run is resumed; systems that
    are new in the configuration are added.

    Args:
        config: the evaluation.
        progress: called with (source, items done, items).

    Returns:
        The numbers of :func:`~c2c.evaluation.statistics.summarise` over all items, the same per source under
        ``sources`` where there are several; with ``timed``, costs of an answer beside each system's accuracy, and
        ``speed``; facts of ``router``; and under ``provenance`` all that is needed to repeat them.

    Raises:
        EvaluationError: the items do not suit the mode, or ``output_dir`` holds another evaluation.
        ConfigError: missing or broken data.
    """
    if config.output_dir is not None:
        check_writable(config.output_dir, "output_dir", EvaluationError)
    dropped: Counter[str] = Counter()
    sources = _load(config.data, config, dropped), _load(config.dev, config, dropped, prefix=_DEV)
    pair = Pair(config)
    _check_context(config, private=bool(pair.model.private))
    systems = [name for name in config.systems if name != ROUTER]
    routed = ["receiver", "sharer"] if ROUTER in config.systems else []
    items = [_readable(name, rows, systems, pair, dropped) for name, rows in sources[0].items()]
    dev = [_readable(name, rows, routed, pair, dropped) for name, rows in sources[1].items()]
    evaluation = _Evaluation(config, pair)
    for part in (*dev, *items):
        evaluation.reuse(part)
        evaluation.answer(part, progress)
    for part in items:
        evaluation.measure(part, progress)
    result = evaluation.result(items, dev)
    result |= {"dropped": dict(dropped), "provenance": evaluation.provenance | {"reused": evaluation.reused(items)}}
    if config.output_dir is not None:
        write_json(Path(config.output_dir) / "result.json", result)
    return result


class _Evaluation:
    """A running evaluation: its journal, and its systems once they are needed."""

    def __init__(self, config: EvalConfig, pair: Pair) -> None:
        self.config, self.pair = config, pair
        self._answerers: dict[str, Answerer] = {}
        # weights are part of a name in the journal: others under the same name are another system
        self._labels = {name: f"{name}@{fuser_hash(folder)[:12]}" for name, folder in config.fusers.items()}
        if config.adapter is not None:
            self._labels["adapter"] = f"adapter@{_adapter_hash(config.adapter)[:12]}"
        self.provenance = provenance(config, pair)
        size = config.batch_size
        self.earlier = None if config.reuse is None else EarlierEvaluation(config.reuse, self.provenance, size)
        self.journal = Journal(config.output_dir, self.provenance["key"], size)

    def reuse(self, items: Items) -> None:
        """Take over what an earlier evaluation holds and this fuser has no influence on."""
        total = len(items.rows)
        for name in items.systems if self.earlier is not None else ():
            label = self._label(name)
            independent = system_kind(name) in WITHOUT_FUSER or name in self.config.fusers
            if self.earlier is not None and independent and not self.journal.done(items.name, label, total):
                self.journal.add(items.name, label, self.earlier.records(items.name, label, items.rows))

    def answer(self, items: Items, progress: OnProgress | None) -> None:
        """Let all systems answer all items of a source, batch by batch."""
        total, size = len(items.rows), self.config.batch_size
        done = {name: self.journal.done(items.name, self._label(name), total) for name in items.systems}
        for start in range(min(done.values(), default=total), total, size):
            part = items.rows[start : start + size]
            # a derangement needs two items; only the first is counted
            batch = part if len(part) > 1 else [*part, items.rows[start - 1]]
            for name in items.systems:
                if done[name] <= start:
                    answers = self._answerer(name).answer(batch)
                    records = [{"id": r.id, "answer": r.answer} | a for r, a in zip(part, answers, strict=False)]
                    self.journal.add(items.name, self._label(name), records)
            if progress is not None:
                progress(items.name, min(start + size, total), total)

    def measure(self, items: Items, progress: OnProgress | None) -> None:
        """Answer some items one by one, all systems in turn, and record the cost of each answer."""
        rows, source = items.rows[: self.config.timed], TIMED + items.name
        for index, row in enumerate(rows):
            for name in self._timed():
                label = self._label(name)
                if len(self.journal.records(source, label)) > index:
                    continue
                if index == 0:
                    measure(self._answerer(name), row)  # to warm up
                cost = measure(self._answerer(name), row)
                self.journal.add(source, label, [{"id": row.id} | {key: round(v, 5) for key, v in cost.items()}])
            if progress is not None:
                progress(source, index + 1, len(rows))

    def result(self, items: Sequence[Items], dev: Sequence[Items]) -> dict[str, Any]:
        """Compute all numbers, over all items and per source."""
        records = [self._records(part) for part in items]
        facts = {}
        if ROUTER in self.config.systems:
            known, receiver = [self._records(part) for part in dev], self.pair.receiver
            features = [embed(receiver, [row for part in some for row in part.rows]) for some in (dev, items)]
            routed, facts[ROUTER] = route(
                _joined(known), features[0], _joined(records), features[1], self.config.routed
            )
            rest = iter(routed)
            for part in records:
                part[ROUTER] = [next(rest) for _ in part["receiver"]]
        result = self._numbers(_joined(records), items)
        if len(items) > 1:
            parts = zip(items, records, strict=True)
            result["sources"] = {part.name: self._numbers(found, [part]) for part, found in parts}
        return result | facts

    def reused(self, items: Sequence[Items]) -> dict[str, str]:
        """Return the systems whose answers were taken over, with the fuser of that evaluation."""
        firsts = {
            name: self.journal.records(part.name, self._label(name))[0] for part in items for name in part.systems
        }
        return {name: record["reused"] for name, record in firsts.items() if "reused" in record}

    def _records(self, items: Items) -> dict[str, list[Record]]:
        records = {name: self.journal.records(items.name, self._label(name)) for name in items.systems}
        if self.config.mode != "answers":
            return records
        return {  # from the texts, since a journal may be older than this score
            name: [
                record | {"holds": contains(record["text"], row.references)}
                for record, row in zip(part, items.rows, strict=True)
            ]
            for name, part in records.items()
        }

    def _numbers(self, records: Mapping[str, list[Record]], items: Sequence[Items]) -> dict[str, Any]:
        result = self._scores(records)
        costs = {
            name: [cost for part in items for cost in self.journal.records(TIMED + part.name, self._label(name))]
            for name in self._timed()
        }
        for name, measured in costs.items():
            result["systems"][name] |= mean_costs(measured) if measured else {}
        return result | speed(costs, self.config.seed)

    def _scores(self, records: Mapping[str, list[Record]]) -> dict[str, Any]:
        config = self.config

        def column(score: Callable[[Record], float]) -> dict[str, list[float]]:
            return {name: [score(record) for record in records[name]] for name in config.systems}

        if config.mode == "nll":
            return summarise(column(lambda record: record["nll"]), config.seed, percent=False)
        if config.mode != "answers":
            return summarise(column(lambda record: float(record["chosen"] == record["answer"])), config.seed)
        result = summarise(column(lambda record: record["f1"]), config.seed, key="f1")
        for key in ("exact", "holds"):
            for name, part in records.items():
                result["systems"][name][key] = round(100 * sum(record[key] for record in part) / len(part), 3)
        return result

    def _timed(self) -> list[str]:
        wanted = [name for name in self.config.systems if name not in _CONTROLS]
        return wanted if self.config.timed and self.config.mode != "nll" else []

    def _answerer(self, name: str) -> Answerer:
        if name not in self._answerers:
            self._answerers[name] = Answerer(name, self.pair, self.config)
        return self._answerers[name]

    def _label(self, name: str) -> str:
        return self._labels.get(name, name)


def _load(
    sources: Sequence[DataSource], config: EvalConfig, dropped: Counter[str], prefix: str = ""
) -> dict[str, list[Row]]:
    """Read the rows of each source by its name; those of ``data`` within the limit."""
    rows: dict[str, list[Row]] = {}
    for source in sources:
        if not prefix and config.limit is not None:
            source = replace(source, limit=config.limit)
        details = [source.form] * (source.form != "letter")
        details += [f"{source.options} options"] * (source.options is not None)
        name = prefix + source_name(source) + (f" ({', '.join(details)})" if details else "")
        name = name if name not in rows else f"{name} #{len(rows)}"
        rows[name], reasons = load_rows([source], Path(config.data_dir), config.seed)
        dropped.update({f"{name}: {reason}": count for reason, count in reasons.items()})
    return rows


def _readable(name: str, rows: list[Row], systems: list[str], pair: Pair, dropped: Counter[str]) -> Items:
    """Return the items that both models can read; others are counted.

    Raises:
        EvaluationError: too few are left, or they do not suit the mode.
    """
    reasons = [pair.unreadable(row) for row in rows]
    dropped.update(f"{name}: {reason}" for reason in reasons if reason is not None)
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    mode = pair.config.mode
    if len(kept) < 2:
        raise EvaluationError(
            f"{name}: {len(kept)} items are left to evaluate; at least 2 are needed, one for another's deranged cache. "
            "Give more questions, or a higher limit or lower skip."
        )
    if any(row.draft for row in kept):
        raise EvaluationError(f"{name}: draft is for training; in an evaluation choose the system 'draft'.")
    if mode in ("logits", "generate") and not all(row.choices for row in kept):
        raise EvaluationError(f"{name}: mode {mode!r} needs multiple-choice items; use 'answers' or 'nll' for others.")
    if mode == "answers" and not all(row.references for row in kept):
        raise EvaluationError(f"{name}: mode 'answers' needs rows with a reference answer, such as questions.")
    return Items(name, kept, systems)


def _check_context(config: EvalConfig, private: bool) -> None:
    """Refuse systems and rows that the fuser's kind of context does not have."""
    others = SHARED_SYSTEMS if private else PRIVATE_SYSTEMS
    wrong = [name for name in config.systems if system_kind(name) in others]
    if wrong:
        kind = "private" if private else "shared"
        raise EvaluationError(f"{config.fuser} is a fuser of {kind} context, which has no {', '.join(wrong)}.")
    other = sorted({source.kind for source in config.data} - {"private_question"})
    if private and other:
        raise EvaluationError(
            f"{config.fuser} is a fuser of private context: only the sharer reads the passage. Expected rows with "
            f"context, question and answer, given {' and '.join(other)}: pass --kind private_question --mode answers, "
            "and a file of such rows."
        )


def _joined(parts: Sequence[Mapping[str, list[Record]]]) -> dict[str, list[Record]]:
    """Join each system's records over several sources."""
    return {name: [record for part in parts for record in part[name]] for name in (parts[0] if parts else {})}


def _adapter_hash(folder: str) -> str:
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise EvaluationError(f"{folder} holds no adapter ({path.name} is missing).")
    return file_hash(path)
