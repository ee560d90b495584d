"""Scoring a dev set, which the checkpoint is selected by: accuracy and pairing gain, never the loss alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from c2c.training.examples import Example
from c2c.training.objective import Message, Objective, answered_right, cross_entropy
from c2c.utils import write_json

log = logging.getLogger("c2c.training")


class DevSet:
    """Dev examples, scored again and again; the receiver alone only once, since it does not change.

    Args:
        examples: the examples.
        batch_size: examples at a time; a deranged cache comes from the same batch.

    Attributes:
        receiver: accuracy of the receiver alone, once it is known.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int) -> None:
        self.examples, self.batch_size = list(examples), batch_size
        self.receiver: float | None = None

    @torch.no_grad()
    def score(self, objective: Objective) -> dict[str, float]:
        """Score an objective's parameters as they are now.

        Returns:
            ``n`` examples; accuracy in percent (of open answers the share of greedily right response tokens) of the
            ``receiver`` alone, ``matched`` with the own and ``deranged`` with another example's cache, of an adapter
            in place of these ``adapter``; the mean ``loss`` with the own cache; ``G`` and ``P``, matched minus receiver
            and minus deranged; ``value``, which checkpoints are selected by: the accuracy, minus what another example's
            message would give as well.
        """
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
        self.receiver = accuracy.pop("none", self.receiver) or 0.0
        matched = accuracy["matched"]
        found = {"n": n, "receiver": self.receiver}
        gain = {"loss": loss / n, "G": matched - self.receiver}
        if not objective.has_sharer:
            return {**found, "adapter": matched, **gain, "value": matched}
        pairing = matched - accuracy["deranged"]
        value = matched + min(pairing, 0.0) + 0.5 * pairing
        return {**found, **accuracy, **gain, "value": value, "P": pairing}


class Selection(TrainerCallback):
    """Scores the dev set every so many steps, and passes the record of a new best to ``keep``.

    Scores are in ``dev.json`` in the folder; those from before a resume are read back.

    Attributes:
        scores: scores by step.
        log: logger of the Trainer, once there is one.
    """

    def __init__(
        self, objective: Objective, dev: DevSet, every: int, folder: Path, keep: Callable[[dict[str, Any]], None]
    ) -> None:
        self.objective, self.dev, self.every, self.keep = objective, dev, every, keep
        self.path = folder / "dev.json"
        self.scores: dict[str, dict[str, float]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        dev.receiver = next((entry["receiver"] for entry in self.scores.values()), None)
        self.log: Callable[[dict[str, float]], None] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score, where it is due."""
        due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if due and state.is_world_process_zero:
            due_to_log = control.should_log
            self.score(state.global_step)
            control.should_log = due_to_log  # writing the scores to the log cleared it, in this process alone

    def score(self, step: int) -> None:
        """Score the parameters as they are after ``step``, and keep them if they are the best so far."""
        entry = self.dev.score(self.objective)
        log.info("step %d: dev %s", step, {name: round(value, 2) for name, value in entry.items()})
        earlier = {at: score for at, score in self.scores.items() if int(at) < step}
        self.scores = earlier | {str(step): entry}
        if all(entry["value"] > score["value"] for score in earlier.values()):
            self.keep({"step": step, "dev": entry})
        write_json(self.path, self.scores)
        if self.log is not None:
            self.log({f"dev_{name}": value for name, value in entry.items()})

    @property
    def best(self) -> dict[str, Any]:
        """Step and score of the best parameters."""
        step, entry = max(self.scores.items(), key=lambda item: item[1]["value"])
        return {"step": int(step), "dev": entry}
