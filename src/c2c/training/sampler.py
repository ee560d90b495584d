"""The order of examples: random, with responses of similar length in one batch, so that little goes into padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_POOL = 16  # batches that are sorted among themselves


class LengthGroupedSampler(Sampler[int]):
    """Indices of all examples, batch after batch; a function of seed and epoch alone, so that a resumed run repeats it.

    The sampler of transformers draws from the global generator, and so depends on what ran before.

    Args:
        lengths: length of each example's response.
        batch: examples per step, over all processes.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Move to another epoch's order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=draw).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), _POOL * self.batch):
            pool = sorted(order[start : start + _POOL * self.batch], key=lambda index: self.lengths[index])
            batches += [pool[i : i + self.batch] for i in range(0, len(pool), self.batch)]
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch else []  # dropped by the loader
        for index in torch.randperm(len(batches), generator=draw).tolist():
            yield from batches[index]
        for batch in last:
            yield from batch
