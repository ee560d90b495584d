"""The default fuser: both models' keys and values through one narrow layer, all layers in one batched product.

Keys are read without their rotation, and the rotation is put back on what is added. Gates are soft and in float32.
The way up starts at zero, so that a new fuser changes nothing. A few megabytes where the published fuser has a
gigabyte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from c2c import rope
from c2c.errors import FuserError
from c2c.fusers.base import Entries, Fuser, FuserConfig
from c2c.fusers.gating import soft_gate
from c2c.kv_cache import KeyValue, KVGeometry


@strict
class BottleneckConfig(FuserConfig):
    """Configuration of the bottleneck fuser.

    Attributes:
        rank: width of the narrow layer.
    """

    model_type = "c2c_fuser_bottleneck"
    rank: int = 128


class BottleneckFuser(Fuser):
    """``[K_s, V_s, K_r, V_r] -> rank -> [dK, dV]`` per receiver layer, added to the receiver's entries."""

    config_class = BottleneckConfig
    config: BottleneckConfig
    family: ClassVar[str] = "bottleneck"
    needs_rotary: ClassVar[bool] = True
    # a gate rounded to bfloat16 cannot move by small steps
    _keep_in_fp32_modules_strict = [  # noqa: RUF012 - as the base class has it
        "gate_logit",
        "head_weight",
        "head_bias",
    ]

    mean: Tensor
    scale: Tensor

    def __init__(self, config: BottleneckConfig) -> None:
        super().__init__(config)
        sharer, receiver = KVGeometry(**config.sharer_kv), KVGeometry(**config.receiver_kv)
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
        self._moments: list[Tensor] | None = None  # running sums while calibrating
        nn.init.normal_(self.down, std=inputs**-0.5)
        self.post_init()

    def gates(self) -> Tensor:
        """Layer gates, ``[layers, 2]``."""
        return soft_gate(self.gate_logit.detach())

    def start_calibration(self) -> None:
        """Collect channel statistics in the following forward passes."""
        self._moments = [torch.zeros_like(self.mean), torch.zeros_like(self.mean), torch.zeros(())]

    def finish_calibration(self) -> None:
        """Standardise every channel by the mean and deviation of what was seen."""
        if self._moments is None or float(self._moments[2]) == 0:
            raise FuserError("nothing to calibrate on: run the fuser between start_calibration and finish_calibration.")
        total, squares, count = self._moments
        self._moments = None
        mean = total / count.to(total.device)
        self.mean.copy_(mean)
        self.scale.copy_((squares / count.to(total.device) - mean.square()).clamp_min(1e-8).sqrt())

    def forward(self, sharer: Entries, receiver: Entries) -> list[KeyValue]:
        """See :meth:`Fuser.forward`."""
        keys, values = torch.stack(list(receiver.keys)), torch.stack(list(receiver.values))
        layers, batch, heads, tokens, dim = keys.shape
        hidden = self._hidden(sharer, receiver, keys, values)
        delta = torch.baddbmm(self.up_bias, hidden, self.up).to(self.up.dtype)  # autocast would rotate in bfloat16
        delta = delta.view(layers, batch, tokens, 2, heads, dim).permute(3, 0, 1, 4, 2, 5)
        weight = self._weights(hidden).view(layers, batch, tokens, 2, heads, 1).permute(3, 0, 1, 4, 2, 5)
        added_keys, added_values = (delta * weight.to(delta.dtype)).unbind()
        if receiver.rotary is not None:
            added_keys = rope.stack(receiver.rotary).apply(added_keys)
        fused_keys = keys + added_keys.to(keys.dtype)
        fused_values = values + added_values.to(values.dtype)
        return list(zip(fused_keys.unbind(), fused_values.unbind(), strict=True))

    def _hidden(self, sharer: Entries, receiver: Entries, keys: Tensor, values: Tensor) -> Tensor:
        """The narrow layer, ``[layers, batch * tokens, rank]``."""
        x = self.features(sharer, receiver, keys, values)
        if self._moments is not None:
            self._moments[0] += x.sum(1, keepdim=True)
            self._moments[1] += x.square().sum(1, keepdim=True)
            self._moments[2] += x.shape[1]
        x = (x - self.mean) / self.scale
        return nn.functional.gelu(torch.baddbmm(self.down_bias, x, self.down))

    def features(self, sharer: Entries, receiver: Entries, keys: Tensor, values: Tensor) -> Tensor:
        """What the fuser reads, ``[layers, batch * tokens, channels]``: both models' entries without rotation."""
        dtype = self.down.dtype  # before the rotation comes off: bfloat16 would round it
        their_keys = torch.stack(list(sharer.keys)).to(dtype)
        their_values = torch.stack(list(sharer.values)).to(dtype)
        ours = _unrotated(keys.to(dtype), receiver.rotary), values.to(dtype)
        parts = [_unrotated(their_keys, sharer.rotary), their_values, *ours]
        return torch.cat([_flatten(part) for part in parts], dim=-1)

    def _weights(self, hidden: Tensor) -> Tensor:
        """Head weight times layer gate, ``[layers, batch * tokens, 2 * kv_heads]``, float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            heads = torch.sigmoid(torch.baddbmm(self.head_bias.float(), hidden.float(), self.head_weight.float()))
        gate = soft_gate(self.gate_logit).repeat_interleave(heads.shape[-1] // 2, dim=1)
        return heads * gate.unsqueeze(1)


def _unrotated(keys: Tensor, tables: Sequence[rope.Rotary] | None) -> Tensor:
    return keys if tables is None else rope.stack(tables).undo(keys)


def _flatten(x: Tensor) -> Tensor:
    """``[layers, batch, heads, tokens, dim]`` to ``[layers, batch * tokens, heads * dim]``."""
    layers, batch, heads, tokens, dim = x.shape
    return x.transpose(2, 3).reshape(layers, batch * tokens, heads * dim)
