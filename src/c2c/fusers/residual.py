"""The residual block of the published fuser, with a backward pass by hand.

Autograd would keep ten tensors per block where three do, and under autocast a rounded copy of every weight as well. In
a fuser of 180 blocks that is more than a gigabyte, and a tenth of the time of a training step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_STEPS = 2**16  # a dropout mask is drawn with 16 bits per element
_ONE = 0x3F80  # the bits of 1.0 in bfloat16


class ResidualBlock(nn.Module):
    """``x + Dropout(W2 GELU(W1 RMSNorm(x)))``, without biases."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Shape in and out: ``[..., width]``."""
        if self.training:
            return residual(x, self.norm.weight, self.w1.weight, self.w2.weight, self.dropout)
        out: Tensor = x + self.w2(nn.functional.gelu(self.w1(self.norm(x))))
        return out


def residual(x: Tensor, norm: Tensor, w1: Tensor, w2: Tensor, dropout: float = 0.0, eps: float = 1e-6) -> Tensor:
    """``x + Dropout(w2 GELU(w1 RMSNorm(x)))``; under autocast the products are in its type, the norm in float32.

    Args:
        x: ``[..., width]``.
        norm: ``[width]``.
        w1: ``[inner, width]``.
        w2: ``[width, inner]``.
        dropout: share of the elements that are dropped, 0 to below 1.
        eps: of the norm.
    """
    out: Tensor = _Residual.apply(x, norm, w1, w2, dropout, eps)
    return out


class _Residual(torch.autograd.Function):
    """Keeps the input, the inner layer before GELU and what was dropped; the rest is quickly computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, w1: Tensor, w2: Tensor, dropout: float, eps: float) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else w1.dtype
        with torch.autocast(kind, enabled=False):  # or it would keep the rounded weights
            unit, inverse = _unit(x, eps)
            inner = unit.mul_(norm).to(dtype) @ w1.to(dtype).t()
            out = nn.functional.gelu(inner) @ w2.to(dtype).t()
            kept, ctx.scale = draw_kept(out, dropout)
            ctx.save_for_backward(x, norm, w1, w2, inner, inverse, kept)
            return x + out if kept is None else torch.addcmul(x, out, kept.to(dtype), value=ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, w1, w2, inner, inverse, kept = ctx.saved_tensors
        dtype = inner.dtype
        with torch.autocast(x.device.type, enabled=False):
            out = gradient.to(dtype)
            if kept is not None:
                out = (out * kept.to(dtype)).mul_(ctx.scale)
            w2_gradient = _rows(out).t() @ _rows(nn.functional.gelu(inner))
            hidden = torch.ops.aten.gelu_backward(out @ w2.to(dtype), inner)
            unit = x * inverse
            w1_gradient = _rows(hidden).t() @ _rows((unit * norm).to(dtype))
            normed = (hidden @ w1.to(dtype)).to(unit.dtype)
            along = normed * unit
            mean = (along @ norm.to(along.dtype)).unsqueeze(-1) / x.shape[-1]
            back = gradient + normed.mul_(norm).sub_(unit.mul_(mean)).mul_(inverse)
        found = back, _rows(along).sum(0), w1_gradient, w2_gradient
        return *(new.to(old.dtype) for new, old in zip(found, (x, norm, w1, w2), strict=True)), None, None


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` over its root mean square, and one over that: ``[..., 1]``; in float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    inverse = (length.square() / x.shape[-1] + eps).rsqrt()
    return x * inverse, inverse


def draw_kept(like: Tensor, dropout: float) -> tuple[Tensor | None, float]:
    """1 for elements that are kept and 0 for others, in bfloat16; and by how much to scale, so that the mean stays.

    On a CPU ``bernoulli_`` takes longer than everything else in a block but its products, since it draws 64 bits for
    each element; here four elements share them. The share is rounded to 1/65536, the scale is exact for it.

    Returns:
        None and 1 where nothing is dropped.
    """
    threshold = min(round(dropout * _STEPS), _STEPS - 1)
    if threshold == 0:
        return None, 1.0
    scale = _STEPS / (_STEPS - threshold)
    if like.device.type != "cpu":
        return (torch.rand(like.shape, device=like.device) >= threshold / _STEPS).bfloat16(), scale
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: like.numel()].view(like.shape)
    ones = bits.ge_(threshold - _STEPS // 2).mul_(_ONE)  # in place, since a change of type takes as long as drawing
    return ones.view(torch.bfloat16), scale


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)
