"""Gates: how far open a layer is to the sharer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

UniformSource = Callable[[tuple[int, ...]], Tensor]


def gumbel_gate(logit: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """The published training gate, ``sigmoid((logit + g) / T)`` with a single Gumbel draw ``g``.

    One draw and not the difference of two, so at logit 0 it is open in 63 % of the draws; kept, because published
    fusers were trained so.

    Args:
        logit: scalar.
        uniform: numbers from [0, 1), of the shape wanted.
        temperature: ``T``, above 0.
    """
    noise = -torch.log(-torch.log(uniform + 1e-20) + 1e-20)
    return torch.sigmoid((logit + noise) / temperature)


def hard_gate(logit: Tensor) -> Tensor:
    """The published inference gate: 1 if the logit is above 0, else 0 (0 itself is closed). Float32."""
    return (logit > 0).float()


def soft_gate(logit: Tensor) -> Tensor:
    """``sigmoid(logit)`` in float32: near zero a hard gate flips a whole layer between seeds."""
    return torch.sigmoid(logit.float())


def annealed_temperature(step: int, initial: float, final: float, anneal_steps: int) -> float:
    """The published schedule: geometric from ``initial`` to ``final`` over ``anneal_steps`` optimizer steps."""
    progress = min(step / anneal_steps, 1.0) if anneal_steps > 0 else 1.0
    return float(initial * (final / initial) ** progress)
