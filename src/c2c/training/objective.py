"""What is learned: the next-token loss on the responses, and the guard against wrong messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from c2c.fusers import Fuser
from c2c.model import C2CModel
from c2c.training.config import Precision
from c2c.training.store import PrefillStore

Message = Literal["matched", "deranged", "zero", "none"]


class Objective(nn.Module, ABC):
    """A fuser with its two frozen models: what the Trainer trains. Only the fuser is a submodule.

    Args:
        model: the pair.
        receiver_store: the receiver's prefills.
        sharer_store: the sharer's prefills.
        guard_weight: see :class:`~c2c.training.config.TrainConfig`.

    Attributes:
        reconstructing: learn to repeat what was read in place of the response.
        soft_targets: share of the sharer's own belief in the target of the token that names a choice.
        precision: of the arithmetic, see :class:`~c2c.training.config.TrainConfig`.
    """

    def __init__(
        self, model: C2CModel, receiver_store: PrefillStore, sharer_store: PrefillStore, guard_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.fuser: Fuser = model.fusers[0]  # type: ignore[assignment]
        # in a tuple, so that the frozen models are neither parameters nor saved
        self._frozen = (model, receiver_store, sharer_store)
        self.guard_weight = guard_weight
        self.reconstructing = False
        self.soft_targets = 0.0
        self.precision: Precision = "float32"
        self.accepts_loss_kwargs = False

    @property
    def model(self) -> C2CModel:
        """The frozen pair with its fuser."""
        return self._frozen[0]

    @property
    def receiver_store(self) -> PrefillStore:
        """The receiver's prefills."""
        return self._frozen[1]

    @property
    def sharer_store(self) -> PrefillStore:
        """The sharer's prefills."""
        return self._frozen[2]

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Any:
        """Fetch the caches of examples and pad them to a batch, with ``responses`` and ``weights``."""

    @abstractmethod
    def logits(self, batch: Any, message: Message, width: int | None = None) -> Tensor:
        """The receiver's predictions of the first ``width`` response tokens, ``[batch, response, vocab]``."""

    def forward(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """The loss of a batch of examples: next-token loss on the responses, plus the guard."""
        if self.reconstructing:
            examples = [example.reconstructing() for example in examples]
        batch = self.collate(examples)  # may prefill, and what is stored must not depend on the run's precision
        with computing_in(self.precision, self.model.receiver.device):
            loss = self.losses(batch, "matched").mean()
            if self.guard_weight > 0 and len(examples) > 1:
                with torch.no_grad():
                    alone = self.losses(batch, "none")
                guard = torch.relu(alone - self.losses(batch, "deranged")).mean()
                loss = loss + self.guard_weight * guard
        return {"loss": loss}

    def losses(self, batch: Any, message: Message) -> Tensor:
        """Loss of each example's response, its tokens weighted by ``weights``, with soft targets; ``[batch]``."""
        logits = self.logits(batch, message)
        losses = cross_entropy(logits, batch.responses)
        if self.soft_targets > 0:
            losses = _softened(losses, logits, batch.examples, self.soft_targets)
        weighted: Tensor = losses * batch.weights
        return weighted.sum(-1)

    def token_losses(self, batch: Any, message: Message) -> Tensor:
        """Next-token loss of each response token in nats, 0 on padding; ``[batch, response]``."""
        return cross_entropy(self.logits(batch, message), batch.responses)


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """The context that a step computes in.

    The Trainer's own ``bf16`` is not used: it would round the prefills of a step too, and those are stored.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def cross_entropy(logits: Tensor, responses: Tensor) -> Tensor:
    """Loss of each response token in nats, 0 on padding; ``[batch, response]``."""
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), responses.flatten(), ignore_index=-100, reduction="none"
    )
    return loss.view(responses.shape)


def _softened(losses: Tensor, logits: Tensor, examples: Sequence[Any], share: float) -> Tensor:
    """Losses in which a share of the target of each decisive token is the sharer's belief about the options."""
    losses = losses.clone()
    for row, example in enumerate(examples):
        if getattr(example, "beliefs", None) is not None:
            scores = logits[row, example.decisive].float().log_softmax(-1)[example.choice_ids]
            soft = -(torch.tensor(example.beliefs, device=scores.device) * scores).sum()
            losses[row, example.decisive] = (1 - share) * losses[row, example.decisive] + share * soft
    return losses


def right_pad(rows: Sequence[Sequence[float]], filler: float) -> Tensor:
    """Rows of numbers as one tensor, ``[rows, longest]``."""
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)
