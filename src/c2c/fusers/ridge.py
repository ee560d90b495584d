"""Ridge regression from sums of products, so that memory does not grow with the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from c2c.errors import FuserError


@dataclass(frozen=True)
class AffineMap:
    """``y = bias + (x - mean) weight``, in float64.

    Attributes:
        weight: ``[layers, inputs, outputs]``.
        mean: mean of the inputs, ``[layers, 1, inputs]``.
        deviation: standard deviation of the inputs, ``[layers, 1, inputs]``.
        bias: mean of the outputs, ``[layers, 1, outputs]``.
    """

    weight: Tensor
    mean: Tensor
    deviation: Tensor
    bias: Tensor


class RidgeRegression:
    """Weighted least squares with a ridge penalty, one map per layer.

    Minimises ``sum_i w_i |y_i - x_i W - b|^2`` plus the penalty. Sums are in float64, since cache entries are large
    beside their variation.

    Attributes:
        pairs: number of pairs added.
    """

    def __init__(self) -> None:
        self.pairs = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add pairs, ``[layers, pairs, inputs]`` and ``[layers, pairs, outputs]``, with weights ``[layers, pairs]``."""
        x, y = float64(x), float64(y)
        w = x.new_ones(x.shape[:2]) if weight is None else float64(weight).to(x.device)
        weighted = (x * w.unsqueeze(-1)).transpose(1, 2)
        total = w.sum(1)[:, None, None]
        new = [total, weighted.sum(2).unsqueeze(1), w.unsqueeze(1) @ y, weighted @ x, weighted @ y]
        self._sums = [old + add for old, add in zip(self._sums, new, strict=True)] if self._sums else new
        self.pairs += x.shape[1]

    def solve(self, ridge: float) -> AffineMap:
        """Solve for the map with a penalty relative to each input channel's variance.

        Channels are scaled to unit variance first, so that keys, which are large in many models, don't outweigh values.

        Raises:
            FuserError: an impossible penalty, fewer than two pairs, no weight in some layer, or singular equations.
        """
        if not 0 <= ridge < math.inf:
            raise FuserError(f"ridge is {ridge}; expected a number from 0, such as 0.01.")
        if self.pairs < 2:
            raise FuserError(
                f"a fuser can't be fitted to {self.pairs} aligned pairs: at least 2 are needed, and a few thousand to "
                "be of use. Give more, or longer, examples."
            )
        total, sum_x, sum_y, xx, xy = self._sums
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
                f"{self.pairs} pairs for {matrix.shape[-1]} channels. Raise the ridge (1e-2), or give more examples."
            )
        return AffineMap(torch.cholesky_solve(cross / scale, factor) / scale, mean, deviation, bias)


def float64(x: Tensor) -> Tensor:
    """Convert to float64, on the host where the device has none (mps)."""
    return (x.cpu() if x.device.type == "mps" else x).double()
