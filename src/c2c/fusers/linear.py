"""A closed-form fuser: the receiver's entries predicted from the sharer's by one affine map per layer.

Fitted by ridge regression, without a gradient; a baseline that training must beat. Keys are read and predicted without
their rotation, since an affine map of rotated keys would have to be another one at every position. Ridge maps between
caches are from Heo et al. (2026, arXiv:2608.03893), weights by attention from CacheBridge (2026, arXiv:2609.00891); in
both the map replaces the receiver's prefill, while here it is blended into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from c2c.errors import FuserError
from c2c.fusers.base import AlignedEntries, Entries, Fuser, FuserConfig, number, split_channels
from c2c.kv_cache import KeyValue

Pairs = tuple[Tensor, Tensor, Tensor | None]  # inputs, outputs and weights
_BLENDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@strict
class LinearConfig(FuserConfig):
    """Configuration of the linear fuser.

    Attributes:
        ridge: penalty, relative to the variance of each of the sharer's channels.
        blend: how far the fitted fuser is open: 0 keeps the receiver's entries, 1 takes the predicted ones.
    """

    model_type = "c2c_fuser_linear"
    ridge: float | int = number(1e-2, 0)
    blend: float | int = number(0.5, 0, 1)


class LinearFuser(Fuser):
    """``[K_s, V_s] -> [K, V]`` per receiver layer; the receiver's entries move towards these by ``blend``.

    Attributes:
        weight: ``[layers, inputs, outputs]``, keys before values on both sides.
        mean: mean of the sharer's entries, ``[layers, 1, inputs]``.
        bias: mean of the receiver's entries, ``[layers, 1, outputs]``.
        blend: ``[layers, 2]``, keys and values; zeros until the fuser is fitted, so that it changes nothing.
    """

    config_class = LinearConfig
    config: LinearConfig
    family: ClassVar[str] = "linear"
    needs_rotary: ClassVar[bool] = True
    closed_form: ClassVar[bool] = True
    # means are large beside what varies around them, and a blend rounded to bfloat16 is not the one chosen
    _keep_in_fp32_modules_strict = ["mean", "bias", "blend"]  # noqa: RUF012 - as the base class has it

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        _check(config.blend)
        sharer, receiver = config.geometries
        layers, inputs, outputs = len(config.fused_layers), 2 * sharer.width, 2 * receiver.width
        # parameters and not buffers, since a model finds its device and type by them; never trained
        self.weight = nn.Parameter(torch.zeros(layers, inputs, outputs), requires_grad=False)
        self.mean = nn.Parameter(torch.zeros(layers, 1, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(layers, 1, outputs), requires_grad=False)
        self.blend = nn.Parameter(torch.zeros(layers, 2), requires_grad=False)
        self.post_init()

    def gates(self) -> Tensor:
        """Return the blend, ``[layers, 2]``, float32."""
        return self.blend.detach().float().clone()

    @torch.no_grad()
    def initialise_from_data(self, data: Iterable[AlignedEntries]) -> bool:
        """Fit the map by ridge regression, and open the fuser by ``config.blend``.

        Raises:
            FuserError: an impossible ridge, fewer than two aligned pairs, or singular equations.
        """
        found = ridge_regression((batch.channels() for batch in data), self.config.ridge)
        self.weight.copy_(found.weight)
        self.mean.copy_(found.mean)
        self.bias.copy_(found.bias)
        self.set_blend(self.config.blend)
        self.config.training = {"ridge": self.config.ridge, "pairs": found.pairs}
        return True

    def tune(self, score: Callable[[], float]) -> dict[str, Any]:
        """Set the best of ten blends, and of equal ones the smallest.

        Raises:
            FuserError: the fuser is not fitted.
        """
        if not self.trained:
            raise FuserError("this linear fuser is not fitted: call initialise_from_data before tune.")
        scores: dict[float, float] = {}
        for blend in _BLENDS:
            self.set_blend(blend)
            scores[blend] = score()
        best = max(scores, key=lambda blend: scores[blend])  # the first of equals
        self.set_blend(best)
        return {"blends": scores, "blend": best}

    @torch.no_grad()
    def set_blend(self, blend: float) -> None:
        """Open all layers by ``blend``, for keys and values alike.

        Raises:
            FuserError: not from 0 to 1.
        """
        _check(blend)
        self.config.blend = blend
        self.blend.fill_(blend)

    def forward(self, sharer: Entries, receiver: Entries) -> list[KeyValue]:
        """See :meth:`Fuser.forward`."""
        batch, heads, _, dim = receiver.keys[0].shape
        blend = self.blend.float().repeat_interleave(heads * dim, dim=1).unsqueeze(1)
        delta = blend * (self.predict(sharer) - receiver.channels())
        return receiver.plus(*split_channels(delta, batch, heads))

    def predict(self, sharer: Entries) -> Tensor:
        """Predict the receiver's entries from the sharer's, ``[layers, batch * tokens, outputs]``, float32."""
        centred = sharer.channels() - self.mean.float()
        return torch.bmm(centred.to(self.weight.dtype), self.weight).float() + self.bias.float()


def _check(blend: float) -> None:
    if not 0 <= blend <= 1:
        raise FuserError(f"blend is {blend}; expected 0 (the receiver's own entries) to 1 (the predicted ones).")


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
