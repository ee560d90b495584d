"""Private context: the sharer's entries become extra entries of the receiver's cache, which its prompt attends to.

The receiver's own entries stay as they are. Keys are read and written without their rotation; the caller rotates them
to their place. One affine map per layer, initialised by ridge regression onto the entries that the receiver would hold
if it had read the passage itself, and a narrow nonlinear part that starts at zero. With ``slots``, learned queries pool
all positions to so many entries.

Memory entries that are projected from another model's cache are also in LCF-X and XKV (2026).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from c2c.errors import FuserError
from c2c.fusers.base import AlignedEntries, Entries, Fuser, FuserConfig, size, split_channels
from c2c.fusers.linear import ridge_regression
from c2c.kv_cache import KeyValue


@strict
class MemoryConfig(FuserConfig):
    """Configuration of the memory fuser.

    Attributes:
        rank: width of the nonlinear part.
        slots: entries per handed-over cache; None for one per position, 0 for none at all.
    """

    model_type = "c2c_fuser_memory"
    rank: int = size(64)
    slots: int | None = size(None, low=0)


_RIDGE = 1e-2  # penalty of the initial map


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
        sharer, receiver = config.geometries
        if len(config.fused_layers) != receiver.layers:
            missing = [index for index, source in enumerate(config.layer_map) if source is None]
            raise FuserError(
                f"a memory fuser needs a sharer layer for each of the receiver's {receiver.layers} layers, since every "
                f"layer's cache grows; the layer map leaves out {missing}."
            )
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
        """Return ones, ``[layers, 2]``: memory entries have no gate."""
        return torch.ones(self.weight.shape[0], 2)

    @torch.no_grad()
    def initialise_from_data(self, data: Iterable[AlignedEntries]) -> bool:
        """Fit the affine map by ridge regression onto the receiver's own entries of the passages.

        Raises:
            FuserError: fewer than two aligned pairs.
        """
        found = ridge_regression((batch.channels() for batch in data), _RIDGE)
        self.mean.copy_(found.mean)
        self.scale.copy_(found.deviation)
        self.weight.copy_(found.weight * found.deviation.transpose(1, 2))
        self.bias.copy_(found.bias)
        return True

    def output_length(self, positions: int) -> int:
        """Return the number of slots, or one entry per position."""
        return positions if self.config.slots is None else self.config.slots

    def forward(self, sharer: Entries, receiver: Entries | None = None, mask: Tensor | None = None) -> list[KeyValue]:
        """Project.

        Args:
            sharer: entries of the sharer, one item per receiver layer, ``[batch, kv_heads, positions, head_dim]``.
            receiver: not read.
            mask: False on padding, ``[batch, positions]``.

        Returns:
            Keys without rotation and values, one pair per receiver layer, ``[batch, kv_heads, slots, head_dim]``.
            Without ``slots`` padding has entries too; the caller masks them.
        """
        batch, positions = sharer.keys[0].shape[0], sharer.keys[0].shape[2]
        x = ((sharer.channels() - self.mean) / self.scale).to(self.weight.dtype)
        hidden = nn.functional.gelu(torch.baddbmm(self.down_bias, x, self.down))
        entries = torch.bmm(x, self.weight) + torch.bmm(hidden, self.up) + self.bias.to(x.dtype)
        if self.config.slots is not None:
            shape = (len(entries), batch, positions, -1)
            entries = self._pool(entries.view(shape), hidden.view(shape), mask).flatten(1, 2)
        keys, values = split_channels(entries, batch, self.config.receiver_kv["kv_heads"])
        return list(zip(keys.unbind(), values.unbind(), strict=True))

    def _pool(self, entries: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Pool positions to slots as weighted means, ``[layers, batch, slots, outputs]``."""
        if not self.config.slots:
            return entries[:, :, :0]
        scores = torch.einsum("lbpr,lsr->lbsp", hidden, self.query) / self.config.rank**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[None, :, None, :], float("-inf"))
        return torch.einsum("lbsp,lbpo->lbso", scores.softmax(-1), entries)
