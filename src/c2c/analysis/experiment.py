"""Experiment: a fuser, its models and the items that it is analysed on; and the files of a result."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Cache, DynamicCache

from c2c import kv_cache
from c2c.analysis.capture import LayerCapture, capture_layers, only_fuser
from c2c.analysis.config import AnalysisConfig, AnalysisError
from c2c.data.config import DataSource
from c2c.data.formats import Row
from c2c.data.sources import load_rows
from c2c.evaluation.statistics import summarise
from c2c.fusers.base import fuser_hash, training_facts
from c2c.fusion import Source
from c2c.model import C2CModel
from c2c.prefill import continued_logits
from c2c.training.examples import build_examples
from c2c.training.objective import answered_right
from c2c.training.prefill_store import PrefillStore
from c2c.training.shared_context import SharedBatch, SharedContextObjective
from c2c.utils import (
    OnProgress,
    check_writable,
    command,
    file_hash,
    install_command,
    short_path,
    versions,
    write_json,
    write_text,
)

_UNLIMITED = 10**9
# Where files lie and what runs the models: neither makes it another analysis.
_NOT_COMPARED = ("output_dir", "store_dir", "store_budget_gb", "fuser", "model", "data", "shots_data", "device_map")

Measure = Callable[..., dict[str, Any]]


class Scores(NamedTuple):
    """Answers of several caches: ``items``, 1 or 0 for each; their accuracies in ``systems``; ``G`` and ``P``."""

    items: dict[str, list[float]]
    systems: dict[str, dict[str, Any]]
    gains: dict[str, dict[str, Any]]


class Experiment:
    """Load a fuser with its models, and the items that it is analysed on.

    The sharer's weights are given back where all its prefills are stored, except with ``needs_sharer``.

    Attributes:
        examples: the items as both models' tokens, at least two.
        dropped: how many items the pair can't read, by reason.

    Raises:
        AnalysisError: no data file, several sharers, a fuser of private context, or fewer than two items left.
        C2CError: a model or fuser that can't be loaded.
    """

    def __init__(
        self, config: AnalysisConfig, progress: OnProgress | None = None, *, needs_sharer: bool = False
    ) -> None:
        if config.store_dir is not None:
            check_writable(Path(config.store_dir).expanduser(), "store_dir", AnalysisError)
        rows = load_items(config.data, config.form, config.limit, config.seed)
        models = {name: getattr(config, name) for name in ("receiver", "sharer", "dtype", "device_map")}
        self.config, self._progress = config, progress
        self.model = C2CModel.from_pretrained(config.fuser, **models)
        self.fuser = only_fuser(self.model.fusers, config.fuser)
        self.receiver, self.sharer = self.model.receiver, self.model.sharers[0]
        longest = self.receiver.context_length or _UNLIMITED
        self.examples, self.dropped = build_examples(self.model, rows, longest, _UNLIMITED)
        check_items(len(self.examples), config.data, self.dropped)
        folder = Path(config.store_dir).expanduser() if config.store_dir is not None else None
        store: dict[str, Any] = {
            "folder": folder,
            "budget": int(config.store_budget_gb * 5e8) if folder else 0,
            "batch": 4,
        }
        ours = PrefillStore(self.receiver, range(self.receiver.geometry.layers), **store)
        theirs = PrefillStore(self.sharer, self.fuser.config.source_layers, **store)
        self._objective = SharedContextObjective(self.model, ours, theirs).eval()
        if folder and not needs_sharer and all(example.sharer_ids in theirs for example in self.examples):
            self.sharer.release()

    def batches(self, stage: str) -> Iterator[SharedBatch]:
        """Yield the items with their prefills, at least two at a time: deranged needs another item's cache."""
        total = len(self.examples)
        starts = list(range(0, total, self.config.batch_size))
        if total - starts[-1] == 1:
            starts.pop()
        for start, stop in zip(starts, [*starts[1:], total], strict=True):
            yield self._objective.collate(self.examples[start:stop])
            if self._progress is not None:
                self._progress(stage, stop, total)

    @torch.no_grad()
    def fuse(self, batch: SharedBatch, message: Any = "matched", **changes: Any) -> DynamicCache:
        """Return the receiver's cache of all prompt tokens but the last, fused with a message of the sharer.

        Messages: ``matched``, ``deranged`` (another item's), ``zero``, ``none``. ``changes`` are fields of the batch,
        such as ``sharer_cache``, that are replaced; ``batch`` stays as it is.
        """
        return self._objective.fused(replace(batch, **changes), message)

    def captures(self, stage: str, layers: Sequence[int] | None = None) -> Iterator[LayerCapture]:
        """Yield the captures of each batch, all fused layers of one batch after the other; ``layers`` selects some."""
        for batch in self.batches(stage):
            source = Source(self.sharer, batch.sharer, batch.sharer_cache, self.fuser)
            caches = batch.receiver_cache, self.fuse(batch)
            for capture in capture_layers(self.receiver, batch.receiver, source, batch.matched, *caches):
                if layers is None or capture.layer in layers:
                    yield capture

    def controls(self, batch: SharedBatch) -> Iterator[tuple[str, Cache]]:
        """Yield the receiver's own cache, and those fused with the right message, a wrong one, and zeros."""
        yield "receiver", batch.receiver_cache
        for message in ("matched", "deranged", "zero"):
            yield message, self.fuse(batch, message)

    def score(self, variants: Callable[[SharedBatch], Iterable[tuple[str, Cache]]], matched: str = "matched") -> Scores:
        """Answer all items from each cache that ``variants`` yields for a batch; ``matched`` is what gains are of."""
        items: dict[str, list[float]] = defaultdict(list)
        for batch in self.batches("answering"):
            for name, cache in variants(batch):
                items[name].extend(self.answer(batch, cache))
        summary = summarise(items | {"matched": items[matched]}, self.config.seed)
        return Scores(items, summary["systems"], gains(summary))

    @torch.no_grad()
    def answer(self, batch: SharedBatch, cache: Cache) -> list[float]:
        """Return 1 for each item whose right option has the largest logit where the answer names it, else 0.

        ``cache`` is of all prompt tokens but the last, and stays as it is.
        """
        read = batch.responses[:, : max(example.decisive for example in batch.examples)]
        own = kv_cache.view(cache)  # decoding replaces its tensors, not those of ``cache``
        logits = continued_logits(self.receiver.model, batch.receiver, read.clamp_min(0), read != -100, own)
        return answered_right(logits, batch.examples)

    def facts(self, **options: Any) -> dict[str, Any]:
        """Return ``n``, ``dropped`` and ``provenance``, with ``options`` in place of those in the config."""
        config = asdict(self.config)
        own = sorted(config.keys() - {one.name for one in fields(AnalysisConfig)})
        facts = {
            "fuser": fuser_hash(self.config.fuser),
            "training": training_facts(self.fuser),
            "receiver": self.receiver.identity.to_dict(),
            "sharer": self.sharer.identity.to_dict(),
            "options": {name: config.pop(name) for name in own} | options,
        }
        about = provenance(facts, config, [self.config.data])
        return {"n": len(self.examples), "dropped": dict(self.dropped), "provenance": about}


def load_items(path: str, form: str, limit: int | None, seed: int, exclude: frozenset[str] = frozenset()) -> list[Row]:
    """Draw items of a JSONL file; raise AnalysisError where there is no such file."""
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise AnalysisError(
            f'no such data file: {path}. Expected JSON lines with "question", "choices" and "answer" (the index of '
            "the right choice)."
        )
    if limit == 0:
        return []
    return load_rows([DataSource(str(file), form=form, limit=limit)], Path(), seed, exclude)[0]


def check_items(count: int, data: str, dropped: Mapping[str, int]) -> None:
    """Raise AnalysisError, with the reasons, where fewer than two items are left."""
    if count < 2:
        reasons = f" (dropped: {dict(dropped)})" if dropped else ""
        raise AnalysisError(f"{data}: {count} items are left to analyse{reasons}; at least 2 are needed.")


def analysis(name: str) -> Callable[[Measure], Measure]:
    """Make a function ``(config, progress=None) -> numbers`` an analysis that writes its result.

    With ``config.output_dir`` the numbers go to ``NAME.json`` and a plot to ``NAME.svg``, each whole or not at all.
    Numbers whose name starts with ``_`` are for the plot alone. Returned are the numbers with ``analysis`` (its name)
    and, where files were written, ``files`` (their names) and ``caption``. A folder that can't be used raises
    AnalysisError before anything is computed.
    """

    def decorate(measure: Measure) -> Measure:
        @wraps(measure)
        def run(config: Any, progress: OnProgress | None = None) -> dict[str, Any]:
            folder = None if config.output_dir is None else Path(config.output_dir).expanduser()
            if folder is not None:
                check_drawing()
                check_writable(folder, "output_dir", AnalysisError)
            numbers = measure(config, progress)
            result = {"analysis": name} | {key: value for key, value in numbers.items() if not key.startswith("_")}
            if folder is not None:
                from c2c.analysis.plots import plot_analysis  # imports matplotlib

                plot = plot_analysis(name, numbers)
                result |= {"caption": plot.caption, "files": [f"{name}.json", f"{name}.svg"]}
                write_text(folder / f"{name}.svg", plot.svg())
                write_json(folder / f"{name}.json", result)
            return result

        return run

    return decorate


def check_drawing() -> None:
    """Raise AnalysisError where matplotlib or scikit-learn, which plots need, is not installed."""
    modules = {"matplotlib": "matplotlib", "scikit-learn": "sklearn"}
    if missing := [name for name, module in modules.items() if find_spec(module) is None]:
        raise AnalysisError(
            f"plots need {' and '.join(missing)}: {install_command('analysis')}. Numbers alone (c2c analyze without "
            "--output-dir, c2c inspect without --plot) do not."
        )


def provenance(facts: Mapping[str, Any], config: Mapping[str, Any], files: Sequence[str]) -> dict[str, Any]:
    """Collect what is needed to repeat an analysis.

    Returns:
        ``facts``; ``data``, hashes of ``files``; ``config`` without what can't change the numbers; ``key``, a hash of
        these; ``command`` and ``versions``.
    """
    compared = {
        **facts,
        "data": {short_path(name): file_hash(Path(name).expanduser()) for name in files},
        "config": {name: value for name, value in config.items() if name not in _NOT_COMPARED},
    }
    key = hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()
    return compared | {"key": key, "command": command(), "versions": versions()}


def difference(first: Sequence[float], second: Sequence[float], seed: int) -> dict[str, Any]:
    """Return first minus second on the same items: ``points`` and their 95 % paired bootstrap interval ``ci95``."""
    return gains(summarise({"matched": first, "receiver": second}, seed))["G"]


def gains(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return ``G`` and ``P`` of a summary, those that it has, as ``points`` and ``ci95``."""
    return {
        letter: {"points": summary[letter], "ci95": summary[f"{letter}_ci95"]} for letter in "GP" if letter in summary
    }
