"""Choosing a checkpoint: accuracy and pairing gain on a dev set, never the loss alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from c2c.training.objective import Objective, cross_entropy


@dataclass(frozen=True)
class DevScore:
    """Accuracy on a dev set, in percent; for open answers the share of greedily right response tokens.

    Attributes:
        n: examples.
        receiver: the receiver alone.
        matched: with the own sharer cache.
        deranged: with another example's.
        loss: mean loss with the own cache.
    """

    n: int
    receiver: float
    matched: float
    deranged: float
    loss: float

    @property
    def gain(self) -> float:
        """G = matched - receiver, in points."""
        return self.matched - self.receiver

    @property
    def pairing(self) -> float:
        """P = matched - deranged, in points."""
        return self.matched - self.deranged

    @property
    def value(self) -> float:
        """What checkpoints are chosen by: accuracy, less what a wrong message would give as well."""
        return self.matched + min(self.pairing, 0.0) + 0.5 * self.pairing

    def to_dict(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self) | {"G": self.gain, "P": self.pairing, "value": self.value}


class DevSet:
    """Dev examples, scored again and again; the receiver alone only once, since it does not change.

    Args:
        examples: the examples.
        batch_size: examples at a time; a deranged cache comes from the same batch.
    """

    def __init__(self, examples: Sequence[Any], batch_size: int) -> None:
        self.examples, self.batch_size = list(examples), batch_size
        self._receiver: float | None = None

    @torch.no_grad()
    def score(self, training: Objective) -> DevScore:
        """Score a fuser as it is now."""
        was_training = training.training
        training.eval()
        right = {"none": 0.0, "matched": 0.0, "deranged": 0.0}
        loss = 0.0
        for start in range(0, len(self.examples), self.batch_size):
            part = self.examples[start : start + self.batch_size]
            counted = len(part)
            if counted == 1 and len(self.examples) > 1:
                part = [*part, self.examples[0]]  # a derangement needs two; only the first is counted
            batch = training.collate(part)
            matched = training.logits(batch, "matched")
            loss += float((cross_entropy(matched, batch.responses) * batch.weights).sum(-1)[:counted].sum())
            right["matched"] += sum(answered_right(matched, batch)[:counted])
            right["deranged"] += sum(answered_right(training.logits(batch, "deranged"), batch)[:counted])
            if self._receiver is None:
                right["none"] += sum(answered_right(training.logits(batch, "none"), batch)[:counted])
        training.train(was_training)
        n = len(self.examples)
        if self._receiver is None:
            self._receiver = 100 * right["none"] / n
        return DevScore(n, self._receiver, 100 * right["matched"] / n, 100 * right["deranged"] / n, loss / n)


def answered_right(logits: Tensor, batch: Any) -> list[float]:
    """For each example 1 if the best option is the right one; without options the share of tokens that are right."""
    scores = []
    for row, example in enumerate(batch.examples):
        if example.choice_ids:
            best = int(logits[row, example.decisive, example.choice_ids].argmax())
            scores.append(float(best == example.row.answer))
        else:
            length = len(example.response_ids)
            hits = logits[row, :length].argmax(-1).cpu() == torch.tensor(example.response_ids)
            scores.append(float(hits.float().mean()))
    return scores
