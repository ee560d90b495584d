"""The linear fuser: an exact no-op until it is fitted, and then what ridge regression says."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from c2c import C2CModel, kv_cache
from c2c.alignment import Alignment, Chunk
from c2c.data.formats import Row
from c2c.errors import FuserError
from c2c.fusers import LinearFuser
from c2c.fusers.base import AlignedEntries, load_fuser
from c2c.fusers.linear import ridge_regression
from c2c.fusion import Source, aligned_entries, fuse
from c2c.training.examples import build_examples
from c2c.training.prefill_store import PrefillStore
from c2c.training.shared_context import SharedContextObjective, attention_received
from tiny import assert_equal_caches, entries, pair

PROMPTS = [
    "Hello world!",
    "What is the capital of France? Explain step by step, slowly and in many words.",
    "A 你好 🙂",
    "The quick brown fox jumps over the lazy dog, while seven other animals look on in silence.",
    "Sum 12 and 30, then name the months of the year in reverse order, please.",
    "Why do plants need light, water, and air to grow?",
]
HELD_OUT = ["Name three rivers of Asia and two lakes.", "Is it raining today, or does the sun shine?"]


def ready(names=("llama", "qwen2"), **options) -> tuple[C2CModel, SharedContextObjective, LinearFuser]:
    """A pair with a linear fuser, and its stores."""
    model = pair(*names, fuser="linear", **options)
    stores = [PrefillStore(m, range(m.geometry.layers)) for m in (model.receiver, model.sharers[0])]
    objective = SharedContextObjective(model, *stores)
    return model, objective, objective.fuser


def examples(model, prompts=PROMPTS):
    responses = ["yes", "no, never", "perhaps it is so"]
    rows = [
        Row(str(i), [{"role": "user", "content": text}], "", responses[i % 3], ends=False)
        for i, text in enumerate(prompts)
    ]
    return build_examples(model, rows, 512, 64)[0]


def fit(objective, examples, batch=6, weighting="none"):
    """Fit the objective's fuser to examples."""
    parts = [examples[start : start + batch] for start in range(0, len(examples), batch)]
    objective.fuser.initialise_from_data(item for part in parts for item in objective.observe(part, weighting))
    return objective.fuser


@pytest.fixture(scope="module")
def made():
    return ready()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def fused(model, batch, fuser):
    """A copy of the batch's receiver cache, fused."""
    cache = kv_cache.copy(batch.receiver_cache)
    source = Source(model.sharers[0], batch.sharer, batch.sharer_cache, fuser)
    fuse(cache, model.receiver, batch.receiver, [source], Chunk(batch.receiver.length - 1, (batch.matched,)))
    return cache


def close(one, other, tolerance):
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def same_map(one, other, tolerance=1e-4):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(close(a, b, tolerance) for a, b in pairs)


def affine(data: AlignedEntries, weight, bias) -> torch.Tensor:
    return bias + data.sharer.channels() @ weight


def test_gates_are_the_blend():
    _, _, fuser = ready()
    assert not any(p.requires_grad for p in fuser.parameters())
    fuser.set_blend(0.25)
    assert torch.equal(fuser.gates(), torch.full((5, 2), 0.25))
    with pytest.raises(FuserError, match=r"blend is 1\.5"):
        fuser.set_blend(1.5)
    with pytest.raises(FuserError, match=r"blend.*-1"):
        pair(fuser="linear", fuser_options={"blend": -1})


@pytest.mark.parametrize("blend", [1, 0.3])
def test_save_and_load(tmp_path, blend):
    model, objective, _ = ready(fuser_options={"blend": blend})
    fit(objective, examples(model), 3)
    model.save_pretrained(tmp_path)
    again = C2CModel.from_pretrained(tmp_path, receiver=model.receiver, sharer=model.sharers[0])
    assert again.trained
    assert again.fusers[0].config.blend == blend
    assert again.fusers[0].config.training["pairs"] > 50
    assert_equal_caches(model.prefill(PROMPTS).cache, again.prefill(PROMPTS).cache)


def test_bfloat16_keeps_means_and_blend(tmp_path):
    model, objective, fuser = ready(fuser_options={"blend": 0.3})
    fit(objective, examples(model), 3).save_pretrained(tmp_path)
    half = load_fuser(tmp_path, dtype=torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.gates(), fuser.gates())
    assert torch.equal(half.mean, fuser.mean)
    batch = objective.collate(examples(model))
    for exact, near in zip(entries(fused(model, batch, fuser)), entries(fused(model, batch, half)), strict=True):
        assert torch.allclose(exact, near, atol=0.02 * float(exact.abs().max()))
    kv_cache.check_layers(fused(model, batch, fuser.to(torch.bfloat16)))  # everything rounded, as a caller may do


@pytest.mark.parametrize("names", [("llama", "qwen2"), ("gemma3", "llama")], ids="-".join)
def test_a_known_affine_map_is_found_and_holds_elsewhere(names):
    """Rotated keys of other positions and paddings follow from the map alone."""
    model, objective, fuser = ready(names, fuser_options={"blend": 1, "ridge": 1e-9})
    draw = torch.Generator().manual_seed(5)
    weight = torch.randn(fuser.weight.shape, generator=draw) / 5
    bias = torch.randn(fuser.bias.shape, generator=draw)

    everything = examples(model, PROMPTS + HELD_OUT)
    [seen], [unseen] = (list(objective.observe(part)) for part in (everything[:6], everything[6:]))
    target = SimpleNamespace(channels=lambda: affine(seen, weight, bias))
    fuser.initialise_from_data([AlignedEntries(seen.sharer, target)])
    assert torch.equal(fuser.gates(), torch.ones_like(fuser.gates()))
    for data, tolerance in ((seen, 1e-3), (unseen, 1e-2)):
        assert close(fuser.predict(data.sharer), affine(data, weight, bias), tolerance)
    for keys, _ in fuser(unseen.sharer, unseen.receiver):
        assert keys.shape == unseen.receiver.keys[0].shape


def test_blend_is_the_way_from_the_receiver_to_the_prediction(made):
    model, objective, _ = made
    fuser = fit(ready(fuser_options={"blend": 1})[1], examples(model))
    batch = objective.collate(examples(model))
    whole = fused(model, batch, fuser)
    fuser.set_blend(0.25)
    part = fused(model, batch, fuser)
    for old, full, some in zip(*map(entries, (batch.receiver_cache, whole, part)), strict=True):
        assert torch.allclose(some, old + 0.25 * (full - old), atol=1e-5 * float(full.abs().max()))


def test_a_large_ridge_leaves_the_mean():
    model, objective, fuser = ready(fuser_options={"ridge": 1e12})
    fit(objective, examples(model))
    [data] = objective.observe(examples(model))
    mean = data.receiver.channels().mean(1, keepdim=True)
    assert torch.allclose(fuser.bias, mean, atol=1e-5)
    assert torch.allclose(fuser.predict(data.sharer), mean.expand_as(data.receiver.channels()), atol=1e-4)


@pytest.mark.parametrize("weighting", ["none", "attention"])
def test_padding_and_batches_do_not_enter(made, weighting):
    model = made[0]
    alone, together = (fit(ready()[1], examples(model), size, weighting) for size in (1, 6))
    assert same_map(alone, together)
    assert alone.config.training == together.config.training


def test_attention_weights_lower_the_weighted_error(made):
    model, objective, _ = made
    options = {"fuser_options": {"ridge": 1e-6}}
    plain, weighted = (fit(ready(**options)[1], examples(model), 6, w) for w in ("none", "attention"))
    assert not same_map(plain, weighted, tolerance=1e-2)
    [data] = objective.observe(examples(model), "attention")
    x, y = data.sharer.channels(), data.receiver.channels()
    errors = [(f.bias + (x - f.mean) @ f.weight - y).square().sum(-1) for f in (plain, weighted)]
    assert bool(((data.weight * errors[1]).sum(1) < (data.weight * errors[0]).sum(1)).all())
    assert bool((errors[0].sum(1) < errors[1].sum(1)).all())


def test_attention_is_what_the_readers_of_the_fused_cache_pay(made):
    """Against one whole forward pass per example, without padding and without a cache."""
    model, objective, _ = made
    batch = objective.collate(examples(model))
    before = kv_cache.copy(batch.receiver_cache)
    decoder = model.receiver.model.get_decoder()
    implementation = decoder.config._attn_implementation
    received = attention_received(model.receiver, batch.receiver, batch.receiver_cache, batch.responses)
    assert decoder.config._attn_implementation == implementation != "eager"
    assert_equal_caches(batch.receiver_cache, before)
    decoder.set_attn_implementation("eager")
    for row, example in enumerate(batch.examples):
        ids, prompt = torch.tensor([example.receiver_ids + example.response_ids[:-1]]), len(example.receiver_ids)
        whole = decoder(input_ids=ids, output_attentions=True, use_cache=False).attentions
        for layer, attention in enumerate(whole):
            expected = attention[0].mean(0)[prompt - 1 :, : prompt - 1].mean(0)
            start = batch.receiver.length - prompt
            assert torch.allclose(received[layer][row, start:], expected, atol=0.02)  # the store keeps bfloat16
            assert float(received[layer][row, :start].sum()) == 0
    decoder.set_attn_implementation(implementation)


def test_layers_that_are_not_mapped_are_left_alone():
    model, objective, fuser = ready(layer_map=[None, 0, None, 2, 1], fuser_options={"blend": 1})
    fit(objective, examples(model), 6, "attention")
    assert fuser.weight.shape[0] == 3
    batch = objective.collate(examples(model))
    pairs = zip(kv_cache.layers(fused(model, batch, fuser)), kv_cache.layers(batch.receiver_cache), strict=True)
    assert [not torch.equal(new, old) for (_, new), (_, old) in pairs] == [False, True, False, True, True]


def random_pairs(layers, pairs, inputs, outputs):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(layers, pairs, inputs, generator=draw), torch.randn(layers, pairs, outputs, generator=draw)


def test_a_weight_of_two_is_the_same_pair_twice():
    x, y = random_pairs(2, 30, 4, 3)
    one = ridge_regression([(x, y, torch.tensor([2.0] * 10 + [1.0] * 20).expand(2, -1))], 0.1)
    other = ridge_regression([(x[:, :10], y[:, :10], None), (x, y, None)], 0.1)
    assert torch.allclose(one.weight, other.weight)
    assert torch.allclose(one.bias, other.bias)


def test_large_means_do_not_drown_small_variation():
    """Key biases of some models are a hundred times what varies around them."""
    x = random_pairs(1, 200, 5, 2)[0] + 300 * torch.tensor([1.0, -1.0, 2.0, 0.0, 1.0])
    known = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).double()
    found = ridge_regression([(x, x.double() @ known, None)], 1e-9)
    assert torch.allclose(found.weight[0], known, atol=1e-4)
    assert torch.allclose(found.deviation[0, 0], x[0].double().std(0, correction=0), rtol=1e-3)


def test_a_constant_channel_predicts_nothing():
    x, y = random_pairs(1, 40, 3, 2)
    found = ridge_regression([(torch.cat([x, torch.full((1, 40, 1), 123.4)], dim=-1), y, None)], 0.0)
    assert torch.equal(found.weight[0, 3], torch.zeros(2, dtype=torch.float64))
    assert torch.allclose(found.weight[0, :3], ridge_regression([(x, y, None)], 0.0).weight[0])


@pytest.mark.parametrize("ridge", [-1.0, math.nan, math.inf])
def test_impossible_ridges_are_refused(ridge):
    with pytest.raises(FuserError, match="ridge is"):
        ridge_regression([(*random_pairs(1, 9, 2, 2), None)], ridge)


def test_too_little_data_is_refused(made):
    model, objective, _ = made
    fuser = ready()[2]
    for data, message in (([], "0 aligned pairs"), ([first_pair(objective, model)], "1 aligned pairs: at least 2")):
        with pytest.raises(FuserError, match=message):
            fuser.initialise_from_data(data)
    assert not fuser.trained
    assert float(fuser.gates().sum()) == 0
    singular = ready(fuser_options={"ridge": 0})[1]
    with pytest.raises(FuserError, match=r"singular with ridge 0.*Raise the ridge"):
        fit(singular, examples(model)[:1])
    with pytest.raises(FuserError, match=r"weight 0 in fused layers \[1\]"):
        ridge_regression([(*random_pairs(2, 5, 3, 3), torch.tensor([[1.0] * 5, [0.0] * 5]))], 1e-2)


def first_pair(objective, model) -> AlignedEntries:
    """The first aligned pair of a prompt alone."""
    [example] = examples(model)[:1]
    one = Alignment(*(x[:1] for x in (example.alignment.rows, example.alignment.receiver, example.alignment.sharer)))
    batch = objective.collate([example])
    source = Source(model.sharers[0], batch.sharer, batch.sharer_cache, objective.fuser)
    return AlignedEntries(*aligned_entries(batch.receiver_cache, model.receiver, batch.receiver, source, one))


def test_the_best_blend_is_kept_and_of_equals_the_smallest(made):
    fuser = fit(ready()[1], examples(made[0]))
    tuned = fuser.tune(lambda: -abs(float(fuser.gates()[0, 0]) - 0.35))
    assert fuser.config.blend == tuned["blend"]
    assert tuned["blend"] in (0.3, 0.4)
    assert len(tuned["blends"]) == 10
    assert fuser.tune(lambda: 1.0)["blend"] == 0.1
    assert torch.equal(fuser.gates(), torch.full((5, 2), 0.1))
    with pytest.raises(FuserError, match="not fitted"):
        ready()[2].tune(lambda: 1.0)
