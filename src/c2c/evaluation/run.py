"""``evaluate``: every system on the same items, item by item on disk, and the numbers at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from c2c.data.config import DataSource
from c2c.data.formats import Row, load_rows
from c2c.evaluation.config import DERIVED, PRIVATE_SYSTEMS, SHARED_SYSTEMS, EvalConfig, EvaluationError
from c2c.evaluation.costs import with_memory
from c2c.evaluation.derived import abstain, route
from c2c.evaluation.journal import TIMED, Journal, Record
from c2c.evaluation.numbers import mean_costs, speed, summarise
from c2c.evaluation.pair import Pair
from c2c.evaluation.provenance import provenance, short
from c2c.evaluation.reuse import WITHOUT_FUSER, Earlier
from c2c.evaluation.systems import System, make_system
from c2c.evaluation.text_scores import holds
from c2c.fusers.base import fuser_hash
from c2c.utils import OnProgress, check_writable, file_hash, write_json

_DEV = "dev: "


@dataclass(frozen=True)
class Work:
    """Items that some systems answer.

    Attributes:
        name: of the source; dev sources begin with ``dev:``.
        rows: the items.
        systems: who answers them.
    """

    name: str
    rows: list[Row]
    systems: list[str]


def evaluate(config: EvalConfig, progress: OnProgress | None = None) -> dict[str, Any]:
    """Run all systems on all items.

    With ``output_dir`` each batch is written as soon as it is done, and a run that was stopped goes on from there;
    systems that were not asked for before are added.

    Args:
        config: what to evaluate.
        progress: called with (source, items done, items).

    Returns:
        The numbers of :func:`~c2c.evaluation.numbers.summarise` over all items, the same per source under
        ``sources`` where there are several; with ``timed``, what an answer costs beside each system's accuracy, and
        ``speed``; facts of ``router`` and ``abstain``; and under ``provenance`` all that is needed to repeat them.

    Raises:
        EvaluationError: the items don't suit the mode, or ``output_dir`` holds another evaluation.
        ConfigError: missing or broken data.
    """
    if config.output_dir is not None:
        check_writable(config.output_dir, "output_dir", EvaluationError)
    given = _rows(config.data, config), _rows(config.dev, config, limited=False)
    pair = Pair.open(config)
    _check_context(config, private=bool(pair.model.private))
    evaluation = _Evaluation(config, pair)
    items, dev = (evaluation.works(*rows, prefix) for rows, prefix in zip(given, ("", _DEV), strict=True))
    evaluation.start()
    for work in (*dev, *items):
        evaluation.take_over(work)
        evaluation.answer(work, progress)
    for work in items:
        evaluation.time(work, progress)
    result = evaluation.result(items, dev)
    if config.output_dir is not None:
        write_json(Path(config.output_dir) / "result.json", result)
    return result


class _Evaluation:
    """One evaluation under way."""

    def __init__(self, config: EvalConfig, pair: Pair) -> None:
        self.config, self.pair = config, pair
        self.dropped: dict[str, int] = {}
        self._systems: dict[str, System] = {}
        self._labels = {name: f"{name}@{fuser_hash(folder)[:12]}" for name, folder in config.fusers.items()}
        if config.adapter is not None:
            self._labels["adapter"] = f"adapter@{_adapter_hash(config.adapter)[:12]}"

    def start(self) -> None:
        """Open the journal; from here on files are written."""
        self.provenance = provenance(self.config, self.pair)
        size, reuse = self.config.batch_size, self.config.reuse
        self.earlier = None if reuse is None else Earlier(reuse, self.provenance, size)
        self.journal = Journal(self.config.output_dir, self.provenance["key"], size)

    def works(self, sources: Mapping[str, list[Row]], left_out: Mapping[str, int], prefix: str) -> list[Work]:
        """Items that the pair can read, and who answers them."""
        asked = [name for name in self.config.systems if name not in DERIVED]
        if prefix == _DEV:
            needed = {part for name in self.config.systems for part in DERIVED.get(name, ())}
            asked = [name for name in asked if name in needed]
        works = []
        self.dropped |= {f"{prefix}{reason}": count for reason, count in left_out.items()}
        for name, rows in sources.items():
            examples, reasons = self.pair.examples(rows)
            self.dropped |= {f"{prefix}{name}: {reason}": count for reason, count in reasons.items()}
            work = Work(prefix + name, [example.row for example in examples], asked)
            _check(work, self.config)
            works.append(work)
        return works

    def take_over(self, work: Work) -> None:
        """Take from an earlier evaluation what this fuser takes no part in, unless it has been answered here."""
        if self.earlier is None:
            return
        for name in work.systems:
            label = self._label(name)
            if (name in WITHOUT_FUSER or name in self.config.fusers) and not self.journal.done(
                work.name, label, len(work.rows)
            ):
                self.journal.add(work.name, label, self.earlier.answers(work.name, label, work.rows))

    def answer(self, work: Work, progress: OnProgress | None) -> None:
        """Let all systems answer all items of a source, batch by batch."""
        total, size = len(work.rows), self.config.batch_size
        done = {name: self.journal.done(work.name, self._label(name), total) for name in work.systems}
        for start in range(min(done.values(), default=total), total, size):
            part = work.rows[start : start + size]
            # a derangement needs two; only the first is counted
            asked = part if len(part) > 1 else [*part, work.rows[start - 1]]
            for name in work.systems:
                if done[name] <= start:
                    answers = self._system(name).answer(asked, self.config).records(len(part))
                    about = [{"id": row.id, "answer": row.answer} for row in part]
                    records = [facts | record for facts, record in zip(about, answers, strict=True)]
                    self.journal.add(work.name, self._label(name), records)
            if progress is not None:
                progress(work.name, min(start + size, total), total)

    def time(self, work: Work, progress: OnProgress | None) -> None:
        """Answer some items one by one, all systems in turn, and note what each answer takes."""
        rows, name = work.rows[: self.config.timed], TIMED + work.name
        timed = [system for system in work.systems if system in self._timed()]
        for index, row in enumerate(rows):
            for system in timed:
                label = self._label(system)
                if len(self.journal.records(name, label)) > index:
                    continue
                model = self._system(system)
                if index == 0:
                    model.cost(row, self.config)  # once to warm up
                cost = with_memory(lambda: model.cost(row, self.config), self.pair.model.receiver.device)  # noqa: B023
                self.journal.add(name, label, [{"id": row.id} | {key: round(v, 5) for key, v in cost.items()}])
            if progress is not None:
                progress(name, index + 1, len(rows))

    def result(self, items: Sequence[Work], dev: Sequence[Work]) -> dict[str, Any]:
        """All numbers."""
        records = {work.name: self._records(work) for work in items}
        facts = self._derive(records, items, dev)
        result = self._numbers(_joined(list(records.values())), items)
        if len(items) > 1:
            result["sources"] = {work.name: self._numbers(records[work.name], [work]) for work in items}
        reused = {
            name: answers[0]["reused"]
            for work in items
            for name in work.systems
            if "reused" in (answers := self.journal.records(work.name, self._label(name)))[0]
        }
        return result | facts | {"dropped": self.dropped, "provenance": self.provenance | {"reused": reused}}

    def _derive(
        self, records: dict[str, dict[str, list[Record]]], items: Sequence[Work], dev: Sequence[Work]
    ) -> dict[str, Any]:
        """Add the answers of derived systems to ``records``; what their rules are."""
        wanted = [name for name in self.config.systems if name in DERIVED]
        if not wanted:
            return {}
        known, known_rows = _joined([self._records(work) for work in dev]), [row for work in dev for row in work.rows]
        given, rows = _joined([records[work.name] for work in items]), [row for work in items for row in work.rows]
        facts = {}
        for name in wanted:
            if name == "router":
                made = route(self.pair.model.receiver, known, known_rows, given, rows, self.config.routed)
            else:
                made = abstain(known, given)
            facts[name] = made.facts
            rest = iter(made.records)
            for work in items:
                records[work.name][name] = [next(rest) for _ in work.rows]
        return facts

    def _records(self, work: Work) -> dict[str, list[Record]]:
        records = {name: self.journal.records(work.name, self._label(name)) for name in work.systems}
        if self.config.mode != "answers":
            return records
        return {  # from the texts, since a journal may be older than this score
            name: [
                given | {"holds": holds(given["text"], row.references)}
                for given, row in zip(one, work.rows, strict=True)
            ]
            for name, one in records.items()
        }

    def _numbers(self, records: Mapping[str, list[Record]], works: Sequence[Work]) -> dict[str, Any]:
        config = self.config
        result = self._scores(records)
        costs = {
            name: [cost for work in works for cost in self.journal.records(TIMED + work.name, self._label(name))]
            for name in self._timed()
        }
        for name, measured in costs.items():
            if measured:
                result["systems"][name] |= mean_costs(measured)
        return result | speed(costs, config.seed)

    def _scores(self, records: Mapping[str, list[Record]]) -> dict[str, Any]:
        config = self.config

        def column(key: str) -> dict[str, list[float]]:
            return {name: [record[key] for record in records[name]] for name in config.systems}

        if config.mode == "nll":
            return summarise(column("nll"), config.seed, percent=False)
        if config.mode == "answers":
            result = summarise(column("f1"), config.seed, key="f1")
            for key in ("exact", "holds"):
                for name, numbers in summarise(column(key), config.seed, key=key)["systems"].items():
                    result["systems"][name][key] = numbers[key]
            return result
        right = {
            name: [float(record["chosen"] == record["answer"]) for record in records[name]] for name in config.systems
        }
        return summarise(right, config.seed)

    def _timed(self) -> list[str]:
        """Systems whose answers cost something of their own; controls cost what matched does."""
        controls = ("deranged", "zero", "untrained", "draft_deranged", *DERIVED)
        asked = [name for name in self.config.systems if name not in controls]
        return asked if self.config.timed and self.config.mode != "nll" else []

    def _system(self, name: str) -> System:
        if name not in self._systems:
            self._systems[name] = make_system(name, self.pair, self.config)
        return self._systems[name]

    def _label(self, name: str) -> str:
        """A system in the journal; other weights under the same name are another system."""
        return self._labels.get(name, name)


def _rows(
    sources: Sequence[DataSource], config: EvalConfig, *, limited: bool = True
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """The rows of each source by its name, and how many were left out, by source and reason."""
    rows: dict[str, list[Row]] = {}
    left_out: dict[str, int] = {}
    for source in sources:
        if limited and config.limit is not None:
            source = replace(source, limit=config.limit)
        how = [source.form] * (source.form != "letter") + [f"{source.options} options"] * (source.options is not None)
        name = f"{short(source)} ({', '.join(how)})" if how else short(source)
        name = name if name not in rows else f"{name} #{len(rows)}"
        rows[name], reasons = load_rows([source], Path(config.data_dir), config.seed)
        left_out |= {f"{name}: {reason}": count for reason, count in reasons.items()}
    return rows, left_out


def _check(work: Work, config: EvalConfig) -> None:
    if len(work.rows) < 2:
        raise EvaluationError(
            f"{work.name}: {len(work.rows)} items are left to evaluate; at least 2 are needed, one for another's "
            "deranged cache. Give more questions, or a higher limit or lower skip."
        )
    if any(row.draft for row in work.rows):
        raise EvaluationError(f"{work.name}: draft is for training; in an evaluation ask for the system 'draft'.")
    if config.mode in ("logits", "generate") and not all(row.choices for row in work.rows):
        raise EvaluationError(
            f"{work.name}: mode {config.mode!r} needs multiple-choice items; use 'answers' or 'nll' for others."
        )
    if config.mode == "answers" and not all(row.references for row in work.rows):
        raise EvaluationError(f"{work.name}: mode 'answers' needs rows with a reference answer, such as questions.")


def _check_context(config: EvalConfig, private: bool) -> None:
    """Refuse systems and modes that the fuser's kind of context does not have."""
    wrong = [name for name in config.systems if name in (SHARED_SYSTEMS if private else PRIVATE_SYSTEMS)]
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
    if private and config.mode == "logits" and "sharer" in config.systems:
        raise EvaluationError("with private context the sharer alone answers in words: use mode 'answers'.")


def _joined(parts: Sequence[Mapping[str, list[Record]]]) -> dict[str, list[Record]]:
    """Each system's records over several sources."""
    names = parts[0] if parts else {}
    return {name: [record for part in parts for record in part[name]] for name in names}


def _adapter_hash(folder: str) -> str:
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise EvaluationError(f"{folder} holds no adapter ({path.name} is missing).")
    return file_hash(path)
