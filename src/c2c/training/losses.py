"""Losses on response tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from c2c.training.examples import Example


def cross_entropy(logits: Tensor, responses: Tensor) -> Tensor:
    """Compute the loss of each response token in nats, 0 on padding.

    Args:
        logits: ``[batch, response, vocab]``; computed in float32.
        responses: ids, ``[batch, response]``, -100 on padding.

    Returns:
        ``[batch, response]``.
    """
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), responses.flatten(), ignore_index=-100, reduction="none"
    )
    return loss.view(responses.shape)


def soft_target_loss(losses: Tensor, logits: Tensor, examples: Sequence[Example], share: float) -> Tensor:
    """Mix the sharer's probabilities of the choices into the target of each token that names a choice.

    Args:
        losses: of the response tokens, ``[batch, response]``.
        logits: ``[batch, response, vocab]``.
        examples: with ``soft_target``, where there is one.
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
    """Score each example: 1 if the best choice is the right one; without choices the share of right tokens.

    Args:
        logits: ``[batch, response, vocab]``.
        examples: ``[batch]``.
    """
    scores = []
    for row, example in enumerate(examples):
        if example.choice_ids:
            best = int(logits[row, example.decisive, example.choice_ids].argmax())
            scores.append(float(best == example.row.answer))
        else:
            hits = logits[row, : len(example.response_ids)].argmax(-1).cpu() == torch.tensor(example.response_ids)
            scores.append(float(hits.float().mean()))
    return scores
