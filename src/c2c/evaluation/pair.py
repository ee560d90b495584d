"""A pair under evaluation: its models, its prefill stores, and items as its fusers read them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from c2c.data.formats import Row
from c2c.evaluation.config import EvalConfig, EvaluationError
from c2c.fusers import Fuser
from c2c.fusers.base import load_fuser
from c2c.language_model import LanguageModel, Sharer
from c2c.model import C2CModel
from c2c.training.drafts import Drafts
from c2c.training.examples import build_examples
from c2c.training.objective import FuserObjective
from c2c.training.prefill_store import PrefillStore
from c2c.training.private_context import PrivateContextObjective
from c2c.training.shared_context import SharedContextObjective

_UNLIMITED = 10**9


class Pair:
    """One receiver with one sharer, and their prefills of all layers (a model alone needs them all).

    Args:
        model: the pair with its fuser.
        config: where its store lies and how large it may be.

    Raises:
        EvaluationError: the model has several sharers.
    """

    def __init__(self, model: C2CModel, config: EvalConfig) -> None:
        if len(model.sharers) != 1:
            raise EvaluationError(
                f"{config.fuser} has {len(model.sharers)} sharers; one is evaluated at a time: give one of its fusers."
            )
        self.model, self.config = model, config
        self.sharer = model.sharers[0]
        self.stores = (_store(model.receiver, config), _store(self.sharer, config))
        self.drafts = Drafts(self.stores[1], self.sharer)
        self.training = self._through(model)
        self._last: tuple[list[Row], Any] | None = None

    @classmethod
    def open(cls, config: EvalConfig) -> Pair:
        """Load the fuser with the models that it names."""
        model = C2CModel.from_pretrained(
            config.fuser,
            receiver=config.receiver,
            sharer=config.sharer,
            dtype=config.dtype,
            sharer_dtype=config.sharer_dtype,
            device_map=config.device_map,
        )
        return cls(model, config)

    def examples(self, rows: Sequence[Row]) -> tuple[Sequence[Any], Counter[str]]:
        """Rows as this pair reads them, and how many do not fit, by reason."""
        longest = self.model.receiver.context_length or _UNLIMITED
        return build_examples(self.model, rows, longest, _UNLIMITED)

    def batch(self, rows: Sequence[Row]) -> Any:
        """Rows with their stored caches; the last batch is kept, since several systems answer it in turn.

        Raises:
            EvaluationError: a row does not fit this pair.
        """
        if self._last is None or self._last[0] != list(rows):
            examples, dropped = self.examples(rows)
            if dropped:
                raise EvaluationError(f"{self.sharer.name} can't read some items that the other systems can: {dropped}")
            self._last = (list(rows), self.training.collate(examples))
        return self._last[1]

    def untrained(self) -> FuserObjective:
        """The same pair with a new fuser of the same shape."""
        fuser: Fuser = self.model.fusers[0]  # type: ignore[assignment]
        torch.manual_seed(self.config.seed)
        config = copy.deepcopy(fuser.config)
        config.training = None
        return self._through(C2CModel(self.model.receiver, [self.sharer], [type(fuser)(config)]))

    def with_fuser(self, folder: str) -> tuple[Pair, FuserObjective]:
        """The same receiver through another fuser, and the pair whose batches that fuser reads.

        That is this pair where the fuser has the same sharer and token alignment. The sharer may be the receiver
        itself, or another model, which is loaded.
        """
        fuser = load_fuser(folder, dtype=torch.float32)
        model = C2CModel(self.model.receiver, [self._sharer_of(fuser, folder)], [fuser])
        same = model.sharers[0] is self.sharer and model.aligner.to_dict() == self.model.aligner.to_dict()
        if same:
            return self, self._through(model)
        other = Pair(model, self.config)
        return other, other.training

    def _sharer_of(self, fuser: Fuser, folder: str) -> Sharer:
        recorded = fuser.config.identity("sharer")
        if recorded is None:
            raise EvaluationError(f"{folder} does not say which sharer it was made for.")
        if recorded.weights == self.sharer.identity.weights:
            return self.sharer
        receiver = self.model.receiver
        if recorded.weights == receiver.identity.weights:
            return Sharer(receiver.model, receiver.tokenizer, receiver.name)
        dtype = self.config.sharer_dtype or self.config.dtype
        return Sharer.from_pretrained(recorded.name, dtype=dtype, device_map=self.config.device_map)

    def _through(self, model: C2CModel) -> FuserObjective:
        model.fusers.to(model.receiver.device).eval()
        kind = PrivateContextObjective if model.private else SharedContextObjective
        return kind(model, *self.stores).eval()


def _store(model: LanguageModel, config: EvalConfig) -> PrefillStore:
    folder = Path(config.store_dir) if config.store_dir is not None else None
    budget = int(config.store_budget_gb * 5e8) if folder is not None else 0
    return PrefillStore(model, range(model.geometry.layers), folder=folder, budget=budget, batch=4)
