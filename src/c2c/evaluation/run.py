"""``evaluate``: all systems on the same items, item by item on disk, and the numbers at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from c2c.data.config import DataSource
from c2c.data.formats import Row
from c2c.data.sources import load_rows
from c2c.evaluation.answers import Answerer, compare, describe
from c2c.evaluation.config import (
    PRIVATE_SYSTEMS,
    ROUTER,
    SHARED_SYSTEMS,
    THINKING_SYSTEMS,
    EvalConfig,
    EvaluationError,
    system_kind,
)
from c2c.evaluation.journal import TIMED, Journal, Record, provenance, read_earlier, source_name
from c2c.evaluation.metrics import contains
from c2c.evaluation.pair import Pair
from c2c.evaluation.router import embed, route
from c2c.evaluation.statistics import mean_costs, speed, summarise
from c2c.fusers.base import fuser_hash
from c2c.utils import OnProgress, check_writable, file_hash, write_json

# System to the scores of each item, the same items in the same order; the first score is the one that is compared.
Scores = dict[str, list[dict[str, float]]]
# their cost is that of matched, draft or think
_CONTROLS = ("deranged", "zero", "untrained", "draft_deranged", *THINKING_SYSTEMS[1:], ROUTER)
_COMPARED = ("f1", "exact")
# Further fusers, which are distinguished by their hash, can be reused as well.
_WITHOUT_FUSER = ("receiver", "sharer", "text", "text_published", "adapter", "reader", "draft_text", "summary")


class Items(NamedTuple):
    """The items of one source that both models can read, and the systems that answer them."""

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
    sources = _load(config.data, config, dropped), _load(config.dev, config, dropped, prefix="dev: ")
    pair = Pair(config)
    _check_context(config, private=bool(pair.model.private))
    systems = [name for name in config.systems if name != ROUTER]
    routed = ["receiver", "sharer"] if ROUTER in config.systems else []
    items = [_readable(name, rows, systems, pair, dropped) for name, rows in sources[0].items()]
    dev = [_readable(name, rows, routed, pair, dropped) for name, rows in sources[1].items()]
    evaluation = _Evaluation(config, pair)
    for part in (*dev, *items):
        evaluation.check(part)
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
        self._answerer = cache(partial(Answerer, pair=pair, config=config))
        # weights are part of a name in the journal: others under the same name are another system
        self._labels = {name: f"{name}@{fuser_hash(folder)[:12]}" for name, folder in config.fusers.items()}
        self._labels |= {name: f"{name}@{config.realign}-{config.think}" for name in THINKING_SYSTEMS}
        if config.adapter is not None:
            path = Path(config.adapter) / "adapter_model.safetensors"
            if not path.is_file():
                raise EvaluationError(f"{config.adapter} holds no adapter ({path.name} is missing).")
            self._labels["adapter"] = f"adapter@{file_hash(path)[:12]}"
        timed = config.timed and config.mode != "nll"
        self._timed = [name for name in config.systems if timed and name not in _CONTROLS]
        self.provenance = provenance(config, pair)
        size = config.batch_size
        self._earlier = None if config.reuse is None else read_earlier(config.reuse, self.provenance, size)
        self.journal = Journal(config.output_dir, self.provenance["key"], size)

    def reuse(self, items: Items) -> None:
        """Take over what an earlier evaluation holds and this fuser has no influence on."""
        if self._earlier is None:
            return
        earlier, fuser = self._earlier
        for name in items.systems:
            label, total = self._label(name), len(items.rows)
            independent = system_kind(name) in _WITHOUT_FUSER or name in self.config.fusers
            if not independent or self.journal.done(items.name, label, total):
                continue
            records = earlier.records(items.name, label)
            if records and len(records) != len(items.rows):
                raise self._other_items(items.name, self.config.reuse)
            records = self._described(records, items, self.config.reuse)
            self.journal.add(items.name, label, [record | {"reused": fuser[:12]} for record in records])

    def check(self, items: Items) -> None:
        """Check that the records of an interrupted run are of these items; complete those of earlier versions."""
        for name in items.systems:
            label = self._label(name)
            records = self.journal.records(items.name, label)
            described = self._described(records, items, self.config.output_dir)
            if described != records:
                self.journal.replace(items.name, label, described)

    def _described(self, records: Sequence[Record], items: Items, folder: str | None) -> list[Record]:
        """Return records with what describes their items, which those of earlier versions lack.

        Raises:
            EvaluationError: they are of other items, or compared with other references.
        """
        described = []
        for record, row in zip(records, items.rows, strict=False):
            facts = describe(row)
            if "prompt" in record:
                known = {key: record.get(key) for key in facts}
            else:
                known = facts | {"id": record["id"]} | ({"answer": record["answer"]} if row.choices else {})
                if self.config.mode == "answers":
                    facts, known = facts | compare(record["text"], row), known | {key: record[key] for key in _COMPARED}
            if known != facts:
                raise self._other_items(items.name, folder)
            described.append(record | facts)
        return described

    def _other_items(self, name: str, folder: str | None) -> EvaluationError:
        return EvaluationError(
            f"the items of {name} in {folder} are others than those that are read now: other models can't read all of "
            "them, or another version of this package read the data otherwise. Choose another folder, without reuse."
        )

    def answer(self, items: Items, progress: OnProgress | None) -> None:
        """Let all systems answer all items of a source, batch by batch."""
        total, size = len(items.rows), self.config.batch_size
        labels = {name: self._label(name) for name in items.systems}
        done = {name: self.journal.done(items.name, label, total) for name, label in labels.items()}
        for start in range(min(done.values(), default=total), total, size):
            part = items.rows[start : start + size]
            # a derangement needs two items; only the first is counted
            batch = part if len(part) > 1 else [*part, items.rows[start - 1]]
            for name, label in labels.items():
                if done[name] <= start:
                    answers = self._answerer(name).answer(batch)
                    records = [describe(row) | answer for row, answer in zip(part, answers, strict=False)]
                    self.journal.add(items.name, label, records)
            if progress is not None:
                progress(items.name, min(start + size, total), total)

    def measure(self, items: Items, progress: OnProgress | None) -> None:
        """Answer some items one by one, all systems in turn, and record the cost of each answer."""
        rows, source = items.rows[: self.config.timed], TIMED + items.name
        for index, row in enumerate(rows):
            for name in self._timed:
                if len(self._records(source, name)) > index:
                    continue
                if index == 0:
                    self._answerer(name).measure(row)  # to warm up
                cost = {key: round(value, 5) for key, value in self._answerer(name).measure(row).items()}
                self.journal.add(source, self._label(name), [{"id": row.id} | cost])
            if progress is not None:
                progress(source, index + 1, len(rows))

    def result(self, items: Sequence[Items], dev: Sequence[Items]) -> dict[str, Any]:
        """Compute all numbers, over all items and per source."""
        scores = [self._scores(part) for part in items]
        facts = {ROUTER: self._route(scores, items, dev)} if ROUTER in self.config.systems else {}
        result = self._numbers(_joined(scores), items)
        if len(items) > 1:
            parts = zip(items, scores, strict=True)
            result["sources"] = {part.name: self._numbers(found, [part]) for part, found in parts}
        return result | facts

    def reused(self, items: Sequence[Items]) -> dict[str, str]:
        """Return the systems whose answers were taken over, with the fuser of that evaluation."""
        firsts = {name: self._records(part.name, name)[0] for part in items for name in part.systems}
        return {name: record["reused"] for name, record in firsts.items() if "reused" in record}

    def _scores(self, items: Items) -> Scores:
        return {
            name: [
                _scores_of(record, row, self.config.mode)
                for record, row in zip(self._records(items.name, name), items.rows, strict=True)
            ]
            for name in items.systems
        }

    def _route(self, scores: Sequence[Scores], items: Sequence[Items], dev: Sequence[Items]) -> dict[str, Any]:
        """Add the router's scores to those of each source, and return facts about its rule."""
        known = _joined([self._scores(part) for part in dev])
        receiver, sharer = ([next(iter(one.values())) for one in known[name]] for name in ("receiver", "sharer"))
        asked, rows = ([row for part in some for row in part.rows] for some in (dev, items))
        features = embed(self.pair.receiver, asked), embed(self.pair.receiver, rows)
        chosen, facts = route(np.subtract(sharer, receiver), *features, self.config.routed)
        names = iter(chosen)
        for part in scores:
            part[ROUTER] = [part[next(names)][index] for index in range(len(part["receiver"]))]
        return facts

    def _numbers(self, scores: Scores, items: Sequence[Items]) -> dict[str, Any]:
        seed, compared = self.config.seed, {name: scores[name] for name in self.config.systems}
        key, *further = compared[self.config.systems[0]][0]
        columns = {name: [one[key] for one in part] for name, part in compared.items()}
        result = summarise(columns, seed, percent=self.config.mode != "nll", key=key)
        costs = {
            name: [cost for part in items for cost in self._records(TIMED + part.name, name)] for name in self._timed
        }
        for name, system in result["systems"].items():
            system |= {key: round(100 * sum(one[key] for one in scores[name]) / result["n"], 3) for key in further}
            system |= mean_costs(costs[name]) if costs.get(name) else {}
        return result | speed(costs, seed)

    def _label(self, name: str) -> str:
        return self._labels.get(name, name)

    def _records(self, source: str, name: str) -> list[Record]:
        return self.journal.records(source, self._label(name))


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
    left_out = {key: count for key, count in dropped.items() if key.startswith(f"{name}: ")}
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    mode = pair.config.mode
    if len(kept) < 2:
        raise EvaluationError(
            f"{name}: {len(kept)} items are left to evaluate; at least 2 are needed, one for another's deranged cache. "
            f"{f'Left out: {left_out}. ' if left_out else ''}Give more questions, or a higher limit or lower skip."
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


def _scores_of(record: Record, row: Row, mode: str) -> dict[str, float]:
    if mode == "nll":
        return {"mean": record["nll"]}
    if mode == "answers":  # containment from the text, since a journal may be older than this score
        return {"f1": record["f1"], "exact": record["exact"], "holds": contains(record["text"], row.references)}
    return {"accuracy": float(record["chosen"] == record["answer"])}


def _joined(parts: Sequence[Scores]) -> Scores:
    """Join each system's scores over several sources."""
    return {name: [score for part in parts for score in part[name]] for name in parts[0]}
