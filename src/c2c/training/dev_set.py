"""Scoring a dev set, which the checkpoint is selected by: accuracy and pairing gain, never the loss alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from c2c.training.objective import Message, Objective, answered_right, cross_entropy


@dataclass(frozen=True)
class DevScore:
    """Accuracy on a dev set, in percent; for open answers the share of greedily right response tokens.

    Attributes:
        n: examples.
        receiver: the receiver alone.
        matched: with the own sharer cache; of an adapter, with the adapter.
        deranged: with another example's cache; None for an adapter.
        loss: mean loss, with the own cache.
    """

    n: int
    receiver: float
    matched: float
    deranged: float | None
    loss: float

    @property
    def pairing(self) -> float:
        """P = matched - deranged, in points; 0 for an adapter."""
        return 0.0 if self.deranged is None else self.matched - self.deranged

    @property
    def value(self) -> float:
        """What checkpoints are selected by: accuracy, minus what another example's message would give as well."""
        return self.matched + min(self.pairing, 0.0) + 0.5 * self.pairing

    def to_dict(self) -> dict[str, float]:
        """Plain data, for ``dev.json``."""
        common = {"loss": self.loss, "G": self.matched - self.receiver, "value": self.value}
        found = {"n": self.n, "receiver": self.receiver}
        if self.deranged is None:
            return found | {"adapter": self.matched} | common
        return found | {"matched": self.matched, "deranged": self.deranged} | common | {"P": self.pairing}


class DevSet:
    """Dev examples, scored again and again; the receiver alone only once, since it does not change.

    Args:
        examples: the examples.
        batch_size: examples at a time; a deranged cache comes from the same batch.

    Attributes:
        receiver: accuracy of the receiver alone, once it is known.
    """

    def __init__(self, examples: Sequence[Any], batch_size: int) -> None:
        self.examples, self.batch_size = list(examples), batch_size
        self.receiver: float | None = None

    @torch.no_grad()
    def score(self, objective: Objective) -> DevScore:
        """Score an objective's parameters as they are now."""
        was_training = objective.training
        objective.eval()
        messages: list[Message] = ["matched"]
        messages += ["deranged"] if objective.has_sharer else []
        messages += ["none"] if self.receiver is None else []
        right, loss, n = dict.fromkeys(messages, 0.0), 0.0, len(self.examples)
        for start in range(0, n, self.batch_size):
            for part in objective.micro_batches(self.examples[start : start + self.batch_size]):
                counted = len(part)
                if counted == 1 and objective.has_sharer and n > 1:
                    part = [*part, self.examples[0]]  # a derangement needs two; only the first is counted
                batch = objective.collate(part)
                for message in messages:
                    logits = objective.logits(batch, message)
                    right[message] += sum(answered_right(logits, part)[:counted])
                    if message == "matched":
                        losses = (cross_entropy(logits, batch.responses) * batch.weights).sum(-1)
                        loss += float(losses[:counted].sum())
        objective.train(was_training)
        accuracy = {message: 100 * hits / n for message, hits in right.items()}
        if self.receiver is None:
            self.receiver = accuracy["none"]
        return DevScore(n, self.receiver, accuracy["matched"], accuracy.get("deranged"), loss / n)
