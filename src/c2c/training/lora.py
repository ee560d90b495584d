"""The control of a fuser: a LoRA adapter of equal size in the receiver alone, trained on the same rows.

The rows, their order, the batches and the loss weights are those of the fuser's run. An adapter changes every layer,
so that no prefill can be stored: each step runs the receiver over whole sequences.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from c2c.alignment import SpanAligner
from c2c.config import ConfigError
from c2c.errors import CacheError
from c2c.fusers import family
from c2c.language_model import LanguageModel, Receiver
from c2c.layer_map import layer_map
from c2c.sharer import Sharer
from c2c.systems.lora import nearest_rank, new_adapter, restore_adapter, save_adapter, trainable
from c2c.training.config import TrainConfig
from c2c.training.examples import Example
from c2c.training.objective import Batch, Message, Objective, targets

log = logging.getLogger("c2c.training")


class AdapterObjective(Objective):
    """The receiver with its adapter; ``matched`` is the fuser whose size it has: ``family`` and ``parameters``."""

    kind = "adapter"
    has_sharer = False

    def __init__(self, adapter: Any, receiver: LanguageModel, matched: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.adapter, self.receiver, self.matched = adapter.eval(), receiver, matched or {}

    def train(self, mode: bool = True) -> AdapterObjective:
        """Record the mode; the receiver stays in ``eval()`` as it does beside a fuser."""
        self.training = mode
        return self

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad; the question is the whole prompt."""
        return Batch(**targets(examples, self.device, [0] * len(examples)))

    def prompt_cache(self, batch: Batch, message: Message) -> tuple[None, Tensor]:
        """Return no cache; see :meth:`Objective.prompt_cache`."""
        return None, batch.question.mask[:, :0]

    def logits(self, batch: Batch, message: Message = "matched") -> Tensor:
        """Compute logits of the response tokens, ``[batch, response, vocab]``; ``none`` turns the adapter off."""
        with self.adapter.disable_adapter() if message == "none" else contextlib.nullcontext():
            return super().logits(batch, message)

    def micro_batches(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        """Split a batch by length; on a CPU into small parts, which need little padding and memory."""
        size = len(examples)
        if self.device.type == "cpu":
            size = 1 if self.precision == "float32" else 4
        ordered = sorted(examples, key=lambda example: len(example.receiver_ids) + len(example.response_ids))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def summary(self) -> dict[str, Any]:
        """Return rank and size of the adapter, and the fuser that it matches."""
        rank = next(iter(self.adapter.peft_config.values())).r
        size = sum(parameter.numel() for parameter in trainable(self.adapter))
        return {"rank": rank, "parameters": size, "matched": self.matched}

    def save(self, folder: Path, record: dict[str, Any] | None = None) -> None:
        """Write the adapter."""
        facts = None if record is None else {"matched": self.matched, "training": record}
        save_adapter(self.adapter, self.receiver, folder, facts)

    def load(self, folder: Path) -> None:
        """Read the adapter's weights."""
        restore_adapter(self.adapter, folder)


def load_adapter_pair(config: TrainConfig) -> SimpleNamespace:
    """Load the receiver, and of the sharer the tokenizer and geometry, without its weights in memory.

    What is returned has the attributes that :func:`~c2c.training.examples.build_examples` takes.
    """
    receiver = Receiver.from_pretrained(config.receiver, dtype=config.dtype, device_map=config.device_map)
    sharer = None
    if not config.sharer.endswith(".gguf"):
        sharer = Sharer.from_pretrained(config.sharer, device_map="meta")
        try:
            _ = sharer.geometry
        except CacheError:  # it reads its own values while it runs, of which there are none without memory
            sharer = None
    if sharer is None:
        sharer = Sharer.from_pretrained(config.sharer)
        sharer.release()
    aligner = SpanAligner(cue=config.sharer_cue)
    return SimpleNamespace(receiver=receiver, sharers=[sharer], aligner=aligner, private=())


def make_adapter_objective(config: TrainConfig, pair: Any) -> AdapterObjective:
    """Add an adapter of the fuser's size to the receiver.

    Raises:
        ConfigError: the fuser is of private context. AdapterError: an impossible rank; ``peft`` is missing.
    """
    receiver, sharer = pair.receiver, pair.sharers[0]
    kind = family(config.adapter_of)
    if kind.context != "shared":
        raise ConfigError(
            f"adapter_of is {config.adapter_of!r}, a fuser of private context; there is no control for it, since its "
            "receiver has not read what an adapter would learn from."
        )
    layers = layer_map(config.layer_map, receiver.geometry.layers, sharer.geometry.layers)
    with torch.device("meta"):
        fuser = kind.from_geometry(sharer.geometry, receiver.geometry, layers, **config.fuser_options)
    size = sum(parameter.numel() for parameter in fuser.parameters())
    rank = nearest_rank(receiver.model, size) if config.adapter_rank is None else config.adapter_rank
    set_seed(config.seed)
    matched = {"family": config.adapter_of, "parameters": size}
    objective = AdapterObjective(new_adapter(receiver, rank), receiver, matched)
    log.info("adapter: %s", objective.summary())
    return objective
