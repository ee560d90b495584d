"""Layer maps: the published tables, their properties, and what can be wrong with one."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from c2c.errors import FuserError
from c2c.layer_map import NAMED, layer_map
from tiny import FIXTURES

TABLES = json.loads((FIXTURES / "mapping" / "layer_mappings.json").read_text())
OURS = {"last_aligned": "terminal", "k_nearest": "depth"}


@pytest.mark.parametrize("name", list(OURS))
def test_tables_of_the_published_code(name):
    assert len(TABLES[name]) > 190
    for sizes, expected in TABLES[name].items():
        receiver, sharer = map(int, sizes.split(","))
        assert layer_map(name, receiver, sharer) == expected, sizes
        assert layer_map(OURS[name], receiver, sharer) == expected, sizes


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(NAMED)), st.integers(1, 80), st.integers(1, 80))
def test_every_layer_reads_one_that_exists_in_order(name, receiver, sharer):
    found = layer_map(name, receiver, sharer)
    assert len(found) == receiver
    assert all(0 <= layer < sharer for layer in found)
    assert all(a <= b for a, b in pairwise(found))
    if receiver > 1 or NAMED[name] is NAMED["terminal"]:
        assert found[-1] == sharer - 1


@given(st.integers(1, 60))
def test_models_of_one_depth_are_mapped_layer_by_layer(layers):
    for name in NAMED:
        assert layer_map(name, layers, layers) == list(range(layers))


@given(st.integers(2, 60), st.integers(2, 60))
def test_depth_maps_the_ends_to_the_ends(receiver, sharer):
    found = layer_map("depth", receiver, sharer)
    assert (found[0], found[-1]) == (0, sharer - 1)


def test_an_explicit_map_is_taken_as_it_is():
    spec = (None, 0, 3, None)
    assert layer_map(spec, 4, 4) == [None, 0, 3, None]
    assert spec == (None, 0, 3, None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nearest", r"unknown layer map 'nearest'.*terminal, depth"),
        ([0, 1], "has 2 entries, the receiver has 3 layers"),
        ([0, 1, 2, 3], "has 4 entries, the receiver has 3 layers"),
        ([0, 4, 9], r"\[4, 9\]; the sharer has layers 0 to 3"),
        ([0, -1, 2], r"\[-1\]; the sharer has layers 0 to 3"),
        ([None, None, None], "no layer at all"),
        ([], "has 0 entries"),
    ],
)
def test_impossible_maps_say_what_is_wrong(spec, message):
    with pytest.raises(FuserError, match=message):
        layer_map(spec, 3, 4)
