"""Training objectives: next-token loss on the responses, and the guard against another example's message."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from c2c import kv_cache
from c2c.fusers import Fuser
from c2c.fusers.base import AlignedEntries, load_fuser
from c2c.language_model import LanguageModel
from c2c.model import C2CModel
from c2c.prefill import logits_after
from c2c.tokens import TokenBatch, left_pad
from c2c.training.config import Precision
from c2c.training.examples import Example
from c2c.training.prefill_store import PrefillStore, stack

# The sharer cache of the example itself, of another one, zeros, or none at all: the receiver alone.
Message = Literal["matched", "deranged", "zero", "none"]


@dataclass(frozen=True)
class Batch:
    """Examples with their targets.

    Attributes:
        examples: the examples, in order.
        responses: ids to learn, ``[batch, response]``, right-padded with -100.
        weights: their loss weights, ``[batch, response]``, 0 on padding.
        question: the end of the receiver's prompt, which a step runs before the response, left-padded.
    """

    examples: Sequence[Example]
    responses: Tensor
    weights: Tensor
    question: TokenBatch


@dataclass(frozen=True)
class FuserBatch(Batch):
    """Examples with their stored caches, left-padded.

    Attributes:
        prefix: the receiver's tokens before the question, which are stored.
        receiver_cache: the receiver's cache of these.
        sharer: the sharer's prompts.
        sharer_cache: their cache; layers that the fuser does not read are empty.
    """

    prefix: TokenBatch
    receiver_cache: DynamicCache
    sharer: TokenBatch
    sharer_cache: DynamicCache


class Objective(nn.Module, ABC):
    """What the Trainer trains: parameters, and the loss of a batch of examples.

    Attributes:
        kind: name of what is trained, in summaries.
        has_sharer: whether there are messages of a sharer, so that a deranged one can be scored.
        precision: of the arithmetic, see :class:`~c2c.training.config.TrainConfig`.
        soft_targets: share of the sharer's own answer in the target of multiple choice.
        accepts_loss_kwargs: read by the Trainer.
    """

    kind: ClassVar[str]
    has_sharer: ClassVar[bool] = True
    accepts_loss_kwargs: ClassVar[bool] = False
    receiver: LanguageModel
    precision: Precision = "float32"
    soft_targets: float = 0.0

    @property
    def device(self) -> torch.device:
        """Device of the receiver, where everything is computed."""
        return self.receiver.device

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Any:
        """Pad examples to a :class:`Batch`, with whatever ``logits`` needs."""

    @abstractmethod
    def prompt_cache(self, batch: Any, message: Message) -> tuple[DynamicCache | None, Tensor]:
        """Return the receiver's cache before the question, with a message, and its mask; ``batch`` is not changed."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Return facts for the summary of a run."""

    @abstractmethod
    def save(self, folder: Path, record: dict[str, Any] | None = None) -> None:
        """Write what is trained, with the record of its training."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote."""

    def forward(self, examples: Sequence[Example], share: float = 1.0) -> dict[str, Tensor]:
        """Compute the mean loss of examples, times their ``share`` of a batch."""
        batch = self.collate(examples)
        # not the Trainer's own bf16, which would round the prefills of a step too, and those are stored
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return {"loss": share * self.loss(batch)}

    def loss(self, batch: Any) -> Tensor:
        """Compute the loss of a batch, a scalar."""
        return self.losses(batch, "matched").mean()

    def logits(self, batch: Any, message: Message = "matched") -> Tensor:
        """Compute the receiver's logits of the response tokens, ``[batch, response, vocab]``."""
        responses, read = batch.responses, batch.responses[:, :-1]
        cache, mask = self.prompt_cache(batch, message)
        ids = torch.cat([batch.question.ids, read.clamp_min(0)], dim=1)
        new = torch.cat([batch.question.mask, read != -100], dim=1)
        whole = torch.cat([mask, new], dim=1)
        model, keep, following = self.receiver.model, responses.shape[1], read.shape[1]
        if not self.receiver.separates(TokenBatch(whole.long(), whole, whole.long(), padded=True)):
            return logits_after(model, ids, whole, positions_after(mask, new), cache, keep, following)
        rows = []
        for row, (held, real) in enumerate(zip(mask, new, strict=True)):  # without any padding
            own = None if cache is None else kv_cache.select_columns(cache, row, held)
            count = int(real[-following:].sum()) if following else 0
            at = positions_after(held[held].unsqueeze(0), real[real].unsqueeze(0))
            logits = logits_after(model, ids[row : row + 1, real], None, at, own, count + 1, count)
            rows.append(nn.functional.pad(logits, (0, 0, 0, keep - count - 1)))
        return torch.cat(rows)

    def losses(self, batch: Any, message: Message) -> Tensor:
        """Compute the weighted loss of each example's response, with soft targets; ``[batch]``."""
        logits = self.logits(batch, message)
        losses = cross_entropy(logits, batch.responses)
        if self.soft_targets > 0:
            losses = soft_target_loss(losses, logits, batch.examples, self.soft_targets)
        weighted: Tensor = (losses * batch.weights).sum(-1)
        return weighted

    def micro_batches(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        """Split the examples of a step into parts that run at once; by default there is one part."""
        return [examples]

    def on_train_begin(self, steps: int) -> None:
        """Prepare for a training of ``steps`` optimizer steps."""

    def on_step(self, step: int) -> None:
        """Follow schedules; called before optimizer step ``step``, counted from 0."""


class FuserObjective(Objective):
    """A fuser with its two frozen models, of which only the fuser is a submodule.

    A step puts the fuser's message into the receiver's stored cache, and runs the receiver over the question and the
    response on top. The guard: with another example's message the loss must not be lower than the receiver's alone.

    Numbers are those of :class:`~c2c.training.config.TrainConfig`; the stores hold the prefills of each model.
    """

    kind = "fuser"
    model: C2CModel
    guard_weight: float = 0.0
    reconstruction_steps: int = 0
    reconstructing = False

    def __init__(self, model: C2CModel, receiver_store: PrefillStore, sharer_store: PrefillStore) -> None:
        super().__init__()
        self.fuser: Fuser = model.fusers[0]  # type: ignore[assignment]
        self.receiver = model.receiver
        self.__dict__["model"] = model  # not as a submodule: the frozen models are neither parameters nor saved
        self.receiver_store, self.sharer_store = receiver_store, sharer_store

    @abstractmethod
    def observe(self, examples: Sequence[Example], weighting: str = "none") -> Iterator[AlignedEntries]:
        """Yield entries of both models at corresponding tokens, which a new fuser is initialised from.

        With the weighting ``attention`` token pairs are weighted by the attention that they receive.
        """

    def stored(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Pad targets and tokens, and fetch stored caches, as arguments of a :class:`FuserBatch`."""
        device, dtype, sharer = self.device, self.receiver.dtype, self.model.sharers[0]
        ours, theirs = [example.receiver_prefix for example in examples], [example.sharer_ids for example in examples]
        return {
            **targets(examples, device, [example.prefix for example in examples]),
            "prefix": left_pad(ours, 0).to(device),
            "receiver_cache": self.receiver_cache(ours, [len(example.receiver_ids) for example in examples]),
            "sharer": left_pad(theirs, 0).to(device),
            "sharer_cache": stack(self.sharer_store.get(theirs), sharer.geometry.layers, dtype, device),
        }

    def receiver_cache(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> DynamicCache:
        """Fetch stored prefills of the beginnings of prompts that have so many tokens.

        A receiver that has not only KV layers runs: stores hold no more than these.
        """
        if self.receiver.left_out:
            tokens = replace(left_pad(prompts, 0), whole=tuple(lengths))
            return cast(DynamicCache, self.receiver.prefill(tokens))
        layers = self.receiver.geometry.layers
        return stack(self.receiver_store.get(prompts, lengths), layers, self.receiver.dtype, self.device)

    def forward(self, examples: Sequence[Example], share: float = 1.0) -> dict[str, Tensor]:
        """Compute the loss of examples; in the first steps that of reconstructing their messages."""
        if self.reconstructing:
            examples = [example.reconstructing() for example in examples]
        return super().forward(examples, share)

    def loss(self, batch: Any) -> Tensor:
        """Compute the next-token loss plus the guard."""
        loss = super().loss(batch)
        if self.guard_weight > 0 and len(batch.examples) > 1:
            with torch.no_grad():
                alone = self.losses(batch, "none")
            loss = loss + self.guard_weight * torch.relu(alone - self.losses(batch, "deranged")).mean()
        return loss

    def summary(self) -> dict[str, Any]:
        """Return how many prompts were prefilled."""
        return {"prefilled": {"receiver": self.receiver_store.computed, "sharer": self.sharer_store.computed}}

    def save(self, folder: Path, record: dict[str, Any] | None = None) -> None:
        """Write the fuser."""
        if record is not None:
            self.fuser.config.training = record
        self.fuser.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Read the fuser's weights."""
        self.fuser.load_state_dict(load_fuser(folder, dtype=torch.float32).state_dict())

    def on_train_begin(self, steps: int) -> None:
        """Pass the length of the training to the fuser."""
        self.fuser.on_train_begin(steps)

    def on_step(self, step: int) -> None:
        """Move the fuser's schedules, and end the reconstruction."""
        self.fuser.on_step(step)
        self.reconstructing = step < self.reconstruction_steps


def positions_after(mask: Tensor, new: Tensor) -> Tensor:
    """Count the positions of new tokens after those of a cache: only what is no padding, ``[batch, new]``."""
    return (mask.sum(-1, keepdim=True) + new.long().cumsum(-1) - 1).clamp_min(0)


def targets(examples: Sequence[Example], device: torch.device, starts: Sequence[int]) -> dict[str, Any]:
    """Pad responses and weights, and prompts from ``starts`` on, as arguments of a :class:`Batch`."""

    def pad(rows: Sequence[Sequence[float]], filler: float) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler).to(device)

    question = left_pad([example.receiver_ids[start:] for example, start in zip(examples, starts, strict=True)], 0)
    return {
        "examples": examples,
        "responses": pad([example.response_ids for example in examples], -100),
        "weights": pad([example.weights for example in examples], 0.0),
        "question": question.to(device),
    }


def cross_entropy(logits: Tensor, responses: Tensor) -> Tensor:
    """Compute the loss of each response token in nats, in float32, 0 on padding; ``[batch, response]``.

    Args:
        logits: ``[batch, response, vocab]``.
        responses: ids, ``[batch, response]``, -100 on padding.
    """
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), responses.flatten(), reduction="none")
    return loss.view(responses.shape)


def soft_target_loss(losses: Tensor, logits: Tensor, examples: Sequence[Example], share: float) -> Tensor:
    """Mix the sharer's probabilities of the choices into the target of each token that names a choice.

    Args:
        losses: of the response tokens, ``[batch, response]``.
        logits: ``[batch, response, vocab]``.
        examples: with or without ``soft_target``.
        share: of the soft target, 0 to 1.
    """
    losses = losses.clone()
    for row, example in enumerate(examples):
        if example.soft_target is not None:
            scores = logits[row, example.decisive].float().log_softmax(-1)[example.choice_ids]
            soft = -(torch.tensor(example.soft_target, device=scores.device) * scores).sum()
            losses[row, example.decisive] = (1 - share) * losses[row, example.decisive] + share * soft
    return losses


def answered_right(logits: Tensor, examples: Sequence[Example]) -> list[float]:
    """Score each example: 1 if the best choice is the right one; without choices the share of right tokens."""
    scores = []
    for row, example in enumerate(examples):
        if example.choice_ids:
            best = int(logits[row, example.decisive, example.choice_ids].argmax())
            scores.append(float(best == example.row.answer))
        else:
            hits = logits[row, : len(example.response_ids)].argmax(-1).cpu() == torch.tensor(example.response_ids)
            scores.append(float(hits.float().mean()))
    return scores
