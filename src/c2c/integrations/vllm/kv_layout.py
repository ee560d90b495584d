"""Layouts of vLLM's paged KV cache: each attention backend packs the tokens of a block in its own way."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from c2c.integrations.vllm.errors import UnsupportedError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class KVLayout(Protocol):
    """Access one layer of a paged cache by slots. A slot is ``block * block_size + offset``.

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
        """Return the keys and values in these slots, ``[tokens, heads, dim]`` each, copied."""
        ...

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values, ``[tokens, heads, dim]``, into these slots."""
        ...

    def clear(self, block: int) -> None:
        """Set a block to zero."""
        ...


class CPULayout:
    """Layout of the backend ``CPU_ATTN``: ``[blocks, heads, block_size, 2 * dim]``.

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
        """Return the keys and values in these slots."""
        blocks, offsets = slots // self.block_size, slots % self.block_size
        return self._keys[blocks, :, :, offsets].clone(), self._values[blocks, :, offsets].clone()

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values into these slots, by the backend's own kernel, which knows every packing."""
        keys, values = keys.to(self.dtype).contiguous(), values.to(self.dtype).contiguous()
        self._layer.impl.do_kv_cache_update(self._layer, keys, values, self._cache, slots)

    def clear(self, block: int) -> None:
        """Set a block to zero."""
        self._cache[block].zero_()


_LAYOUTS: dict[str, type[CPULayout]] = {"CPU_ATTN": CPULayout}


def layout_of(name: str, layer: Any, cache: Tensor, spec: Any) -> KVLayout:
    """Return the layout of the cache of one layer.

    Args:
        name: of the layer.
        layer: the attention layer of vLLM.
        cache: its cache.
        spec: what vLLM's cache manager says of it.

    Raises:
        UnsupportedError: another backend, or a kind of cache that was not tested.
    """
    backend = layer.get_attn_backend().get_name()
    if backend not in _LAYOUTS:
        raise UnsupportedError(
            f"{name} uses the attention backend {backend}, whose cache c2c can't read, only {', '.join(_LAYOUTS)}. "
            "Choose one of these, or write a KVLayout for it."
        )
    _check_spec(name, spec)
    if cache.dtype not in _DTYPES or cache.dtype != spec.dtype:
        raise UnsupportedError(f"{name} has a cache of {cache.dtype}; expected {spec.dtype}, not quantised.")
    expected = (spec.num_kv_heads, spec.block_size, 2 * spec.head_size)
    if tuple(cache.shape[1:]) != expected or not cache[0].is_contiguous():
        raise UnsupportedError(f"{name} has cache blocks of shape {tuple(cache.shape[1:])}; expected {expected}.")
    return _LAYOUTS[backend](layer, cache)


def _check_spec(name: str, spec: Any) -> None:
    kind = type(spec).__name__
    if kind != "FullAttentionSpec" or spec.sliding_window or spec.attention_chunk_size:
        raise UnsupportedError(
            f"{name} has a cache of the kind {kind} (sliding window: {getattr(spec, 'sliding_window', None)}); c2c was "
            "tested with full attention in every layer. Use c2c serve without --engine vllm for this model."
        )
    if getattr(spec.kv_quant_mode, "value", spec.kv_quant_mode) != 0 or spec.head_size_v not in (None, spec.head_size):
        raise UnsupportedError(f"{name} has a quantised cache, or values of another size than keys: not supported.")


def self_test(name: str, layout: KVLayout) -> None:
    """Write numbers into two blocks, read them back, and set the blocks to zero. Only while the cache is unused.

    Raises:
        UnsupportedError: what is read is not what was written, or was written elsewhere.
    """
    size = layout.block_size
    if layout.blocks < 3:
        raise UnsupportedError(f"{name} has {layout.blocks} cache blocks; expected at least 3. Give vLLM more memory.")
    first, second = layout.blocks - 2, layout.blocks - 1
    offsets = sorted({0, 1, size // 2, size - 1})
    slots = torch.tensor([first * size + at for at in offsets] + [second * size + at for at in offsets])
    shape = (len(slots), layout.heads, layout.dim)
    numbers = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(shape, generator=numbers).to(layout.dtype) for _ in range(2))
    rest = torch.tensor([block * size + at for block in (first, second) for at in range(size) if at not in offsets])
    for block in (first, second):
        layout.clear(block)
    layout.write(slots, keys, values)
    got, untouched = layout.read(slots), layout.read(rest)
    for block in (first, second):
        layout.clear(block)
    if not (torch.equal(got[0], keys) and torch.equal(got[1], values)) or any(bool(x.any()) for x in untouched):
        raise UnsupportedError(
            f"{name}: what was written into the KV cache is not what {type(layout).__name__} reads from it. Its blocks "
            "are packed in another way on this machine (another instruction set, or another vLLM), and fused entries "
            "would be wrong. Use c2c serve without --engine vllm."
        )
