"""A closed-form fuser: the receiver's entries predicted from the sharer's by one affine map per layer.

Fitted by ridge regression (:mod:`c2c.training.ridge`), without a gradient. It is what training must beat. Keys are
read and predicted without their rotation, since an affine map of rotated keys would have to be another one at every
position.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from c2c import rope
from c2c.errors import FuserError
from c2c.fusers.base import Entries, Fuser, FuserConfig
from c2c.kv_cache import KeyValue, KVGeometry


@strict
class LinearConfig(FuserConfig):
    """Configuration of the linear fuser.

    Attributes:
        ridge: penalty, relative to the variance of each of the sharer's channels.
        blend: how far fitting opens the fuser: 0 keeps the receiver's entries, 1 takes the predicted ones.
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
    # means are large beside what varies around them, and a blend rounded to bfloat16 is not the one chosen
    _keep_in_fp32_modules_strict = ["mean", "bias", "blend"]  # noqa: RUF012 - as the base class has it

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        _check(config.blend)
        sharer, receiver = KVGeometry(**config.sharer_kv), KVGeometry(**config.receiver_kv)
        layers, inputs, outputs = len(config.fused_layers), 2 * sharer.width, 2 * receiver.width
        # parameters and not buffers, since a model finds its device and type by them; never trained
        self.weight = nn.Parameter(torch.zeros(layers, inputs, outputs), requires_grad=False)
        self.mean = nn.Parameter(torch.zeros(layers, 1, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(layers, 1, outputs), requires_grad=False)
        self.blend = nn.Parameter(torch.zeros(layers, 2), requires_grad=False)
        self.post_init()

    def gates(self) -> Tensor:
        """The blend, ``[layers, 2]``, float32."""
        return self.blend.detach().float().clone()

    @torch.no_grad()
    def set_map(self, weight: Tensor, mean: Tensor, bias: Tensor) -> None:
        """Take a fitted map, shapes as in the attributes, and open the fuser by ``config.blend``."""
        self.weight.copy_(weight)
        self.mean.copy_(mean)
        self.bias.copy_(bias)
        self.set_blend(self.config.blend)

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
        keys, values = torch.stack(list(receiver.keys)), torch.stack(list(receiver.values))
        layers, batch, heads, tokens, dim = keys.shape
        blend = self.blend.float().repeat_interleave(heads * dim, dim=1).unsqueeze(1)
        delta = blend * (self.predict(sharer) - channels(receiver))
        delta = delta.view(layers, batch, tokens, 2, heads, dim).permute(3, 0, 1, 4, 2, 5)
        added_keys, added_values = delta.unbind()
        if receiver.rotary is not None:
            added_keys = rope.stack(receiver.rotary).apply(added_keys)
        fused_keys = keys + added_keys.to(keys.dtype)
        fused_values = values + added_values.to(values.dtype)
        return list(zip(fused_keys.unbind(), fused_values.unbind(), strict=True))

    def predict(self, sharer: Entries) -> Tensor:
        """The receiver's entries as the sharer's give them, ``[layers, batch * tokens, outputs]``, float32."""
        centred = channels(sharer) - self.mean.float()
        return torch.bmm(centred.to(self.weight.dtype), self.weight).float() + self.bias.float()


def _check(blend: float) -> None:
    if not 0 <= blend <= 1:
        raise FuserError(f"blend is {blend}; expected 0 (the receiver's own entries) to 1 (the predicted ones).")


def channels(entries: Entries) -> Tensor:
    """Keys without rotation, then values, heads side by side: ``[layers, batch * tokens, 2 * width]``, float32."""
    keys, values = torch.stack(list(entries.keys)).float(), torch.stack(list(entries.values)).float()
    if entries.rotary is not None:
        keys = rope.stack(entries.rotary).undo(keys)
    return torch.cat([x.transpose(2, 3).flatten(3).flatten(1, 2) for x in (keys, values)], dim=-1)
