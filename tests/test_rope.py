"""The rotation comes off the keys of every family that is let through, and those of others are refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from c2c import C2CModel, kv_cache, rope
from c2c.errors import CacheError
from c2c.families import build_tiny
from c2c.fusers import BottleneckFuser, Entries
from c2c.language_model import Receiver
from c2c.prefill import prefill
from c2c.sharer import Sharer
from c2c.tokens import TokenBatch
from tiny import SIZES, build, tokenizer

POSITIONS = [0, 1, 7, 63, 200, 500]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
SMALL |= {"vocab_size": 512, "initializer_range": 0.3, "max_position_embeddings": 512}


def llama(**rope_parameters):
    torch.manual_seed(0)
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(rope_parameters={"rope_theta": 10000.0, **rope_parameters}, **heads, **SIZES))


def other(family, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SMALL | options)))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
MODELS = {
    **{family: partial(build, family) for family in ("llama", "qwen2", "qwen3", "gemma3")},
    "llama3": partial(llama, **LLAMA3, low_freq_factor=1.0, high_freq_factor=4.0),
    "yarn": partial(llama, **YARN),
    "linear": partial(llama, rope_type="linear", factor=4.0),
    "neox, partial": partial(other, "gpt_neox", rotary_pct=0.25),
    "stablelm, partial": partial(other, "stablelm", num_key_value_heads=1),
    "interleaved": partial(other, "cohere", num_key_value_heads=1),
    "interleaved, partial": partial(build_tiny, "glm4"),
    "complex table": partial(build_tiny, "llama4_text"),
    "half a table": partial(build_tiny, "gpt_oss"),
    "backwards": partial(build_tiny, "nanochat"),
}
GPT = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 512}


@pytest.mark.parametrize("name", MODELS)
def test_undone_keys_do_not_depend_on_the_position(name):
    """Keys of one token at several positions, each alone in its row, differ by their rotation only."""
    model = MODELS[name]().eval()
    ids, positions = torch.full((len(POSITIONS), 1), 5), torch.tensor(POSITIONS).unsqueeze(1)
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), positions, padded=False)
    receiver = Receiver(model)
    layers = zip(
        receiver.rotary(positions), receiver.rope_scheme, kv_cache.layers(prefill(model, batch, 1)), strict=True
    )
    for table, convention, (keys, _) in layers:
        if convention is None:  # Llama 4 and SmolLM3 rotate nothing in some layers
            assert torch.equal(keys, keys[:1].expand_as(keys))
            assert torch.equal(table.apply(keys), keys)
            continue
        assert not torch.allclose(keys, keys[:1].expand_as(keys), atol=1e-2)  # else there is nothing to undo
        bare = table.undo(keys)
        assert torch.allclose(bare, bare[:1].expand_as(bare), atol=1e-4 * float(bare.abs().max()))
        assert torch.allclose(table.apply(bare), keys, atol=1e-4 * float(keys.abs().max()))


def test_gemma_layers_have_tables_of_their_own():
    model = build("gemma3")
    tables, types = Receiver(model).rotary(torch.tensor([[3, 30]])), model.config.layer_types
    for table, kind in zip(tables, types, strict=True):
        assert [torch.equal(table.cos, one.cos) for one in tables] == [kind == one for one in types]
    stacked = rope.stack(tables)
    x = torch.randn(len(types), 1, 2, 2, 16)
    for index, table in enumerate(tables):
        assert torch.equal(stacked.apply(x)[index], table.apply(x[index]))
        assert torch.equal(stacked.undo(x)[index], table.undo(x[index]))


def test_yarn_scales_and_the_scale_is_undone_once():
    table = Receiver(llama(**YARN)).rotary(torch.tensor([[9]]))[0]
    scale = float(table.cos[0, 0, 0] ** 2 + table.sin[0, 0, 0] ** 2)
    assert scale > 1.05
    x = torch.randn(1, 2, 1, 12)
    assert float(table.apply(x).norm() / x.norm()) == pytest.approx(scale**0.5, rel=1e-4)
    assert torch.allclose(table.undo(table.apply(x)), x, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    half=st.integers(1, 8),
    rest=st.integers(0, 6),
    rows=st.integers(1, 3),
    tokens=st.integers(1, 5),
    scale=st.floats(0.5, 2.0),
    interleaved=st.booleans(),
    last=st.booleans(),
)
def test_undo_inverts_apply_and_channels_beyond_the_rotation_are_left(
    seed, half, rest, rows, tokens, scale, interleaved, last
):
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(rows, tokens, half, generator=generator) * 500
    table = rope.Rotary(scale * angles.cos(), scale * angles.sin(), interleaved, last)
    x = torch.randn(2, rows, 3, tokens, 2 * half + rest, generator=generator)
    assert torch.allclose(table.undo(table.apply(x)), x, atol=1e-5)
    assert torch.allclose(table.apply(table.undo(x)), x, atol=1e-5)
    for turned in (table.apply(x), table.undo(x)):
        still = slice(0, rest) if last else slice(2 * half, None)
        assert torch.equal(turned[..., still], x[..., still])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 300), st.integers(0, 300))
def test_scores_depend_on_the_distance_alone(seed, a, b):
    """Rotating query and key by their positions is rotating by the difference: this is the rotary embedding."""
    generator = torch.Generator().manual_seed(seed)

    def table(position):
        angles = (position * torch.tensor([1.0, 0.3, 0.05, 0.01])).reshape(1, 1, 4)
        return rope.Rotary(angles.cos(), angles.sin())

    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator)
    rotated = (table(a).apply(query) * table(b).apply(key)).sum()
    assert float(rotated) == pytest.approx(float((table(a - b).apply(query) * key).sum()), abs=1e-3)


def test_the_bottleneck_gives_the_same_at_every_position():
    """It reads keys without their rotation and puts the receiver's back on what it adds."""
    layers = [0, 1, 2, 2]
    sharer, receiver = kv_cache.KVGeometry(3, 2, 12), kv_cache.KVGeometry(4, 1, 16)
    tables = Receiver(build("gemma3")).rotary(torch.tensor([[0, 5, 300]]))
    sharer_tables = Receiver(llama(rope_theta=1e6)).rotary(torch.tensor([[2, 90, 41]]))
    fuser = BottleneckFuser.from_geometry(sharer, receiver, layers, rank=8)
    torch.nn.init.normal_(fuser.up)

    def repeated(geometry):
        """The same entry at every position, for each layer."""
        return [torch.randn(1, geometry.kv_heads, 1, geometry.head_dim).expand(-1, -1, 3, -1) for _ in layers]

    def rotated(keys, values, tables):
        return Entries([table.apply(key) for table, key in zip(tables, keys, strict=True)], values, tables)

    keys = repeated(receiver)
    mine = rotated(keys, repeated(receiver), tables)
    with torch.no_grad():
        fused = fuser(rotated(repeated(sharer), repeated(sharer), [sharer_tables[i] for i in layers]), mine)
    for (new_keys, new_values), table, own in zip(fused, tables, keys, strict=True):
        free = table.undo(new_keys)
        assert (free - own).abs().max() > 0.1
        assert torch.allclose(free, free[:, :, :1].expand_as(free), atol=1e-4)
        assert torch.allclose(new_values, new_values[:, :, :1].expand_as(new_values), atol=1e-4)


def test_an_unknown_rotation_is_refused_by_fusers_that_undo_it():
    """GPT-J has a table of its own in each layer; a fuser that reads bare keys would read noise."""
    receiver, sharer = (
        Receiver(build("llama"), tokenizer("chatml")),
        Sharer(other("gptj", rotary_dim=8, **GPT), tokenizer("llama3")),
    )
    with pytest.raises(CacheError, match=r"rotary.*'c2c' fuser"):
        sharer.check_rotary()
    with pytest.raises(CacheError, match="rotary"):
        C2CModel.from_models(receiver, sharer)
    options = {"hidden_dim": 8, "intermediate_dim": 8}
    published = C2CModel.from_models(receiver, sharer, fuser="c2c", fuser_options=options)
    assert published.generate("Hello", max_new_tokens=2).new_tokens == 2


def test_learned_positions_are_no_rotation():
    """GPT-2 adds positions to its input; nothing has to be taken off its keys."""
    assert Receiver(other("gpt2", **GPT)).rotary(torch.tensor([[0, 1]])) is None


def test_large_biases_do_not_hide_the_rotation():
    """Qwen2's key biases make some channels a hundred times as large as others, in which bfloat16 rounds the rest."""
    model = build("qwen2")
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[-1] = 200.0
    assert all(convention is not None for convention in Receiver(model.bfloat16()).rope_scheme)


def test_layers_that_rotate_in_different_ways_are_rotated_together():
    angles = torch.rand(1, 3, 2)
    ways = [rope.Rotary(angles.cos(), angles.sin(), interleaved) for interleaved in (False, True)]
    x = torch.randn(2, 1, 2, 3, 6)
    stacked = rope.stack(ways)
    assert torch.equal(stacked.apply(x), torch.stack([way.apply(part) for way, part in zip(ways, x, strict=True)]))
    assert torch.allclose(stacked.undo(stacked.apply(x)), x, atol=1e-5)
