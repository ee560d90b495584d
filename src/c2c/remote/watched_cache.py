"""A cache that tells of each layer as soon as the forward pass has made it, while the next ones are still to come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import DynamicCache


class WatchedCache(DynamicCache):
    """Like :func:`c2c.kv_cache.empty_cache`, all tokens in every layer, with a listener.

    Args:
        made: called with layer, keys and values, each ``[rows, kv_heads, tokens, head_dim]``. What it raises stops the
            forward pass.
    """

    def __init__(self, made: Callable[[int, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._made = made

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the attention of layer ``layer_idx``."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._made(layer_idx, keys, values)
        return keys, values
