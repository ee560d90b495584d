"""The rotation comes off the keys of every family that is let through, and those of others are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from c2c import C2CModel, kv_cache, rope
from c2c.errors import CacheError
from c2c.fusers import BottleneckFuser, Entries
from c2c.language_model import Receiver, Sharer
from c2c.prefill import prefill
from c2c.tokens import TokenBatch
from tiny import SIZES, build, tokenizer

POSITIONS = [0, 1, 7, 63, 200, 500]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 64}


def llama(**rope_parameters):
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_theta": 10000.0, **rope_parameters},
        **SIZES,
    )
    return LlamaForCausalLM(config)


def llama3_scaled():
    return llama(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )


def yarn():
    return llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)


def linear():
    return llama(rope_type="linear", factor=4.0)


def neox():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(num_hidden_layers=2, rotary_pct=0.25, max_position_embeddings=512, initializer_range=0.3, **SMALL)
    )


def stablelm():
    torch.manual_seed(0)
    return StableLmForCausalLM(
        StableLmConfig(num_hidden_layers=2, num_key_value_heads=1, initializer_range=0.3, **SMALL)
    )


MODELS = {
    "llama": lambda: build("llama"),
    "qwen2": lambda: build("qwen2"),
    "qwen3": lambda: build("qwen3"),
    "gemma3": lambda: build("gemma3"),
    "llama3": llama3_scaled,
    "yarn": yarn,
    "linear": linear,
    "neox, partial": neox,
    "stablelm, partial": stablelm,
}


def lonely_keys(model):
    """Keys of one token at several positions, each alone in its row: they differ by their rotation only."""
    ids = torch.full((len(POSITIONS), 1), 5)
    positions = torch.tensor(POSITIONS).unsqueeze(1)
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), positions, padded=False)
    return [keys for keys, _ in kv_cache.layers(prefill(model.eval(), batch, 1))], positions


@pytest.mark.parametrize("name", list(MODELS))
def test_undone_keys_do_not_depend_on_the_position(name):
    model = MODELS[name]()
    keys, positions = lonely_keys(model)
    tables = rope.tables(model, positions)
    assert len(tables) == len(keys)
    for table, entry in zip(tables, keys, strict=True):
        assert not torch.allclose(entry, entry[:1].expand_as(entry), atol=1e-2)  # else there is nothing to undo
        bare = table.undo(entry)
        assert torch.allclose(bare, bare[:1].expand_as(bare), atol=1e-4 * float(bare.abs().max()))
        assert torch.allclose(table.apply(bare), entry, atol=1e-4 * float(entry.abs().max()))
    Receiver(model).check_rotary()


def test_gemma_layers_have_tables_of_their_own():
    model = build("gemma3")
    tables = rope.tables(model, torch.tensor([[3, 30]]))
    types = model.config.layer_types
    for index, kind in enumerate(types):
        for other, other_kind in enumerate(types):
            assert torch.equal(tables[index].cos, tables[other].cos) == (kind == other_kind)
    stacked = rope.stack(tables)
    assert stacked.cos.shape[0] == len(types)
    x = torch.randn(len(types), 1, 2, 2, 16)
    for index, table in enumerate(tables):
        assert torch.equal(stacked.apply(x)[index], table.apply(x[index]))
        assert torch.equal(stacked.undo(x)[index], table.undo(x[index]))


def test_yarn_scales_and_the_scale_is_undone_once():
    table = rope.tables(yarn(), torch.tensor([[9]]))[0]
    scale = float(table.cos[0, 0, 0] ** 2 + table.sin[0, 0, 0] ** 2)
    assert scale > 1.05
    x = torch.randn(1, 2, 1, 12)
    assert float(table.apply(x).norm() / x.norm()) == pytest.approx(scale**0.5, rel=1e-4)
    assert torch.allclose(table.undo(table.apply(x)), x, atol=1e-5)


@pytest.mark.parametrize("make", [neox, stablelm])
def test_partial_rotary_leaves_the_other_channels(make):
    table = rope.tables(make(), torch.tensor([[11]]))[0]
    rotated, head = table.cos.shape[-1], 16
    assert 0 < rotated < head
    x = torch.randn(1, 2, 1, head)
    for turned in (table.apply(x), table.undo(x)):
        assert torch.equal(turned[..., rotated:], x[..., rotated:])
        assert not torch.allclose(turned[..., :rotated], x[..., :rotated], atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    half=st.integers(1, 8),
    rest=st.integers(0, 6),
    rows=st.integers(1, 3),
    tokens=st.integers(1, 5),
    scale=st.floats(0.5, 2.0),
)
def test_undo_inverts_apply(seed, half, rest, rows, tokens, scale):
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(rows, tokens, half, generator=generator) * 500
    angles = torch.cat([angles, angles], dim=-1)
    table = rope.Rotary(scale * angles.cos(), scale * angles.sin())
    x = torch.randn(2, rows, 3, tokens, 2 * half + rest, generator=generator)
    assert torch.allclose(table.undo(table.apply(x)), x, atol=1e-5)
    assert torch.allclose(table.apply(table.undo(x)), x, atol=1e-5)
    assert torch.equal(table.apply(x)[..., 2 * half :], x[..., 2 * half :])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 300), st.integers(0, 300))
def test_scores_depend_on_the_distance_alone(seed, a, b):
    """Rotating query and key by their positions is rotating by the difference: this is the rotary embedding."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.tensor([1.0, 0.3, 0.05, 0.01])

    def table(position):
        angles = (position * frequencies).repeat(2).reshape(1, 1, 8)
        return rope.Rotary(angles.cos(), angles.sin())

    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator)
    rotated = (table(a).apply(query) * table(b).apply(key)).sum()
    shifted = (table(a - b).apply(query) * key).sum()
    assert float(rotated) == pytest.approx(float(shifted), abs=1e-3)


def test_a_model_without_rotary_has_no_tables():
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=64))
    assert rope.tables(model, torch.tensor([[0, 1]])) is None


def test_the_bottleneck_gives_the_same_at_every_position():
    """It reads keys without their rotation and puts the receiver's back on what it adds."""
    theirs, ours = llama(rope_theta=1e6), build("gemma3")
    where, other_where = torch.tensor([[0, 5, 300]]), torch.tensor([[2, 90, 41]])
    layers = [0, 1, 2, 2]
    tables, other_tables = rope.tables(ours, where), rope.tables(theirs, other_where)
    other_tables = [other_tables[i] for i in layers]
    sharer, receiver = kv_cache.KVGeometry(3, 2, 12), kv_cache.KVGeometry(4, 1, 16)
    fuser = BottleneckFuser.from_geometry(sharer, receiver, layers, rank=8)
    torch.nn.init.normal_(fuser.up)

    def bare(geometry):
        one = torch.randn(1, geometry.kv_heads, 1, geometry.head_dim)
        return one.expand(-1, -1, 3, -1)

    keys, values, other_keys, other_values = (
        [bare(geometry) for _ in layers] for geometry in (receiver, receiver, sharer, sharer)
    )
    mine = Entries([t.apply(k) for t, k in zip(tables, keys, strict=True)], values, tables)
    other = Entries([t.apply(k) for t, k in zip(other_tables, other_keys, strict=True)], other_values, other_tables)
    with torch.no_grad():
        fused = fuser(other, mine)
    for (new_keys, new_values), table, own in zip(fused, tables, keys, strict=True):
        free = table.undo(new_keys)
        assert (free - own).abs().max() > 0.1
        assert torch.allclose(free, free[:, :, :1].expand_as(free), atol=1e-4)
        assert torch.allclose(new_values, new_values[:, :, :1].expand_as(new_values), atol=1e-4)


def cohere():
    torch.manual_seed(0)
    return CohereForCausalLM(
        CohereConfig(num_hidden_layers=2, num_key_value_heads=1, initializer_range=0.3, **{**SMALL, "vocab_size": 512})
    )


def gptj():
    torch.manual_seed(0)
    return GPTJForCausalLM(
        GPTJConfig(n_layer=2, n_embd=32, n_head=2, rotary_dim=8, vocab_size=512, n_positions=512, initializer_range=0.3)
    )


@pytest.mark.parametrize("make", [cohere, gptj])
def test_another_way_to_rotate_is_refused(make):
    """Interleaved rotation can't be taken off by halves; a fuser that reads bare keys would read noise."""
    with pytest.raises(CacheError, match=r"rotary.*'c2c' fuser"):
        Sharer(make()).check_rotary()


@pytest.mark.parametrize("make", [cohere, gptj])
def test_the_published_fuser_takes_such_a_model_and_the_bottleneck_does_not(make):
    receiver, sharer = Receiver(build("llama"), tokenizer("chatml")), Sharer(make(), tokenizer("llama3"))
    options = {"hidden_dim": 8, "intermediate_dim": 8}
    published = C2CModel.from_models(receiver, sharer, fuser="c2c", fuser_options=options)
    assert published.generate("Hello", max_new_tokens=2).new_tokens == 2
    with pytest.raises(CacheError, match="rotary"):
        C2CModel.from_models(receiver, sharer)


def test_learned_positions_are_no_rotation():
    """GPT-2 adds positions to its input; nothing has to be taken off its keys."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=64, initializer_range=0.3)
    )
    Receiver(model).check_rotary()
