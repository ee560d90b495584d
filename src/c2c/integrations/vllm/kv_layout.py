"""Layout of vLLM's paged KV cache: each attention backend packs the tokens of a block in its own way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from c2c.integrations.vllm.errors import UnsupportedError

_BACKEND = "CPU_ATTN"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CPULayout:
    """One layer of a paged cache of the backend ``CPU_ATTN``, by slots: ``block * block_size + offset``.

    A cache is ``[blocks, heads, block_size, 2 * dim]``; its last axis is not keys beside values. Each head of a block
    holds all keys, transposed to ``[dim, block_size]``, and then all values, ``[block_size, dim]``; with some
    instruction sets packed otherwise, which the self-test finds.

    Args:
        name: of the layer.
        layer: the attention layer of vLLM.
        cache: its cache.
        spec: what vLLM's cache manager says of it.

    Raises:
        UnsupportedError: another backend, or a kind of cache that was not tested.
    """

    def __init__(self, name: str, layer: Any, cache: Tensor, spec: Any) -> None:
        _check(name, layer, cache, spec)
        self.name, self._layer, self._cache = name, layer, cache
        self.blocks, self.heads, self.block_size, both = cache.shape
        self.dim, self.dtype = both // 2, cache.dtype
        flat, half = cache.flatten(2), self.block_size * self.dim  # a view: the blocks of a head are contiguous
        self._keys = flat[..., :half].unflatten(-1, (self.dim, self.block_size))
        self._values = flat[..., half:].unflatten(-1, (self.block_size, self.dim))

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values in these slots, ``[tokens, heads, dim]`` each, copied."""
        blocks, offsets = slots // self.block_size, slots % self.block_size
        return self._keys[blocks, :, :, offsets].clone(), self._values[blocks, :, offsets].clone()

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values, ``[tokens, heads, dim]``, by the backend's own kernel, which handles every packing."""
        keys, values = keys.to(self.dtype).contiguous(), values.to(self.dtype).contiguous()
        self._layer.impl.do_kv_cache_update(self._layer, keys, values, self._cache, slots)

    def self_test(self) -> None:
        """Write numbers into the last two blocks, read them back, and set the blocks to zero. Before the cache is used.

        Raises:
            UnsupportedError: what is read is not what was written, or was written elsewhere.
        """
        size = self.block_size
        if self.blocks < 3:
            raise UnsupportedError(
                f"{self.name} has {self.blocks} cache blocks; expected at least 3. Give vLLM more memory."
            )
        places = torch.arange(2 * size) + (self.blocks - 2) * size
        used = torch.isin(places % size, torch.tensor([0, 1, size // 2, size - 1]))
        numbers = torch.Generator().manual_seed(0)
        shape = (int(used.sum()), self.heads, self.dim)
        keys, values = (torch.randn(shape, generator=numbers).to(self.dtype) for _ in range(2))
        self._cache[-2:].zero_()
        self.write(places[used], keys, values)
        got, untouched = self.read(places[used]), self.read(places[~used])
        self._cache[-2:].zero_()
        if not (torch.equal(got[0], keys) and torch.equal(got[1], values)) or any(bool(x.any()) for x in untouched):
            raise UnsupportedError(
                f"{self.name}: what was written into the KV cache is not what is read from it. Its blocks are packed "
                "in another way on this machine (another instruction set, or another vLLM), and fused entries would "
                "be wrong. Use c2c serve without --engine vllm."
            )


def _check(name: str, layer: Any, cache: Tensor, spec: Any) -> None:
    backend, kind = layer.get_attn_backend().get_name(), type(spec).__name__
    if backend != _BACKEND:
        raise UnsupportedError(
            f"{name} uses the attention backend {backend}, whose cache c2c can't read, only {_BACKEND}. Choose it, or "
            "use c2c serve without --engine vllm."
        )
    if kind != "FullAttentionSpec" or spec.sliding_window or spec.attention_chunk_size:
        raise UnsupportedError(
            f"{name} has a cache of the kind {kind} (sliding window: {getattr(spec, 'sliding_window', None)}); c2c was "
            "tested with full attention in every layer. Use c2c serve without --engine vllm for this model."
        )
    if getattr(spec.kv_quant_mode, "value", spec.kv_quant_mode) != 0 or spec.head_size_v not in (None, spec.head_size):
        raise UnsupportedError(f"{name} has a quantised cache, or values of another size than keys: not supported.")
    if cache.dtype not in _DTYPES or cache.dtype != spec.dtype:
        raise UnsupportedError(f"{name} has a cache of {cache.dtype}; expected {spec.dtype}, not quantised.")
    expected = (spec.num_kv_heads, spec.block_size, 2 * spec.head_size)
    if tuple(cache.shape[1:]) != expected or not cache[0].is_contiguous():
        raise UnsupportedError(f"{name} has cache blocks of shape {tuple(cache.shape[1:])}; expected {expected}.")
