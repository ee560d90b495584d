"""A fuser under analysis: its models, its items and their stored prefills, batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from c2c.analysis.provenance import fuser_facts, provenance
from c2c.analysis.settings import AnalysisError, Settings, source
from c2c.data.sources import load_rows
from c2c.fusers import Fuser
from c2c.language_model import LanguageModel
from c2c.model import C2CModel
from c2c.training.examples import SharedExample, build_examples
from c2c.training.prefill_store import PrefillStore
from c2c.training.shared_context import SharedBatch, SharedContextObjective
from c2c.utils import OnProgress

_UNLIMITED = 10**9


class Subject:
    """A fuser with its models and the items that it is looked at on.

    Attributes:
        settings: what was asked for.
        model: the pair.
        fuser: its only fuser.
        training: fuses batches of items from their stored prefills.
        examples: the items, at least two.
        dropped: how many items do not fit the pair, by reason.
    """

    def __init__(self, model: C2CModel, settings: Settings, read_again: bool = False) -> None:
        if len(model.sharers) != 1:
            raise AnalysisError(
                f"{settings.fuser} has {len(model.sharers)} sharers; one is analysed at a time: give one of its fusers."
            )
        self.model, self.settings = model, settings
        self.fuser: Fuser = model.fusers[0]  # type: ignore[assignment]
        if self.fuser.context != "shared":
            raise AnalysisError(
                f"{settings.fuser} is for {self.fuser.context} context (family {self.fuser.family!r}): it adds entries "
                "and merges none. What is analysed here are fusers that merge, such as 'bottleneck'."
            )
        ours = _store(model.receiver, range(model.receiver.geometry.layers), settings)
        theirs = _store(model.sharers[0], self.fuser.config.source_layers, settings)
        self.training = SharedContextObjective(model, ours, theirs).eval()
        rows, _ = load_rows([source(settings.data, settings.form, settings.limit)], Path(), settings.seed)
        limit = model.receiver.context_length or _UNLIMITED
        self.examples, self.dropped = build_examples(model, rows, limit, _UNLIMITED)
        check_items(len(self.examples), settings.data, self.dropped)
        if not read_again:
            self._release(theirs)

    @classmethod
    def open(cls, settings: Settings, read_again: bool = False) -> Subject:
        """Load the fuser with the models that it names.

        Args:
            settings: what was asked for.
            read_again: the sharer is needed, also where all its prefills are stored.

        Raises:
            AnalysisError: no data file, several sharers, a fuser that merges nothing, or fewer than two items that the
                pair can read.
            C2CError: a model or fuser that can't be loaded.
        """
        source(settings.data, settings.form, settings.limit)  # before the models are loaded
        model = C2CModel.from_pretrained(
            settings.fuser,
            receiver=settings.receiver,
            sharer=settings.sharer,
            dtype=settings.dtype,
            device_map=settings.device_map,
        )
        return cls(model, settings, read_again)

    def batches(self, stage: str, progress: OnProgress | None = None) -> Iterator[SharedBatch]:
        """The items with their caches, in batches of at least two; ``progress`` is told of each that is done."""
        done = 0
        for part in parts(self.examples, self.settings.batch_size):
            yield self.training.collate(part)
            done += len(part)
            if progress is not None:
                progress(stage, done, len(self.examples))

    def facts(self, **options: Any) -> dict[str, Any]:
        """What goes with the numbers: how many items, what was dropped, and where everything comes from.

        Args:
            **options: of the analysis, beside the settings.
        """
        facts = fuser_facts(self.settings.fuser, self.fuser) | {
            "receiver": self.model.receiver.identity.to_dict(),
            "sharer": self.model.sharers[0].identity.to_dict(),
            "options": options,
        }
        about = provenance(facts, self.settings, [self.settings.data])
        return {"n": len(self.examples), "dropped": dict(self.dropped), "provenance": about}

    def _release(self, store: PrefillStore) -> None:
        """Give the sharer's weights back where all its prefills are stored already."""
        if store.folder is not None and all(example.sharer_ids in store for example in self.examples):
            self.model.sharers[0].release()


def parts(examples: Sequence[SharedExample], size: int) -> list[Sequence[SharedExample]]:
    """Examples in batches of ``size``, the last one longer rather than a single item."""
    starts = list(range(0, len(examples), size))
    if len(starts) > 1 and len(examples) - starts[-1] == 1:
        starts.pop()
    stops = [*starts[1:], len(examples)]
    return [examples[start:stop] for start, stop in zip(starts, stops, strict=True)]


def check_items(count: int, data: str, dropped: Counter[str]) -> None:
    """Refuse fewer than two items.

    Raises:
        AnalysisError: fewer than two are left; says why.
    """
    if count < 2:
        reasons = f" (dropped: {dict(dropped)})" if dropped else ""
        raise AnalysisError(f"{data}: {count} items are left to analyse{reasons}; at least 2 are needed.")


def _store(model: LanguageModel, layers: Sequence[int], settings: Settings) -> PrefillStore:
    folder = Path(settings.store_dir).expanduser() if settings.store_dir is not None else None
    budget = int(settings.store_budget_gb * 5e8) if folder is not None else 0
    return PrefillStore(model, layers, folder=folder, budget=budget, batch=4)
