"""KV caches: the only module that touches the layers of a ``transformers`` cache.

Keys and values of a layer have shape ``[batch, kv_heads, tokens, head_dim]``; keys lie in the cache after the
rotary embedding (and after q/k norm where the model has one).

Hybrid models have other layers too: linear attention and convolutions keep a state, some layers keep nothing. *KV
layers* are those that keep keys and values of each token, in one shape; layer indices of this package count these. The
others stay in the cache as the model left them.
"""

from __future__ import annotations

import copy as copying
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from c2c.errors import CacheError

KeyValue = tuple[Tensor, Tensor]

_ADVICE = (
    "Use a model that keeps plain keys and values per token in at least some layers, and a DynamicCache without "
    "quantisation."
)
# by name: not every transformers that is supported has all of them
_KNOWN = ("DynamicLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer", "DummyLayer")


@dataclass(frozen=True)
class KVGeometry:
    """Hold the shape of a model's KV cache.

    Attributes:
        layers: number of KV layers.
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


def empty_cache(config: Any = None) -> DynamicCache:
    """Make a cache for the model of ``config`` in which attention layers keep all tokens, sliding-window layers too.

    A sliding layer of the usual cache drops the tokens outside its window, and what is not there can't be fused.
    The attention mask still applies the window, so the model computes the same.
    """
    planned = planned_layers(config) if config is not None else []
    cache = DynamicCache()
    if any(type(layer) is not DynamicLayer for layer in planned):  # else layers are made as the model fills them
        cache.layers, cache.layer_class_to_replicate = planned, None
    return cache


def planned_layers(config: Any) -> list[Any]:
    """Return empty cache layers for the model of ``config``, one per model layer.

    Raises:
        CacheError: transformers makes no cache for this model.
    """
    try:
        layers: list[Any] = DynamicCache(config=config.get_text_config(decoder=True)).layers
    except Exception as error:  # of a config without the fields that say how many layers there are
        raise CacheError(
            f"{config.model_type}: transformers makes no DynamicCache for it ({error}). {_ADVICE}"
        ) from error
    for index, entry in enumerate(layers):
        if type(entry) is DynamicSlidingWindowLayer:
            layers[index] = DynamicLayer()
        elif type(entry).__name__ == "LinearAttentionAndSlidingWindowAttentionLayer":
            layers[index] = cache_utils.LinearAttentionAndFullAttentionLayer(number_of_states=entry.number_of_states)
    return layers


def from_layers(layers: Iterable[KeyValue]) -> DynamicCache:
    """Make a cache of keys and values, layer by layer, without copying them."""
    cache = empty_cache()
    for keys, values in layers:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    setattr(cache, "_kv_layers", list(range(len(cache.layers))))  # noqa: B010  some may be empty, of another shape
    return cache


def check_layers(cache: Any) -> None:
    """Refuse a cache with layers that can't be fused.

    Raises:
        CacheError: not a ``Cache``, or a layer is sliding and trimmed, quantised or static.
    """
    if not isinstance(cache, Cache):
        raise CacheError(f"got a {type(cache).__name__} as KV cache, expected a transformers DynamicCache. {_ADVICE}")
    if bad := _unknown(cache.layers):
        raise CacheError(f"these cache layers can't be fused: {bad}. {_ADVICE}")


def check_model_layers(config: Any) -> None:
    """Refuse a model whose cache layers are of an unknown kind, or of whose layers none keeps keys and values.

    Raises:
        CacheError: naming the layers.
    """
    planned = planned_layers(config)
    if bad := _unknown(planned):
        raise CacheError(f"{config.model_type} has cache layers of a kind that can't be fused: {bad}. {_ADVICE}")
    if not any(isinstance(entry, DynamicLayer) for entry in planned):
        kinds = ", ".join(sorted({type(entry).__name__ for entry in planned}))
        raise CacheError(
            f"no layer of {config.model_type} keeps keys and values per token (its layers: {kinds}), so there is "
            f"nothing to fuse. {_ADVICE}"
        )


def _unknown(layers: Sequence[Any]) -> str:
    """List the layers of unknown kinds, with their types."""
    return ", ".join(
        f"{i} ({type(entry).__name__})" for i, entry in enumerate(layers) if type(entry).__name__ not in _KNOWN
    )


def kv_layers(cache: Cache) -> list[int]:
    """Return which layers of a filled cache are KV layers: those whose keys and values have the commonest shape."""
    known: list[int] | None = getattr(cache, "_kv_layers", None)
    if known is not None:
        return known
    shapes = {
        index: (*entry.keys.shape[1::2], *entry.values.shape[1::2])
        for index, entry in enumerate(cache.layers)
        if isinstance(entry, DynamicLayer) and entry.keys is not None and entry.values is not None
    }
    equal = [shape for shape in shapes.values() if shape[:2] == shape[2:]]
    if not equal:
        return []
    ((common, _),) = Counter(equal).most_common(1)
    found = [index for index, shape in shapes.items() if shape == common]
    setattr(cache, "_kv_layers", found)  # noqa: B010  looked up for every layer; a filled cache keeps its layers
    return found


def left_out(cache: Cache) -> dict[int, str]:
    """Return the layers of a filled cache that are no KV layers, with the reason."""
    reasons = {}
    for index in sorted(set(range(len(cache.layers))) - set(kv_layers(cache))):
        entry: Any = cache.layers[index]
        if isinstance(entry, DynamicLayer) and entry.keys is None:
            reasons[index] = "reads images only, no text"
        elif not isinstance(entry, DynamicLayer):
            reasons[index] = "a state, no keys and values per token" if _has_state(entry) else "no cache of its own"
        else:
            held: Any = entry
            shape = " and ".join(str(tuple(side.shape[1::2])) for side in (held.keys, held.values))
            reasons[index] = f"(heads, channels) of keys and values are {shape}, other than in most layers"
    return reasons


def other_attention_layers(cache: Cache) -> list[int]:
    """Return the attention layers of a filled cache that are no KV layers, since they have another shape."""
    found = kv_layers(cache)
    return [i for i, entry in enumerate(cache.layers) if isinstance(entry, DynamicLayer) and i not in found]


def stateful(cache: Cache) -> bool:
    """Whether a layer keeps a state of everything read, which can't be cut back to fewer tokens."""
    return any(_has_state(entry) for entry in cache.layers)


def _has_state(entry: Any) -> bool:
    return hasattr(entry, "conv_states")


def length(cache: Cache | None) -> int:
    """Count the tokens in the cache; 0 for none."""
    return 0 if cache is None else int(cache.get_seq_length())


def layer(cache: Cache, index: int) -> KeyValue:
    """Return keys and values of one KV layer, each ``[batch, kv_heads, tokens, head_dim]``; not copied."""
    return layers(cache)[index]


def layers(cache: Cache) -> list[KeyValue]:
    """Return keys and values of all KV layers; not copied."""
    entries: list[Any] = [cache.layers[index] for index in kv_layers(cache)]
    return [(entry.keys, entry.values) for entry in entries]


def set_layer(cache: Cache, index: int, keys: Tensor, values: Tensor) -> None:
    """Replace the keys and values of one KV layer.

    Raises:
        CacheError: the new tensors have another shape than the old ones.
    """
    entry: Any = cache.layers[kv_layers(cache)[index]]
    if keys.shape != entry.keys.shape or values.shape != entry.values.shape:
        raise CacheError(
            f"layer {index}: fused keys {tuple(keys.shape)} and values {tuple(values.shape)} do not have the shape of "
            f"the receiver's {tuple(entry.keys.shape)}; a fuser must keep the receiver's length and geometry."
        )
    entry.keys, entry.values = keys, values


def geometry(cache: Cache) -> KVGeometry:
    """Read the geometry of the KV layers of a filled cache.

    Raises:
        CacheError: no layer has keys and values of one shape.
    """
    found = layers(cache)
    if not found:
        raise CacheError(
            f"keys and values of no layer have the same shape, as in models that compress them: "
            f"{left_out(cache)}. {_ADVICE}"
        )
    return KVGeometry(len(found), found[0][0].shape[1], found[0][0].shape[3])


def copy(cache: Cache) -> DynamicCache:
    """Copy a cache; writing to the copy leaves the original alone."""
    return _joined([cache], lambda tensors: tensors[0].clone())


def view(cache: Cache) -> DynamicCache:
    """Return a cache with the same tensors; what is appended to it or put in their place leaves the original alone."""
    return _joined([cache], lambda tensors: tensors[0], lambda tensors: tensors[0].clone())


def zeros_like(cache: Cache) -> DynamicCache:
    """Make a cache of the same shapes with zeros."""
    return _joined([cache], lambda tensors: torch.zeros_like(tensors[0]))


def repeat(cache: Cache, times: int) -> Cache:
    """Repeat every row ``times`` times, in place, as beams and ``num_return_sequences`` need it."""
    if times > 1 and length(cache):
        keys, _ = layer(cache, 0)
        rows: Any = torch.arange(len(keys), device=keys.device).repeat_interleave(times)
        cache.reorder_cache(rows)
    return cache


def crop(cache: Cache, tokens: int) -> DynamicCache:
    """Crop a cache to its first ``tokens`` tokens, as views.

    Raises:
        CacheError: a layer keeps a state, which can't be cropped.
    """
    if stateful(cache) and tokens != length(cache):
        raise CacheError(f"a cache with a state can't be cropped to {tokens} tokens. Prefill these again.")
    return _joined([cache], lambda tensors: tensors[0][:, :, :tokens], lambda tensors: tensors[0].clone())


def append(cache: Cache, entries: Sequence[KeyValue]) -> Cache:
    """Add entries, keys rotated to their positions, to every KV layer, in place; an empty cache takes them as they are.

    Raises:
        CacheError: other layers than the cache has, or attention layers of another shape, which would not get any.
    """
    if not cache.layers:
        cache.layers.extend(from_layers(entries).layers)
        return cache
    attention: list[Any] = [entry for entry in cache.layers if isinstance(entry, DynamicLayer)]
    if len(attention) != len(entries):
        raise CacheError(
            f"entries for {len(entries)} layers can't be added to a cache with {len(attention)} attention layers: all "
            "must hold the same tokens. Models whose attention layers differ in shape take no private context."
        )
    for held, (keys, values) in zip(attention, entries, strict=True):
        if not held.is_initialized:
            held.lazy_initialization(keys, values)
            held.keys, held.values = keys, values
        else:
            held.keys = torch.cat([held.keys, keys.to(held.keys)], dim=2)
            held.values = torch.cat([held.values, values.to(held.values)], dim=2)
    return cache


def drop_padding(cache: Cache, tokens: int) -> DynamicCache:
    """Leave out the first ``tokens`` tokens, which are padding; a state has not read them."""
    return _joined([cache], lambda tensors: tensors[0][:, :, tokens:], lambda tensors: tensors[0].clone())


def stack(caches: Sequence[Cache], width: int = 0) -> DynamicCache:
    """Join caches along the batch; those shorter than the longest, or ``width``, get zeros on the left.

    The mask must hide these.

    Right for rotary models, since keys carry their position: moving a row to the right changes nothing in it.
    """
    width = max(width, *(length(cache) for cache in caches))

    def join(entries: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(x, (0, 0, width - x.shape[2], 0)) for x in entries])

    return _joined(caches, join, lambda tensors: torch.cat(list(tensors)))


def select_rows(cache: Cache, rows: Tensor) -> DynamicCache:
    """Select rows of a cache, in this order."""
    return _joined([cache], lambda tensors: tensors[0][rows.to(tensors[0].device)])


def select_columns(cache: Cache, row: int, columns: Tensor) -> DynamicCache:
    """Select one row of a cache, and those of its tokens where ``columns``, ``[tokens]``, is True."""
    found = columns.nonzero().flatten()
    return _joined(
        [cache],
        lambda tensors: tensors[0][row : row + 1].index_select(2, found.to(tensors[0].device)),
        lambda tensors: tensors[0][row : row + 1].clone(),
    )


def nbytes(cache: Cache) -> int:
    """Count the bytes of all keys and values."""
    return sum(keys.nbytes + values.nbytes for keys, values in layers(cache))


Join = Callable[[Sequence[Tensor]], Tensor]


def _joined(caches: Sequence[Cache], tokens: Join, states: Join | None = None) -> DynamicCache:
    """Make a cache whose keys and values are ``tokens(...)`` of those of the caches, and its states ``states(...)``."""
    made: Any = copying.copy(caches[0])
    made.layers = [
        _joined_layer(entries, tokens, states or tokens) for entries in zip(*(c.layers for c in caches), strict=True)
    ]
    result: DynamicCache = made
    return result


def _joined_layer(entries: Sequence[Any], tokens: Join, states: Join) -> Any:
    made = copying.copy(entries[0])
    for name, value in vars(made).items():
        if isinstance(value, dict):  # of the states of a layer, by number
            parts = {index: [getattr(entry, name)[index] for entry in entries] for index in value}
            tensors = name in ("conv_states", "recurrent_states")
            setattr(
                made,
                name,
                {i: states(part) if tensors and part[0] is not None else part[0] for i, part in parts.items()},
            )
    if isinstance(made, DynamicLayer) and made.keys is not None:
        made.keys, made.values = (tokens([getattr(entry, name) for entry in entries]) for name in ("keys", "values"))
    return made
