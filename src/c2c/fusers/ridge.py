"""Ridge regression from sums of products, so that memory does not grow with the data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from c2c.errors import FuserError

Pairs = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class AffineMap:
    """``y = bias + (x - mean) weight``, in float64.

    Attributes:
        weight: ``[layers, inputs, outputs]``.
        mean: mean of the inputs, ``[layers, 1, inputs]``.
        deviation: standard deviation of the inputs, ``[layers, 1, inputs]``.
        bias: mean of the outputs, ``[layers, 1, outputs]``.
        pairs: how many it was fitted to.
    """

    weight: Tensor
    mean: Tensor
    deviation: Tensor
    bias: Tensor
    pairs: int


def ridge_regression(batches: Iterable[Pairs], ridge: float) -> AffineMap:
    """Fit one map per layer by weighted least squares with a ridge penalty.

    Minimises ``sum_i w_i |y_i - x_i W - b|^2`` plus the penalty. Sums are in float64, since cache entries are large
    beside their variation. Channels are scaled to unit variance first, so that keys, which are large in many models,
    don't outweigh values.

    Args:
        batches: inputs ``[layers, pairs, inputs]``, outputs ``[layers, pairs, outputs]``, and weights
            ``[layers, pairs]`` or None for equal ones.
        ridge: penalty, relative to each input channel's variance.

    Raises:
        FuserError: an impossible penalty, fewer than two pairs, no weight in some layer, or singular equations.
    """
    if not 0 <= ridge < math.inf:
        raise FuserError(f"ridge is {ridge}; expected a number from 0, such as 0.01.")
    pairs, (total, sum_x, sum_y, xx, xy) = _sums(batches)
    if not bool((total > 0).all()):
        layers = (total.flatten() <= 0).nonzero().flatten().tolist()
        raise FuserError(f"all pairs have weight 0 in fused layers {layers}: use linear_weight 'none'.")
    mean, bias = sum_x / total, sum_y / total
    covariance = xx / total - mean.transpose(1, 2) @ mean
    cross = xy / total - mean.transpose(1, 2) @ bias
    # solve (covariance + ridge * variances) W = cross by Cholesky, all layers at once
    variance = covariance.diagonal(dim1=1, dim2=2)
    deviation = variance.unsqueeze(1).clamp_min(1e-8).sqrt()
    constant = variance <= 1e-12 * (xx / total).diagonal(dim1=1, dim2=2)  # the rest is rounding
    scale = torch.where(constant, math.inf, variance.clamp_min(0).sqrt()).unsqueeze(-1)
    matrix = covariance / (scale * scale.transpose(1, 2))  # a constant channel is 0 here, and predicts nothing
    matrix.diagonal(dim1=1, dim2=2).add_(ridge + constant)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        raise FuserError(
            f"the normal equations of {int(failed.count_nonzero())} layers are singular with ridge {ridge}: "
            f"{pairs} pairs for {matrix.shape[-1]} channels. Raise the ridge (1e-2), or give more examples."
        )
    return AffineMap(torch.cholesky_solve(cross / scale, factor) / scale, mean, deviation, bias, pairs)


def _sums(batches: Iterable[Pairs]) -> tuple[int, list[Tensor]]:
    """Sum over pairs: their number, and weights, inputs, outputs and products of all layers."""
    pairs, sums = 0, [torch.zeros(())] * 5
    for x, y, weight in batches:
        x, y = float64(x), float64(y)
        w = x.new_ones(x.shape[:2]) if weight is None else float64(weight).to(x.device)
        weighted = (x * w.unsqueeze(-1)).transpose(1, 2)
        new = [w.sum(1)[:, None, None], weighted.sum(2).unsqueeze(1), w.unsqueeze(1) @ y, weighted @ x, weighted @ y]
        sums = [old.to(add) + add for old, add in zip(sums, new, strict=True)]
        pairs += x.shape[1]
    if pairs < 2:
        raise FuserError(
            f"a fuser can't be fitted to {pairs} aligned pairs: at least 2 are needed, and a few thousand to be of "
            "use. Give more, or longer, examples."
        )
    return pairs, sums


def float64(x: Tensor) -> Tensor:
    """Convert to float64, on the host where the device has none (mps)."""
    return (x.cpu() if x.device.type == "mps" else x).double()
