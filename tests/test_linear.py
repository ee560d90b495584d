"""The linear fuser: an exact no-op until it is fitted, and then what ridge regression says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from c2c import C2CModel, kv_cache
from c2c.alignment import Alignment, Chunk
from c2c.data.formats import Row
from c2c.errors import FuserError
from c2c.fusers import LinearFuser, family
from c2c.fusers.base import load_fuser
from c2c.fusion import Picker, Source, aligned_entries, fuse
from c2c.training import ridge as ridge_module
from c2c.training.examples import build_examples
from c2c.training.ridge import Batches, NormalEquations, attention_received, choose_blend, fit, observations
from c2c.training.step import FuserTraining
from c2c.training.store import PrefillStore
from tiny import pair

PROMPTS = [
    "Hello world!",
    "What is the capital of France? Explain step by step, slowly and in many words.",
    "A 你好 🙂",
    "The quick brown fox jumps over the lazy dog, while seven other animals look on in silence.",
    "Sum 12 and 30, then name the months of the year in reverse order, please.",
    "Why do plants need light, water, and air to grow?",
]
HELD_OUT = ["Name three rivers of Asia and two lakes.", "Is it raining today, or does the sun shine?"]


def ready(names=("llama", "qwen2"), **options) -> tuple[C2CModel, FuserTraining, LinearFuser]:
    """A pair with a linear fuser, and its stores."""
    model = pair(*names, fuser="linear", **options)
    stores = [PrefillStore(m, range(m.geometry.layers)) for m in (model.receiver, model.sharers[0])]
    training = FuserTraining(model, *stores)
    return model, training, training.fuser


def examples(model, prompts=PROMPTS):
    responses = ["yes", "no, never", "perhaps it is so"]
    rows = [
        Row(str(i), [{"role": "user", "content": text}], "", responses[i % 3], ends=False)
        for i, text in enumerate(prompts)
    ]
    return build_examples(model, rows, 512, 64)[0]


@pytest.fixture(scope="module")
def made():
    return ready()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def source(model, batch, fuser):
    return Source(model.sharers[0], batch.sharer, batch.sharer_cache, fuser)


def fused(model, batch, fuser):
    """A copy of the batch's receiver cache, fused."""
    cache = kv_cache.copy(batch.receiver_cache)
    chunk = Chunk(batch.receiver.length - 1, (batch.matched,))
    fuse(cache, model.receiver, batch.receiver, [source(model, batch, fuser)], chunk)
    return cache


def same_map(one, other, tolerance=1e-4):
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def obeying(model, batch, fuser, weight, bias):
    """The batch with receiver entries that are an affine map of the sharer's; keys rotated by their positions."""
    theirs, ours = aligned_entries(
        batch.receiver_cache, model.receiver, batch.receiver, source(model, batch, fuser), batch.matched
    )
    made = bias + ridge_module.channels(theirs) @ weight  # [layers, pairs, 2 * width]
    picker, cache = Picker(batch.matched, batch.matched.receiver, 0), kv_cache.copy(batch.receiver_cache)
    heads, dim = model.receiver.geometry.kv_heads, model.receiver.geometry.head_dim
    for index, layer in enumerate(fuser.config.fused_layers):
        keys, values = made[index].view(1, -1, 2, heads, dim).permute(2, 0, 3, 1, 4)
        if ours.rotary is not None:
            keys = ours.rotary[index].apply(keys)
        old_keys, old_values = kv_cache.layer(cache, layer)
        kv_cache.set_layer(cache, layer, picker.put(old_keys, keys), picker.put(old_values, values))
    return replace(batch, receiver_cache=cache)


def random_map(fuser):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(fuser.weight.shape, generator=generator) / 5, torch.randn(fuser.bias.shape, generator=generator)


# -- the fuser -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("llama", "qwen2"), ("qwen3", "gemma3"), ("gemma3", "llama")], ids="-".join)
def test_unfitted_changes_nothing_bit_for_bit(names):
    model = pair(*names, fuser="linear")
    assert isinstance(model.fusers[0], family("linear"))
    result = model.prefill(PROMPTS)
    own = model.receiver.prefill(result.tokens, result.tokens.length - 1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(sum(kv_cache.layers(result.cache), ()), sum(kv_cache.layers(own), ()), strict=True)
    )
    assert not result.report.trained
    assert result.report.to_dict()["gate_openness"] == 0
    answers = [m.generate(PROMPTS[0], max_new_tokens=6).text for m in (model,)]
    assert answers == [model.receiver.answer(PROMPTS[0], max_new_tokens=6).text]


def test_nothing_is_left_to_a_gradient(made):
    assert not any(p.requires_grad for p in made[2].parameters())


def test_gates_are_the_blend(made):
    _, _, fuser = ready()
    fuser.set_blend(0.25)
    assert torch.equal(fuser.gates(), torch.full((5, 2), 0.25))
    with pytest.raises(FuserError, match=r"blend is 1\.5"):
        fuser.set_blend(1.5)
    with pytest.raises(FuserError, match="blend is -1"):
        pair(fuser="linear", fuser_options={"blend": -1})


@pytest.mark.parametrize("blend", [1, 0.3])
def test_save_and_load(tmp_path, blend):
    model, training, fuser = ready(fuser_options={"blend": blend})
    fit(fuser, Batches(training, examples(model), 3), model, ridge=1e-2)
    model.save_pretrained(tmp_path)
    again = C2CModel.from_pretrained(tmp_path, receiver=model.receiver, sharer=model.sharers[0])
    assert again.trained
    assert again.fusers[0].config.blend == blend
    assert again.fusers[0].config.training["pairs"] > 50
    one, other = (m.prefill(PROMPTS).cache for m in (model, again))
    assert all(
        torch.equal(a, b) for a, b in zip(sum(kv_cache.layers(one), ()), sum(kv_cache.layers(other), ()), strict=True)
    )


def test_bfloat16_keeps_means_and_blend_and_comes_back(tmp_path):
    model, training, fuser = ready(fuser_options={"blend": 0.3})
    fit(fuser, Batches(training, examples(model), 3), model, ridge=1e-2)
    fuser.save_pretrained(tmp_path / "one")
    half = load_fuser(tmp_path / "one", dtype=torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.gates(), fuser.gates())
    assert torch.equal(half.mean, fuser.mean)
    half.save_pretrained(tmp_path / "two")
    again = load_fuser(tmp_path / "two", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(half.state_dict().values(), again.state_dict().values(), strict=True))
    batch = training.collate(examples(model))
    for (keys, values), (near_keys, near_values) in zip(
        kv_cache.layers(fused(model, batch, fuser)), kv_cache.layers(fused(model, batch, again)), strict=True
    ):
        assert torch.allclose(keys, near_keys, atol=0.02 * float(keys.abs().max()))
        assert torch.allclose(values, near_values, atol=0.02 * float(values.abs().max()))
    plain = fuser.to(torch.bfloat16)  # everything rounded, as a caller may do
    kv_cache.check_layers(fused(model, batch, plain))


# -- the fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("llama", "qwen2"), ("gemma3", "llama")], ids="-".join)
def test_a_known_affine_map_is_found_and_holds_elsewhere(names):
    """Rotated keys of other positions and paddings follow from the map alone."""
    model, training, fuser = ready(names, fuser_options={"blend": 1})
    known = random_map(fuser)
    everything = examples(model, PROMPTS + HELD_OUT)
    fit(fuser, [obeying(model, training.collate(everything[:6]), fuser, *known)], model, ridge=1e-9)
    assert torch.equal(fuser.gates(), torch.ones_like(fuser.gates()))
    seen, unseen = (training.collate(part) for part in (everything[:6], everything[6:]))
    for batch, tolerance in ((seen, 1e-3), (unseen, 1e-2)):
        expected = obeying(model, batch, fuser, *known).receiver_cache
        for (keys, values), (right_keys, right_values) in zip(
            kv_cache.layers(fused(model, batch, fuser)), kv_cache.layers(expected), strict=True
        ):
            assert torch.allclose(keys, right_keys, atol=tolerance * float(right_keys.abs().max()))
            assert torch.allclose(values, right_values, atol=tolerance * float(right_values.abs().max()))


def test_blend_is_the_way_from_the_receiver_to_the_prediction(made):
    model, training, _ = made
    fuser = ready(fuser_options={"blend": 1})[2]
    batch = training.collate(examples(model))
    fit(fuser, [batch], model, ridge=1e-2)
    whole = fused(model, batch, fuser)
    fuser.set_blend(0.25)
    part = fused(model, batch, fuser)
    for old, full, some in zip(
        *(sum(kv_cache.layers(c), ()) for c in (batch.receiver_cache, whole, part)), strict=True
    ):
        assert torch.allclose(some, old + 0.25 * (full - old), atol=1e-5 * float(full.abs().max()))


def test_a_large_ridge_leaves_the_mean(made):
    model, training, _ = made
    batch = training.collate(examples(model))
    fuser = ready()[2]
    fit(fuser, [batch], model, ridge=1e12)
    x, y = observations(fuser, batch, model)
    mean = y.mean(1, keepdim=True)
    assert torch.allclose(fuser.bias, mean, atol=1e-5)
    theirs, _ = aligned_entries(
        batch.receiver_cache, model.receiver, batch.receiver, source(model, batch, fuser), batch.matched
    )
    assert torch.allclose(fuser.predict(theirs), mean.expand_as(y), atol=1e-4)
    assert x.shape[1] == len(batch.matched)


@pytest.mark.parametrize("weight", ["none", "attention"])
def test_padding_and_batches_do_not_enter(made, weight):
    model, training, _ = made
    alone, together = ready()[2], ready()[2]
    fit(alone, Batches(training, examples(model), 1), model, ridge=1e-2, weight=weight)
    fit(together, Batches(training, examples(model), 6), model, ridge=1e-2, weight=weight)
    assert same_map(alone, together)
    assert alone.config.training == together.config.training


def test_a_weight_of_two_is_the_same_pair_twice():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 30, 4, generator=generator), torch.randn(2, 30, 3, generator=generator)
    weighted, doubled = NormalEquations(), NormalEquations()
    weighted.add(x, y, torch.tensor([2.0] * 10 + [1.0] * 20).expand(2, -1))
    for part in (slice(0, 10), slice(0, 10), slice(10, 30)):
        doubled.add(x[:, part], y[:, part])
    one, other = weighted.solve(0.1), doubled.solve(0.1)
    assert torch.allclose(one.weight, other.weight)
    assert torch.allclose(one.bias, other.bias)


def test_large_means_do_not_drown_small_variation():
    """Key biases of some models are a hundred times what varies around them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, 5, generator=generator) + 300 * torch.tensor([1.0, -1.0, 2.0, 0.0, 1.0])
    known = torch.randn(5, 2, generator=generator).double()
    sums = NormalEquations()
    sums.add(x, x.double() @ known)
    found = sums.solve(1e-9)
    assert torch.allclose(found.weight[0], known, atol=1e-4)


def test_a_constant_channel_predicts_nothing():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 40, 3, generator=generator), torch.randn(1, 40, 2, generator=generator)
    sums, fewer = NormalEquations(), NormalEquations()
    sums.add(torch.cat([x, torch.full((1, 40, 1), 123.4)], dim=-1), y)
    fewer.add(x, y)
    found = sums.solve(0.0)
    assert torch.equal(found.weight[0, 3], torch.zeros(2, dtype=torch.float64))
    assert torch.allclose(found.weight[0, :3], fewer.solve(0.0).weight[0])


def test_attention_weights_lower_the_weighted_error(made):
    model, training, _ = made
    batch = training.collate(examples(model))
    plain, weighted = ready()[2], ready()[2]
    fit(plain, [batch], model, ridge=1e-6)
    fit(weighted, [batch], model, ridge=1e-6, weight="attention")
    assert not same_map(plain, weighted, tolerance=1e-2)
    x, y = observations(plain, batch, model)
    received, picker = attention_received(batch, model), Picker(batch.matched, batch.matched.receiver, 0)
    attention = torch.stack([picker.take_positions(received[i]).flatten() for i in plain.config.fused_layers])
    errors = [
        (f.bias + (x - f.mean) @ f.weight - y).square().sum(-1)  # [layers, pairs]
        for f in (plain, weighted)
    ]
    assert bool(((attention * errors[1]).sum(1) < (attention * errors[0]).sum(1)).all())
    assert bool((errors[0].sum(1) < errors[1].sum(1)).all())


def test_attention_is_what_the_readers_of_the_fused_cache_pay(made):
    """Against one whole forward pass per example, without padding and without a cache."""
    model, training, _ = made
    batch = training.collate(examples(model))
    before = [x.clone() for x in sum(kv_cache.layers(batch.receiver_cache), ())]
    implementation = model.receiver.model.config._attn_implementation
    received = attention_received(batch, model)
    assert implementation != "eager"
    assert model.receiver.model.config._attn_implementation == implementation
    assert all(torch.equal(a, b) for a, b in zip(before, sum(kv_cache.layers(batch.receiver_cache), ()), strict=True))
    decoder = model.receiver.model.get_decoder()
    for row, example in enumerate(batch.examples):
        ids, prompt = torch.tensor([example.receiver_ids + example.response_ids[:-1]]), len(example.receiver_ids)
        with ridge_module._eager_attention(decoder):
            whole = decoder(input_ids=ids, output_attentions=True, use_cache=False).attentions
        for layer, attention in enumerate(whole):
            expected = attention[0].mean(0)[prompt - 1 :, : prompt - 1].mean(0)
            start = batch.receiver.length - prompt
            assert torch.allclose(received[layer][row, start:], expected, atol=0.02)  # the store keeps bfloat16
            assert float(received[layer][row, :start].sum()) == 0
            assert 0 < float(received[layer][row].sum()) <= 1


def test_the_attention_implementation_comes_back_after_an_error(made):
    decoder = made[0].receiver.model.get_decoder()
    before = decoder.config._attn_implementation
    with pytest.raises(RuntimeError), ridge_module._eager_attention(decoder):
        raise RuntimeError
    assert decoder.config._attn_implementation == before


def test_layers_that_are_not_mapped_are_left_alone():
    model, training, fuser = ready(layer_map=[None, 0, None, 2, 1], fuser_options={"blend": 1})
    batch = training.collate(examples(model))
    fit(fuser, [batch], model, ridge=1e-2, weight="attention")
    assert fuser.weight.shape[0] == 3
    after = kv_cache.layers(fused(model, batch, fuser))
    changed = [
        not torch.equal(new, old)
        for (_, new), (_, old) in zip(after, kv_cache.layers(batch.receiver_cache), strict=True)
    ]
    assert changed == [False, True, False, True, True]


def test_progress_counts_batches(made):
    model, training, _ = made
    seen = []
    fit(
        ready()[2],
        Batches(training, examples(model), 4),
        model,
        ridge=1,
        progress=lambda *report: seen.append(report),
    )
    assert seen == [("fit", 1, 2), ("fit", 2, 2)]


# -- refusals --------------------------------------------------------------------------------------------------------


def test_fewer_than_two_pairs_are_refused(made):
    model, training, fuser = made
    batch = training.collate(examples(model)[:1])
    rows, ours, theirs = batch.matched.rows[:1], batch.matched.receiver[:1], batch.matched.sharer[:1]
    with pytest.raises(FuserError, match="1 aligned pairs: at least 2"):
        fit(fuser, [replace(batch, matched=Alignment(rows, ours, theirs))], model, ridge=1e-2)
    with pytest.raises(FuserError, match="0 aligned pairs"):
        fit(fuser, [], model, ridge=1e-2)
    assert not fuser.trained
    assert float(fuser.gates().sum()) == 0


def test_singular_equations_are_refused_and_a_ridge_cures_them(made):
    model, training, _ = made
    batch = training.collate(examples(model)[:1])
    fuser = ready()[2]
    with pytest.raises(FuserError, match=r"singular with ridge 0.*Raise the ridge"):
        fit(fuser, [batch], model, ridge=0)
    fit(fuser, [batch], model, ridge=1e-2)
    assert all(bool(p.isfinite().all()) for p in fuser.parameters())


@pytest.mark.parametrize("ridge", [-1.0, math.nan, math.inf])
def test_impossible_ridges_are_refused(made, ridge):
    with pytest.raises(FuserError, match="ridge is"):
        fit(made[2], [], made[0], ridge=ridge)


def test_unknown_weights_are_refused(made):
    with pytest.raises(FuserError, match="'none' or 'attention'"):
        fit(made[2], [], made[0], ridge=1.0, weight="loud")


def test_pairs_that_nobody_reads_are_refused():
    sums = NormalEquations()
    sums.add(torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.tensor([[1.0] * 5, [0.0] * 5]))
    with pytest.raises(FuserError, match=r"weight 0 in fused layers \[1\]"):
        sums.solve(1e-2)


# -- the blend -------------------------------------------------------------------------------------------------------


def test_the_best_blend_is_kept_and_of_equals_the_smallest(made):
    model, training, _ = made
    fuser = ready()[2]
    fit(fuser, Batches(training, examples(model), 6), model, ridge=1e-2)
    scores = choose_blend(fuser, lambda f: -abs(float(f.gates()[0, 0]) - 0.35), blends=(0.9, 0.4, 0.3, 0.1))
    assert list(scores) == [0.1, 0.3, 0.4, 0.9]
    assert fuser.config.blend in (0.3, 0.4)
    choose_blend(fuser, lambda f: 1.0)
    assert fuser.config.blend == 0.1
    assert torch.equal(fuser.gates(), torch.full((5, 2), 0.1))


def test_a_blend_needs_a_fitted_fuser_and_something_to_try(made):
    with pytest.raises(FuserError, match="not fitted"):
        choose_blend(ready()[2], lambda f: 1.0)
    model, training, _ = made
    fuser = ready()[2]
    fit(fuser, Batches(training, examples(model), 6), model, ridge=1e-2)
    with pytest.raises(FuserError, match="no blends"):
        choose_blend(fuser, lambda f: 1.0, blends=())
