"""The one module that touches cache layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    QuantoQuantizedLayer,
    StaticLayer,
)

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


def made(layers):
    """A cache as a model fills it."""
    cache = DynamicCache()
    for index, pair in enumerate(layers):
        cache.update(*pair, index)
    return cache


def test_layers_of_another_shape_are_left_out():
    """As in Gemma 4, whose full-attention layers have wider heads."""
    shapes = [(2, 4), (2, 4), (1, 8), (2, 4)]
    uneven = made([(torch.zeros(1, h, 5, d), torch.zeros(1, h, 5, d)) for h, d in shapes])
    assert kv_cache.geometry(uneven) == kv_cache.KVGeometry(3, 2, 4)
    assert kv_cache.kv_layers(uneven) == [0, 1, 3]
    assert list(kv_cache.left_out(uneven)) == kv_cache.other_attention_layers(uneven) == [2]
    kv_cache.set_layer(uneven, 2, torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
    assert [float(layer.keys.mean()) for layer in uneven.layers] == [0, 0, 0, 1]
    with pytest.raises(CacheError, match=r"3 layers.*4 attention layers"):
        kv_cache.append(uneven, kv_cache.layers(uneven))


def test_compressed_layers_have_no_geometry():
    compressed = made([(torch.zeros(1, 2, 4, 6), torch.zeros(1, 2, 4, 4))])
    with pytest.raises(CacheError, match="same shape"):
        kv_cache.geometry(compressed)


def hybrid(rows=1, tokens=4, seed=0):
    """A convolution, attention, attention beside a recurrent state, and a layer without any cache."""
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache()
    cache.layers = [LinearAttentionLayer(), DynamicLayer(), LinearAttentionAndFullAttentionLayer(), DummyLayer()]
    for index in (1, 2):
        cache.update(*torch.randn(2, rows, 2, tokens, 3, generator=generator), index)
    cache.update_conv_state(torch.randn(rows, 5, 3, generator=generator), 0)
    cache.update_recurrent_state(torch.randn(rows, 2, 4, generator=generator), 2)
    return cache


def states(cache):
    return cache.layers[0].conv_states[0], cache.layers[2].recurrent_states[0]


def test_states_are_carried_with_their_rows_and_are_nobody_elses():
    cache, other = hybrid(seed=1), hybrid(tokens=6, seed=2)
    assert kv_cache.kv_layers(cache) == [1, 2]
    assert list(kv_cache.left_out(cache)) == [0, 3]
    assert kv_cache.length(cache) == 4
    joined = kv_cache.stack([cache, other])
    for index, one in enumerate((cache, other)):
        row = kv_cache.select_rows(joined, torch.tensor([index]))
        assert all(torch.equal(a, b) for a, b in zip(states(row), states(one), strict=True))
        assert torch.equal(kv_cache.layer(row, 1)[0][:, :, -kv_cache.length(one) :], kv_cache.layer(one, 1)[0])
    repeated = kv_cache.repeat(kv_cache.copy(joined), 2)
    for mine, before in zip(states(repeated), states(joined), strict=True):
        assert torch.equal(mine, before.repeat_interleave(2, dim=0))
    for changed in (kv_cache.copy(cache), kv_cache.view(cache), kv_cache.crop(cache, 4)):
        before = [state.clone() for state in states(cache)]
        changed.update_conv_state(torch.ones(1, 5, 1), 0)
        changed.update(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3), 1)
        assert all(torch.equal(a, b) for a, b in zip(states(cache), before, strict=True))
        assert kv_cache.length(cache) == 4
    with pytest.raises(CacheError, match="state"):
        kv_cache.crop(cache, 2)


@pytest.mark.parametrize("kind", [DynamicSlidingWindowLayer, StaticLayer, QuantoQuantizedLayer])
def test_layers_that_do_not_keep_every_token_as_it_is_are_named(kind):
    cache = filled(layers=3)
    cache.layers[1] = object.__new__(kind)
    with pytest.raises(CacheError, match=rf"1 \({kind.__name__}\).*Use a model"):
        kv_cache.check_layers(cache)
    cache.layers[1] = DynamicLayer()
    kv_cache.check_layers(cache)


@pytest.mark.parametrize("given", [None, ((1, 2),), torch.zeros(1)])
def test_what_is_no_cache_is_refused(given):
    with pytest.raises(CacheError, match=f"got a {type(given).__name__} as KV cache, expected a transformers"):
        kv_cache.check_layers(given)
