"""The one module that touches cache layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, QuantoQuantizedLayer, StaticLayer

from c2c import kv_cache
from c2c.errors import CacheError
from tiny import assert_equal_caches, entries

sizes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.integers(1, 5))
quick = settings(max_examples=40, deadline=None)


def filled(layers=2, rows=1, heads=2, tokens=5, dim=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, heads, tokens, dim)
    return kv_cache.from_layers(
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(layers)
    )


@quick
@given(sizes)
def test_a_cache_from_layers_is_what_a_model_would_have_made(size):
    layers, rows, heads, tokens, dim = size
    cache, grown = filled(*size), DynamicCache()
    for index, (keys, values) in enumerate(kv_cache.layers(cache)):
        grown.update(keys, values, index)
    assert_equal_caches(cache, grown)
    assert kv_cache.length(cache) == tokens
    assert kv_cache.geometry(cache) == kv_cache.KVGeometry(layers, heads, dim)
    assert kv_cache.nbytes(cache) == layers * 2 * rows * heads * tokens * dim * 4
    kv_cache.check_layers(cache)
    more = torch.ones(rows, heads, 1, dim)
    cache.update(more, more, 0)
    assert kv_cache.layer(cache, 0)[0].shape[2] == tokens + 1


def test_from_layers_does_not_copy_and_copy_does():
    keys, values = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    cache = kv_cache.from_layers([(keys, values)])
    independent = kv_cache.copy(cache)
    keys += 1
    assert kv_cache.layer(cache, 0)[0].sum() == 4
    assert kv_cache.layer(independent, 0)[0].sum() == 0


@quick
@given(sizes, st.data())
def test_crop_then_grow_is_the_whole(size, data):
    cache = filled(*size)
    cut = data.draw(st.integers(1, size[3]))
    front = kv_cache.crop(cache, cut)
    assert kv_cache.length(front) == cut
    assert kv_cache.length(cache) == size[3]
    for index, (keys, values) in enumerate(kv_cache.layers(cache)):
        if cut < size[3]:
            front.update(keys[:, :, cut:], values[:, :, cut:], index)
    assert_equal_caches(front, cache)


@quick
@given(sizes, st.integers(1, 4))
def test_repeat_repeats_each_row_in_place(size, times):
    cache = filled(*size)
    before = [entry.clone() for entry in entries(cache)]
    assert kv_cache.repeat(cache, times) is cache
    for entry, old in zip(entries(cache), before, strict=True):
        assert entry.shape[0] == old.shape[0] * times
        for row in range(entry.shape[0]):
            assert torch.equal(entry[row], old[row // times])


@quick
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=4))
def test_stack_pads_on_the_left_and_keeps_every_row(parts):
    caches = [filled(rows=rows, tokens=tokens, seed=i) for i, (rows, tokens) in enumerate(parts)]
    joined = kv_cache.stack(caches)
    width = max(tokens for _, tokens in parts)
    assert kv_cache.length(joined) == width
    for index in range(2):
        for side in range(2):
            row = 0
            entry = kv_cache.layer(joined, index)[side]
            for cache, (rows, tokens) in zip(caches, parts, strict=True):
                block = entry[row : row + rows]
                assert torch.equal(block[:, :, width - tokens :], kv_cache.layer(cache, index)[side])
                assert not block[:, :, : width - tokens].any()
                row += rows
            assert row == entry.shape[0]


@quick
@given(st.permutations(range(4)))
def test_select_rows_permutes(order):
    cache = filled(rows=4)
    moved = kv_cache.select_rows(cache, torch.tensor(order))
    for entry, old in zip(entries(moved), entries(cache), strict=True):
        for place, row in enumerate(order):
            assert torch.equal(entry[place], old[row])
    assert_equal_caches(kv_cache.select_rows(moved, torch.tensor(order).argsort()), cache)


@pytest.mark.parametrize("shape", [(1, 2, 6, 3), (2, 2, 5, 3), (1, 1, 5, 3), (1, 2, 5, 4)])
def test_a_layer_keeps_its_shape(shape):
    cache = filled()
    old = kv_cache.layer(cache, 1)
    with pytest.raises(CacheError, match=r"layer 1: fused keys.*\(1, 2, 5, 3\)"):
        kv_cache.set_layer(cache, 1, torch.zeros(shape), old[1])
    with pytest.raises(CacheError, match="layer 1"):
        kv_cache.set_layer(cache, 1, old[0], torch.zeros(shape))
    assert kv_cache.layer(cache, 1)[0] is old[0]
    kv_cache.set_layer(cache, 1, torch.ones_like(old[0]), old[1])
    assert kv_cache.layer(cache, 1)[0].eq(1).all()


def test_layers_of_different_shapes_have_no_geometry():
    uneven = kv_cache.from_layers([(torch.zeros(1, h, 4, 2), torch.zeros(1, h, 4, 2)) for h in (1, 2)])
    with pytest.raises(CacheError, match="different KV shapes"):
        kv_cache.geometry(uneven)
    compressed = kv_cache.from_layers([(torch.zeros(1, 2, 4, 6), torch.zeros(1, 2, 4, 4))])
    with pytest.raises(CacheError, match="different KV shapes"):
        kv_cache.geometry(compressed)


@pytest.mark.parametrize("kind", [DynamicSlidingWindowLayer, StaticLayer, QuantoQuantizedLayer])
def test_layers_that_do_not_keep_every_token_as_it_is_are_named(kind):
    cache = filled(layers=3)
    cache.layers[1] = object.__new__(kind)
    with pytest.raises(CacheError, match=rf"1 \({kind.__name__}\).*Use a model with"):
        kv_cache.check_layers(cache)
    cache.layers[1] = DynamicLayer()
    kv_cache.check_layers(cache)


@pytest.mark.parametrize("given", [None, ((1, 2),), torch.zeros(1)])
def test_what_is_no_cache_is_refused(given):
    with pytest.raises(CacheError, match=f"got a {type(given).__name__} as KV cache, expected a transformers"):
        kv_cache.check_layers(given)
