"""Choosing a checkpoint: accuracy and pairing gain on a dev set, never the loss alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from c2c.training.examples import Example
from c2c.training.step import FuserTraining, Message


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


@torch.no_grad()
def score(training: FuserTraining, examples: Sequence[Example], batch_size: int) -> DevScore:
    """Score a fuser on dev examples."""
    was_training = training.training
    training.eval()
    right: dict[Message, float] = {"none": 0.0, "matched": 0.0, "deranged": 0.0}
    loss = 0.0
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        if len(part) == 1 and len(examples) > 1:
            part = [*part, examples[0]]  # a derangement needs two; only the first is counted
        counted = min(batch_size, len(examples) - start)
        batch = training.collate(part)
        for message in right:
            right[message] += sum(_right(training, batch, message)[:counted])
        loss += float(training.losses(batch, "matched")[:counted].sum())
    training.train(was_training)
    n = len(examples)
    percent = {message: 100 * count / n for message, count in right.items()}
    return DevScore(n, percent["none"], percent["matched"], percent["deranged"], loss / n)


def _right(training: FuserTraining, batch: object, message: Message) -> list[float]:
    logits = training.logits(batch, message)  # type: ignore[arg-type]
    scores = []
    for row, example in enumerate(batch.examples):  # type: ignore[attr-defined]
        if example.choice_ids:
            best = int(logits[row, example.decisive, example.choice_ids].argmax())
            scores.append(float(best == example.row.answer))
        else:
            length = len(example.response_ids)
            hits = logits[row, :length].argmax(-1).cpu() == torch.tensor(example.response_ids)
            scores.append(float(hits.float().mean()))
    return scores
