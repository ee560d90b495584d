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

from c2c.errors import CacheError


@dataclass(frozen=True)
class Rotary:
    """Rotate keys with the cosines and sines of their positions, each ``[batch, tokens, rotary_dim]`` in float32.

    ``rotary_dim`` may be smaller than the head: the remaining channels are not rotated.
    """

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rotate ``x`` of shape ``[..., batch, kv_heads, tokens, head_dim]``."""
        return self._turn(x, self.sin)

    def undo(self, x: Tensor) -> Tensor:
        """Invert :meth:`apply`, also where the model scales its rotation (YaRN)."""
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
    """Stack the tables of many layers, ``[layers, batch, tokens, rotary_dim]``."""
    first = tables[0]
    if all(table is first for table in tables):
        return Rotary(first.cos.unsqueeze(0), first.sin.unsqueeze(0))
    return Rotary(torch.stack([t.cos for t in tables]), torch.stack([t.sin for t in tables]))


def tables(model: PreTrainedModel, positions: Tensor) -> list[Rotary] | None:
    """Compute the rotary tables of every layer at ``positions`` (``[batch, tokens]``), from the model's own embedding.

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


def check(keys: Sequence[Tensor], tables: Sequence[Rotary] | None, name: str) -> None:
    """Check that ``tables`` describe how a model rotates its keys.

    A token alone attends only to itself, so that its keys differ between positions by their rotation and by nothing
    else.

    Args:
        keys: per layer the cached keys of one token at two positions, ``[2, kv_heads, 1, head_dim]``.
        tables: per layer at these positions; None where the model shows no rotary embedding.
        name: of the model, for the error.

    Raises:
        CacheError: keys at the two positions do not agree without their rotation.
    """
    for index, layer in enumerate(keys):
        tolerance, found = 1e-3 if layer.dtype == torch.float32 else 0.05, layer.float()
        if tables is None:  # keys that differ, but not in length, are rotated without a table
            same = torch.allclose(found[0], found[1], rtol=tolerance, atol=tolerance)
            matches = same or not torch.allclose(found[0].norm(dim=-1), found[1].norm(dim=-1), rtol=tolerance)
        else:
            table = Rotary(tables[index].cos.to(layer.device), tables[index].sin.to(layer.device))
            bare = table.undo(found)
            matches = torch.allclose(bare[0], bare[1], rtol=tolerance, atol=tolerance * float(bare.abs().max()))
        if not matches:
            raise CacheError(
                f"{name}: the rotary embedding of layer {index} can't be taken off its keys (this model rotates them "
                "in another way than Llama, Qwen and Gemma do). Use the 'c2c' fuser, which reads keys as they are."
            )
