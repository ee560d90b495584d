"""What to evaluate: a fuser, items, systems and how answers are read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from c2c.errors import C2CError
from c2c.training.config import DataSource

SYSTEMS = ("receiver", "sharer", "matched", "deranged", "zero")
MODES = ("logits", "generate", "nll")


class EvaluationError(C2CError, ValueError):
    """An evaluation that can't be run as asked."""


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation.

    Attributes:
        fuser: folder or hub id.
        data: the items; multiple choice, or rows with a reference answer for ``nll``.
        systems: any of ``receiver`` (alone), ``sharer`` (alone), ``matched``, ``deranged`` (the sharer cache of
            another item) and ``zero`` (a sharer cache of zeros).
        mode: ``logits`` compares the options' tokens at the place of the letter, ``generate`` decodes and reads the
            letter from the text, ``nll`` measures the reference answer, in nats per token.
        data_dir: folder that paths of the data start from.
        limit: at most this many items of each source, drawn with the seed.
        seed: of the draw and of the bootstrap.
        batch_size: items at a time; a deranged cache comes from the same batch.
        max_new_tokens: in ``generate`` mode.
        receiver: in place of the recorded receiver.
        sharer: in place of the recorded sharer.
        output_dir: where per-item outputs and the result go; an unfinished run there is resumed. None writes nothing.
        store_dir: folder of a prefill store to use and to fill; None keeps nothing.
        store_budget_gb: size of that store.
        dtype: of the models.
        device_map: as in ``from_pretrained``.
    """

    fuser: str
    data: list[DataSource]
    systems: tuple[str, ...] = SYSTEMS
    mode: str = "logits"
    data_dir: str = "."
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    max_new_tokens: int = 32
    receiver: str | None = None
    sharer: str | None = None
    output_dir: str | None = None
    store_dir: str | None = None
    store_budget_gb: float = 20.0
    dtype: str | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be run.

        Raises:
            EvaluationError: an unknown system or mode, no data, or numbers out of range.
        """
        unknown = [system for system in self.systems if system not in SYSTEMS]
        if unknown or not self.systems:
            raise EvaluationError(f"unknown systems {unknown}. Known: {', '.join(SYSTEMS)}.")
        if self.mode not in MODES:
            raise EvaluationError(f"unknown mode {self.mode!r}. Known: {', '.join(MODES)}.")
        if self.mode == "nll" and "sharer" in self.systems:
            raise EvaluationError(
                "mode 'nll' compares losses over the receiver's tokens, which the sharer does not share: leave "
                "'sharer' out of the systems."
            )
        if not self.data:
            raise EvaluationError("no data to evaluate on: give at least one file.")
        if self.batch_size < 2 or (self.limit is not None and self.limit < 1):
            raise EvaluationError(
                f"batch_size is {self.batch_size} (at least 2: a deranged cache is another item's) and limit "
                f"{self.limit} (at least 1)."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for result files."""
        return dataclasses.asdict(self)
