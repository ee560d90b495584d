"""Private context: the sharer's entries become extra entries of the receiver's cache, which its prompt attends to.

The receiver's own entries stay as they are. Keys are read and written without their rotation; whoever places the
entries rotates them to where they stand. One affine map per layer, which ridge regression can set, and a narrow
nonlinear part that starts at zero. With ``slots``, learned queries pool all positions to so many entries.

Side memory of projected entries is what studies of communication without a shared prompt use: LCF-X and XKV (2026).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from c2c.errors import FuserError
from c2c.fusers.base import Entries, Fuser, FuserConfig
from c2c.fusers.linear import channels
from c2c.kv_cache import KeyValue, KVGeometry


@strict
class MemoryConfig(FuserConfig):
    """Configuration of the memory fuser.

    Attributes:
        rank: width of the nonlinear part.
        slots: entries per handed-over cache; None for one per position, 0 for none at all.
    """

    model_type = "c2c_fuser_memory"
    rank: int = 64
    slots: int | None = None


class MemoryFuser(Fuser):
    """``[K_s, V_s] -> [K, V]`` per receiver layer, as entries of their own.

    Attributes:
        mean: mean of the sharer's channels, ``[layers, 1, inputs]``.
        scale: their deviation, ``[layers, 1, inputs]``.
        weight: the affine map, ``[layers, inputs, outputs]``, keys before values on both sides.
        bias: its constant, ``[layers, 1, outputs]``.
        down: into the nonlinear part, ``[layers, inputs, rank]``.
        up: out of it, ``[layers, rank, outputs]``.
        query: what each slot looks for, ``[layers, slots, rank]``; only with ``slots``.
    """

    config_class = MemoryConfig
    config: MemoryConfig
    family: ClassVar[str] = "memory"
    context: ClassVar[str] = "private"
    needs_rotary: ClassVar[bool] = True
    _keep_in_fp32_modules_strict = ["mean", "scale", "bias"]  # noqa: RUF012 - as the base class has it

    mean: Tensor
    scale: Tensor

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        sharer, receiver = KVGeometry(**config.sharer_kv), KVGeometry(**config.receiver_kv)
        self._check(config, receiver)
        layers, inputs, outputs = receiver.layers, 2 * sharer.width, 2 * receiver.width
        self.register_buffer("mean", torch.zeros(layers, 1, inputs))
        self.register_buffer("scale", torch.ones(layers, 1, inputs))
        self.weight = nn.Parameter(torch.zeros(layers, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(layers, 1, outputs))
        self.down = nn.Parameter(torch.empty(layers, inputs, config.rank))
        self.down_bias = nn.Parameter(torch.zeros(layers, 1, config.rank))
        self.up = nn.Parameter(torch.zeros(layers, config.rank, outputs))
        nn.init.normal_(self.down, std=inputs**-0.5)
        if config.slots:
            self.query = nn.Parameter(torch.empty(layers, config.slots, config.rank))
            nn.init.normal_(self.query)
        self.post_init()

    def gates(self) -> Tensor:
        """Open, ``[layers, 2]``: side memory has no gate."""
        return torch.ones(self.weight.shape[0], 2)

    def forward(self, sharer: Entries, receiver: Entries | None = None, mask: Tensor | None = None) -> list[KeyValue]:
        """Project.

        Args:
            sharer: entries of the sharer, one item per receiver layer, ``[batch, kv_heads, positions, head_dim]``.
            receiver: not read.
            mask: False on padding, ``[batch, positions]``.

        Returns:
            Keys without rotation and values, one pair per receiver layer, ``[batch, kv_heads, slots, head_dim]``.
            Without ``slots`` entries of padding are there too; whoever places them masks them.
        """
        batch, positions = sharer.keys[0].shape[0], sharer.keys[0].shape[2]
        x = (channels(sharer) - self.mean) / self.scale
        x = x.to(self.weight.dtype)
        hidden = nn.functional.gelu(torch.baddbmm(self.down_bias, x, self.down))
        entries = torch.bmm(x, self.weight) + torch.bmm(hidden, self.up) + self.bias.to(x.dtype)
        entries = entries.view(len(entries), batch, positions, -1)
        if self.config.slots is not None:
            entries = self._pool(entries, hidden.view(len(hidden), batch, positions, -1), mask)
        return self._split(entries)

    def _pool(self, entries: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Slots as weighted means over positions, ``[layers, batch, slots, outputs]``."""
        if not self.config.slots:
            return entries[:, :, :0]
        scores = torch.einsum("lbpr,lsr->lbsp", hidden, self.query) / self.config.rank**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[None, :, None, :], float("-inf"))
        return torch.einsum("lbsp,lbpo->lbso", scores.softmax(-1), entries)

    def _split(self, entries: Tensor) -> list[KeyValue]:
        receiver = KVGeometry(**self.config.receiver_kv)
        layers, batch, slots, _ = entries.shape
        shaped = entries.view(layers, batch, slots, 2, receiver.kv_heads, receiver.head_dim)
        keys, values = shaped.permute(3, 0, 1, 4, 2, 5).unbind()
        return list(zip(keys.unbind(), values.unbind(), strict=True))

    @staticmethod
    def _check(config: MemoryConfig, receiver: KVGeometry) -> None:
        if len(config.fused_layers) != receiver.layers:
            missing = [index for index, source in enumerate(config.layer_map) if source is None]
            raise FuserError(
                f"a memory fuser needs a sharer layer for each of the receiver's {receiver.layers} layers, since every "
                f"layer's cache grows; the layer map leaves out {missing}."
            )
        if config.slots is not None and config.slots < 0:
            raise FuserError(f"slots is {config.slots}; expected None (one per position), or a number from 0.")
