"""Rotary position embedding, taken off cached keys and put back (Su et al., 2021, arXiv:2104.09864).

A key in a cache is ``R(p) k``, with ``p`` its position. Two models rotate with different bases, so a fuser that reads
rotated keys would have to learn both rotations at every position; it reads ``k`` instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of some positions, each ``[batch, tokens, rotary_dim]`` in float32.

    ``rotary_dim`` may be smaller than the head: the remaining channels are not rotated.
    """

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rotate ``x`` of shape ``[..., batch, kv_heads, tokens, head_dim]``."""
        return self._turn(x, self.sin)

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`apply`, also where the model scales its rotation (YaRN)."""
        scale = (self.cos[..., :1].square() + self.sin[..., :1].square()).unsqueeze(-3)
        turned, rest = self._split(self._turn(x, -self.sin))
        return torch.cat([turned / scale.to(x.dtype), rest], dim=-1)

    def _turn(self, x: Tensor, sin: Tensor) -> Tensor:
        part, rest = self._split(x)
        half = part.shape[-1] // 2
        swapped = torch.cat([-part[..., half:], part[..., :half]], dim=-1)
        cos, sin = self.cos.unsqueeze(-3).to(x.dtype), sin.unsqueeze(-3).to(x.dtype)
        return torch.cat([part * cos + swapped * sin, rest], dim=-1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : self.cos.shape[-1]], x[..., self.cos.shape[-1] :]


def stack(tables: Sequence[Rotary]) -> Rotary:
    """One table for many layers, ``[layers, batch, tokens, rotary_dim]``."""
    first = tables[0]
    if all(table is first for table in tables):
        return Rotary(first.cos.unsqueeze(0), first.sin.unsqueeze(0))
    return Rotary(torch.stack([t.cos for t in tables]), torch.stack([t.sin for t in tables]))


def tables(model: PreTrainedModel, positions: Tensor) -> list[Rotary] | None:
    """The rotary tables of every layer at ``positions`` (``[batch, tokens]``), from the model's own embedding.

    Layers that rotate alike share one table. None for a model without rotary embedding.
    """
    embedding = getattr(model.get_decoder(), "rotary_emb", None)
    if embedding is None:
        return None
    config = model.config.get_text_config(decoder=True)
    probe = torch.empty(0, dtype=torch.float32, device=positions.device)
    if "layer_type" not in inspect.signature(embedding.forward).parameters:
        table = Rotary(*embedding(probe, positions))
        return [table] * config.num_hidden_layers
    by_type = {name: Rotary(*embedding(probe, positions, name)) for name in set(config.layer_types)}
    return [by_type[name] for name in config.layer_types]
