"""Several processes that train one fuser: who does what, and a sharer spread over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from c2c.language_model import LanguageModel

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together (``torchrun``, ``accelerate launch``).

    Attributes:
        index: which one this is.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that reports and writes."""
        return self.index == 0

    def part(self, items: Sequence[T]) -> list[T]:
        """This process's share. All shares are equally long, so some items may come twice."""
        if self.count == 1:
            return list(items)
        padded = [*items, *items[: -len(items) % self.count]]
        return padded[self.index :: self.count]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


def shard(model: LanguageModel) -> None:
    """Spread a frozen model's weights over all processes (FSDP2); each forward pass gathers one layer at a time.

    From now on all processes must run it in step.
    """
    from torch.distributed.fsdp import fully_shard

    _ = model.identity, model.geometry  # read from the whole weights
    decoder: Any = model.model.get_decoder()
    for layer in decoder.layers:
        fully_shard(layer)
    fully_shard(decoder)
