"""KV caches: the only module that touches the layers of a ``transformers`` cache.

Keys and values of a layer have shape ``[batch, kv_heads, tokens, head_dim]``; keys lie in the cache after the
rotary embedding (and after q/k norm where the model has one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from c2c.errors import CacheError

KeyValue = tuple[Tensor, Tensor]

_ADVICE = "Use a model with plain full or sliding-window attention, and a DynamicCache without quantisation."


@dataclass(frozen=True)
class KVGeometry:
    """Hold the shape of a model's KV cache.

    Attributes:
        layers: number of layers with a cache.
        kv_heads: key/value heads per layer.
        head_dim: channels per head.
    """

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Channels of all heads together: ``kv_heads * head_dim``."""
        return self.kv_heads * self.head_dim

    def to_dict(self) -> dict[str, int]:
        """Return a plain dict, for configs and manifests."""
        return asdict(self)


def empty_cache() -> DynamicCache:
    """Make a cache in which every layer keeps all tokens, sliding-window layers too.

    A sliding layer of the usual cache drops the tokens outside its window, and what is not there can't be fused.
    The attention mask still applies the window, so the model computes the same.
    """
    return DynamicCache()


def from_layers(layers: Iterable[KeyValue]) -> DynamicCache:
    """Make a cache of keys and values, layer by layer, without copying them."""
    cache = empty_cache()
    for keys, values in layers:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def check_layers(cache: Any) -> None:
    """Refuse a cache with layers that can't be fused.

    Raises:
        CacheError: not a ``Cache``, or a layer is sliding and trimmed, linear, shared, quantised or static.
    """
    if not isinstance(cache, Cache):
        raise CacheError(f"got a {type(cache).__name__} as KV cache, expected a transformers DynamicCache. {_ADVICE}")
    if bad := _named_layers(cache, [type(layer) is DynamicLayer for layer in cache.layers]):
        raise CacheError(f"these cache layers can't be fused: {bad}. {_ADVICE}")


def check_model_layers(config: Any) -> None:
    """Refuse a model some of whose layers keep no per-token keys and values.

    Raises:
        CacheError: a layer is linear attention, shares another's cache, or compresses its tokens.
    """
    planned = DynamicCache(config=config.get_text_config(decoder=True))
    fit = [type(layer) is DynamicLayer or getattr(layer, "is_sliding", False) for layer in planned.layers]
    if bad := _named_layers(planned, fit):
        raise CacheError(f"layers of {config.model_type} without a KV cache per token can't be fused: {bad}. {_ADVICE}")


def _named_layers(cache: Cache, fit: Sequence[bool]) -> str:
    """List the layers that do not fit, with their types."""
    return ", ".join(f"{i} ({type(cache.layers[i]).__name__})" for i, good in enumerate(fit) if not good)


def length(cache: Cache) -> int:
    """Count the tokens in the cache."""
    return int(cache.get_seq_length())


def layer(cache: Cache, index: int) -> KeyValue:
    """Return keys and values of one layer, each ``[batch, kv_heads, tokens, head_dim]``; not copied."""
    entry: Any = cache.layers[index]
    return entry.keys, entry.values


def layers(cache: Cache) -> list[KeyValue]:
    """Return keys and values of all layers; not copied."""
    return [layer(cache, index) for index in range(len(cache.layers))]


def set_layer(cache: Cache, index: int, keys: Tensor, values: Tensor) -> None:
    """Replace the keys and values of one layer.

    Raises:
        CacheError: the new tensors have another shape than the old ones.
    """
    entry: Any = cache.layers[index]
    if keys.shape != entry.keys.shape or values.shape != entry.values.shape:
        raise CacheError(
            f"layer {index}: fused keys {tuple(keys.shape)} and values {tuple(values.shape)} do not have the shape of "
            f"the receiver's {tuple(entry.keys.shape)}; a fuser must keep the receiver's length and geometry."
        )
    entry.keys, entry.values = keys, values


def geometry(cache: Cache) -> KVGeometry:
    """Read the geometry of a filled cache.

    Raises:
        CacheError: layers differ in shape, or keys and values do.
    """
    shapes = {(k.shape[1], k.shape[3], v.shape[1], v.shape[3]) for k, v in layers(cache)}
    if len(shapes) != 1 or next(iter(shapes))[:2] != next(iter(shapes))[2:]:
        raise CacheError(
            f"layers with different KV shapes can't be fused: (key heads, key dim, value heads, value dim) = "
            f"{sorted(shapes)}. {_ADVICE}"
        )
    heads, dim, _, _ = next(iter(shapes))
    return KVGeometry(len(cache.layers), heads, dim)


def copy(cache: Cache) -> DynamicCache:
    """Copy a cache; writing to the copy leaves the original alone."""
    return from_layers((keys.clone(), values.clone()) for keys, values in layers(cache))


def zeros_like(cache: Cache) -> DynamicCache:
    """Make a cache of the same shapes with zeros."""
    return from_layers((torch.zeros_like(keys), torch.zeros_like(values)) for keys, values in layers(cache))


def repeat(cache: Cache, times: int) -> Cache:
    """Repeat every row ``times`` times, in place, as beams and ``num_return_sequences`` need it."""
    if times > 1:
        cache.batch_repeat_interleave(times)
    return cache


def crop(cache: Cache, tokens: int) -> DynamicCache:
    """Crop a cache to its first ``tokens`` tokens, as views."""
    return from_layers((keys[:, :, :tokens], values[:, :, :tokens]) for keys, values in layers(cache))


def append(cache: Cache, entries: Sequence[KeyValue]) -> Cache:
    """Add entries, keys rotated to their positions, to every layer, in place; an empty cache takes them as they are.

    Raises:
        CacheError: other layers than the cache has.
    """
    if not cache.layers:
        cache.layers.extend(from_layers(entries).layers)
        return cache
    if len(cache.layers) != len(entries):
        raise CacheError(f"entries for {len(entries)} layers can't be added to a cache of {len(cache.layers)}.")
    for entry, (keys, values) in zip(cache.layers, entries, strict=True):
        held: Any = entry
        held.keys = torch.cat([held.keys, keys.to(held.keys)], dim=2)
        held.values = torch.cat([held.values, values.to(held.values)], dim=2)
    return cache


def stack(caches: Sequence[Cache]) -> DynamicCache:
    """Join caches along the batch; shorter ones get zeros on the left, which the mask must hide.

    Right for rotary models, since keys carry their position: moving a row to the right changes nothing in it.
    """
    width = max(length(cache) for cache in caches)

    def join(entries: Iterable[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(x, (0, 0, width - x.shape[2], 0)) for x in entries])

    rows = zip(*(layers(cache) for cache in caches), strict=True)
    return from_layers((join(keys), join(values)) for keys, values in (zip(*row, strict=True) for row in rows))


def select_rows(cache: Cache, rows: Tensor) -> DynamicCache:
    """Select rows of a cache, in this order."""
    return from_layers((keys[rows.to(keys.device)], values[rows.to(values.device)]) for keys, values in layers(cache))


def nbytes(cache: Cache) -> int:
    """Count the bytes of all keys and values."""
    return sum(keys.nbytes + values.nbytes for keys, values in layers(cache))
