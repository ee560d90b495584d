"""A closed-form fuser: the receiver's entries predicted from the sharer's by one affine map per layer.

Fitted by ridge regression, without a gradient; a baseline that training must beat. Keys are read and predicted without
their rotation, since an affine map of rotated keys would have to be another one at every position. Ridge maps between
caches are from Heo et al. (2026, arXiv:2608.03893), weights by attention from CacheBridge (2026, arXiv:2609.00891); in
both the map replaces the receiver's prefill, while here it is blended into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from c2c.errors import FuserError
from c2c.fusers.base import AlignedEntries, Entries, Fuser, FuserConfig, split_channels
from c2c.fusers.ridge import ridge_regression
from c2c.kv_cache import KeyValue

_BLENDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@strict
class LinearConfig(FuserConfig):
    """Configuration of the linear fuser.

    Attributes:
        ridge: penalty, relative to the variance of each of the sharer's channels.
        blend: how far the fitted fuser is open: 0 keeps the receiver's entries, 1 takes the predicted ones.
    """

    model_type = "c2c_fuser_linear"
    ridge: float | int = 1e-2
    blend: float | int = 0.5


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
