"""The default fuser: both models' keys and values through one narrow layer, all layers in one batched product.

Keys are read without their rotation, and the rotation is put back on what is added. Gates are soft and in float32.
The up projection starts at zero, so that a new fuser changes nothing. A few megabytes where the published fuser has a
gigabyte.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from c2c.errors import FuserError
from c2c.fusers.base import AlignedEntries, Entries, Fuser, FuserConfig, size, split_channels
from c2c.fusers.linear import float64
from c2c.kv_cache import KeyValue


@strict
class BottleneckConfig(FuserConfig):
    """Configuration of the bottleneck fuser.

    Attributes:
        rank: width of the narrow layer.
    """

    model_type = "c2c_fuser_bottleneck"
    rank: int = size(128)


class BottleneckFuser(Fuser):
    """``[K_s, V_s, K_r, V_r] -> rank -> [dK, dV]`` per receiver layer, added to the receiver's entries."""

    config_class = BottleneckConfig
    config: BottleneckConfig
    family: ClassVar[str] = "bottleneck"
    needs_rotary: ClassVar[bool] = True
    # a gate rounded to bfloat16 cannot move by small steps
    _keep_in_fp32_modules_strict = ["gate_logit", "head_weight", "head_bias"]  # noqa: RUF012 - as the base class has it

    mean: Tensor
    scale: Tensor

    def __init__(self, config: BottleneckConfig) -> None:
        super().__init__(config)
        sharer, receiver = config.geometries
        layers, rank, inputs = len(config.fused_layers), config.rank, 2 * (sharer.width + receiver.width)
        self.register_buffer("mean", torch.zeros(layers, 1, inputs))
        self.register_buffer("scale", torch.ones(layers, 1, inputs))
        self.down = nn.Parameter(torch.empty(layers, inputs, rank))
        self.down_bias = nn.Parameter(torch.zeros(layers, 1, rank))
        self.up = nn.Parameter(torch.zeros(layers, rank, 2 * receiver.width))
        self.up_bias = nn.Parameter(torch.zeros(layers, 1, 2 * receiver.width))
        self.head_weight = nn.Parameter(torch.zeros(layers, rank, 2 * receiver.kv_heads))
        self.head_bias = nn.Parameter(torch.zeros(layers, 1, 2 * receiver.kv_heads))
        self.gate_logit = nn.Parameter(torch.zeros(layers, 2))
        nn.init.normal_(self.down, std=inputs**-0.5)
        self.post_init()

    def gates(self) -> Tensor:
        """Return the layer gates, ``[layers, 2]``."""
        return soft_gate(self.gate_logit.detach())

    @torch.no_grad()
    def initialise_from_data(self, data: Iterable[AlignedEntries]) -> bool:
        """Standardise every channel by its mean and deviation in the data.

        Raises:
            FuserError: there are no entries.
        """
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in data:
            x = float64(self._features(batch.sharer, batch.receiver))
            count += x.shape[1]
            total = total.to(x) + x.sum(1, keepdim=True)
            squares = squares.to(x) + x.square().sum(1, keepdim=True)
        if count == 0:
            raise FuserError("there are no aligned entries to take channel statistics from: give more examples.")
        mean = total / count
        self.mean.copy_(mean)
        self.scale.copy_((squares / count - mean.square()).clamp_min(1e-8).sqrt())
        return False

    def forward(self, sharer: Entries, receiver: Entries) -> list[KeyValue]:
        """See :meth:`Fuser.forward`."""
        batch = receiver.keys[0].shape[0]
        x = (self._features(sharer, receiver) - self.mean) / self.scale
        hidden = nn.functional.gelu(torch.baddbmm(self.down_bias, x, self.down))
        delta = torch.baddbmm(self.up_bias, hidden, self.up).to(self.up.dtype)  # autocast would rotate in bfloat16
        heads = self.config.receiver_kv["kv_heads"]
        parts, factors = (split_channels(side, batch, heads) for side in (delta, self._weights(hidden)))
        keys, values = (part * factor.to(part.dtype) for part, factor in zip(parts, factors, strict=True))
        return receiver.plus(keys, values)

    def _features(self, sharer: Entries, receiver: Entries) -> Tensor:
        """Return both models' entries without rotation, ``[layers, batch * tokens, channels]``."""
        return torch.cat([entries.channels(self.down.dtype) for entries in (sharer, receiver)], dim=-1)

    def _weights(self, hidden: Tensor) -> Tensor:
        """Return head weight times layer gate, ``[layers, batch * tokens, 2 * kv_heads]``, float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            heads = torch.sigmoid(torch.baddbmm(self.head_bias.float(), hidden.float(), self.head_weight.float()))
        gate = soft_gate(self.gate_logit).repeat_interleave(heads.shape[-1] // 2, dim=1)
        return heads * gate.unsqueeze(1)


def soft_gate(logit: Tensor) -> Tensor:
    """``sigmoid(logit)`` in float32: near zero a hard gate flips a whole layer between seeds."""
    return torch.sigmoid(logit.float())
