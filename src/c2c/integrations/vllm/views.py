"""Reading and writing single tokens of vLLM's paged KV cache. Each attention backend packs blocks its own way."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from c2c.integrations.vllm.errors import UnsupportedError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class KVView(Protocol):
    """One layer of a paged cache. A slot is ``block * block_size + offset``.

    Attributes:
        block_size: tokens per block.
        blocks: how many.
        heads: key/value heads.
        dim: channels per head.
        dtype: type of the entries.
    """

    block_size: int
    blocks: int
    heads: int
    dim: int
    dtype: torch.dtype

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in these slots, ``[tokens, heads, dim]`` each, copied."""
        ...

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values, ``[tokens, heads, dim]``, into these slots."""
        ...

    def clear(self, block: int) -> None:
        """Set a block to zero."""
        ...


class CPUView:
    """The cache of the backend ``CPU_ATTN``: ``[blocks, heads, block_size, 2 * dim]``.

    Its last axis is not keys beside values. Each head of a block holds all keys, transposed to ``[dim, block_size]``,
    and then all values, ``[block_size, dim]``; with some instruction sets packed otherwise, which the self-test finds.

    Args:
        layer: the attention layer of vLLM.
        cache: its cache.
    """

    def __init__(self, layer: Any, cache: Tensor) -> None:
        self._layer, self._cache = layer, cache
        self.blocks, self.heads, self.block_size, both = cache.shape
        self.dim, self.dtype = both // 2, cache.dtype
        flat, half = cache.flatten(2), self.block_size * self.dim  # a view: the blocks of a head are contiguous
        self._keys = flat[..., :half].unflatten(-1, (self.dim, self.block_size))
        self._values = flat[..., half:].unflatten(-1, (self.block_size, self.dim))

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in these slots."""
        blocks, offsets = slots // self.block_size, slots % self.block_size
        return self._keys[blocks, :, :, offsets].clone(), self._values[blocks, :, offsets].clone()

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values into these slots, by the backend's own kernel, which knows every packing."""
        keys, values = keys.to(self.dtype).contiguous(), values.to(self.dtype).contiguous()
        self._layer.impl.do_kv_cache_update(self._layer, keys, values, self._cache, slots)

    def clear(self, block: int) -> None:
        """Set a block to zero."""
        self._cache[block].zero_()


_VIEWS: dict[str, type[CPUView]] = {"CPU_ATTN": CPUView}


def view_of(name: str, layer: Any, cache: Tensor, spec: Any) -> KVView:
    """How to read and write the cache of one layer.

    Args:
        name: of the layer.
        layer: the attention layer of vLLM.
        cache: its cache.
        spec: what vLLM's cache manager says of it.

    Raises:
        UnsupportedError: another backend, or a kind of cache that was not tested.
    """
    backend = layer.get_attn_backend().get_name()
    if backend not in _VIEWS:
        raise UnsupportedError(
            f"{name} uses the attention backend {backend}, whose cache c2c can't read; known are {', '.join(_VIEWS)}. "
            "Choose one of these, or write a KVView for it."
        )
    _check_spec(name, spec)
    if cache.dtype not in _DTYPES or cache.dtype != spec.dtype:
        raise UnsupportedError(f"{name} has a cache of {cache.dtype}; expected {spec.dtype}, not quantised.")
    expected = (spec.num_kv_heads, spec.block_size, 2 * spec.head_size)
    if tuple(cache.shape[1:]) != expected or not cache[0].is_contiguous():
        raise UnsupportedError(f"{name} has cache blocks of shape {tuple(cache.shape[1:])}; expected {expected}.")
    return _VIEWS[backend](layer, cache)


def _check_spec(name: str, spec: Any) -> None:
    kind = type(spec).__name__
    if kind != "FullAttentionSpec" or spec.sliding_window or spec.attention_chunk_size:
        raise UnsupportedError(
            f"{name} has a cache of the kind {kind} (sliding window: {getattr(spec, 'sliding_window', None)}); c2c was "
            "tested with full attention in every layer. Use c2c serve without --engine vllm for this model."
        )
    if getattr(spec.kv_quant_mode, "value", spec.kv_quant_mode) != 0 or spec.head_size_v not in (None, spec.head_size):
        raise UnsupportedError(f"{name} has a quantised cache, or values of another size than keys: not supported.")


def self_test(name: str, view: KVView) -> None:
    """Write numbers into two blocks, read them back, and set the blocks to zero. Only while the cache is unused.

    Raises:
        UnsupportedError: what is read is not what was written, or was written elsewhere.
    """
    size = view.block_size
    if view.blocks < 3:
        raise UnsupportedError(f"{name} has {view.blocks} cache blocks; expected at least 3. Give vLLM more memory.")
    first, second = view.blocks - 2, view.blocks - 1
    offsets = sorted({0, 1, size // 2, size - 1})
    slots = torch.tensor([first * size + at for at in offsets] + [second * size + at for at in offsets])
    shape = (len(slots), view.heads, view.dim)
    numbers = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(shape, generator=numbers).to(view.dtype) for _ in range(2))
    rest = torch.tensor([block * size + at for block in (first, second) for at in range(size) if at not in offsets])
    for block in (first, second):
        view.clear(block)
    view.write(slots, keys, values)
    got, untouched = view.read(slots), view.read(rest)
    for block in (first, second):
        view.clear(block)
    if not (torch.equal(got[0], keys) and torch.equal(got[1], values)) or any(bool(x.any()) for x in untouched):
        raise UnsupportedError(
            f"{name}: what was written into the KV cache is not what {type(view).__name__} reads from it. Its blocks "
            "are packed in another way on this machine (another instruction set, or another vLLM), and fused entries "
            "would be wrong. Use c2c serve without --engine vllm."
        )
