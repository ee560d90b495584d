"""The invariants of the design, over families, tokenizers, depths and KV geometries, for both fuser families."""

from __future__ import annotations

import pytest
import torch

from c2c import C2CModel, kv_cache
from c2c.alignment.base import merge
from c2c.language_model import Receiver
from c2c.prompting import RenderOptions
from c2c.sharer import Sharer
from tiny import (
    WINDOW,
    Scores,
    assert_equal_caches,
    build,
    entries,
    open_fusers,
    pair,
    pair_folders,
    token_ids,
    tokenizer,
)

PAIRS = [("llama", "qwen2"), ("qwen3", "gemma3"), ("gemma3", "llama"), ("gemma3", "gemma3")]
OPTIONS = {"bottleneck": {"rank": 16}, "c2c": {"hidden_dim": 16, "intermediate_dim": 16, "dropout": 0.0}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "  Hello 你好 🙂 "},
]
PROMPTS = ["Hi", "the quick brown fox jumps over the lazy dog " * 3, TALK]
cases = pytest.mark.parametrize(
    ("names", "fuser"),
    [(names, fuser) for names in PAIRS for fuser in OPTIONS],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)


def made(names, fuser, **kwargs):
    return pair(*names, fuser=fuser, fuser_options=OPTIONS[fuser], **kwargs)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@pytest.mark.parametrize("fuser", [*OPTIONS, "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_closed_is_the_receiver_bit_for_bit(names, fuser, dtype):
    receiver = Receiver(build(names[0], 1).to(dtype), tokenizer("chatml"))
    sharer = Sharer(build(names[1], 2), tokenizer("llama3"))
    model = C2CModel.from_models(receiver, sharer, fuser=fuser, fuser_options=OPTIONS.get(fuser))
    for prompts in (*PROMPTS, PROMPTS):
        fused = model.prefill(prompts)
        own = receiver.prefill(fused.tokens, fused.tokens.length - 1)
        assert kv_cache.length(fused.cache) == fused.tokens.length - 1
        assert {entry.dtype for entry in entries(fused.cache)} == {dtype}
        assert_equal_caches(fused.cache, own)
        mine, plain = Scores(), Scores()
        model.generate(prompts, max_new_tokens=5, logits_processor=[mine])
        receiver.answer(prompts, max_new_tokens=5, logits_processor=[plain])
        assert len(mine.seen) == len(plain.seen) == 5
        assert all(torch.equal(a, b) for a, b in zip(mine.seen, plain.seen, strict=True))


@cases
def test_open_changes_aligned_positions_and_nothing_else(names, fuser):
    model = open_fusers(made(names, fuser))
    batch = [p if isinstance(p, list) else [{"role": "user", "content": p}] for p in PROMPTS]
    prompts = model.align(batch, RenderOptions())
    (prompt,) = merge(prompts)
    if "gemma3" in names:
        assert prompt.receiver.length > 2 * WINDOW
    fused = model.fuse_prompts(prompts)
    own = model.receiver.prefill(fused.tokens, fused.tokens.length - 1)
    alignment = prompt.chunks[0].alignments[0]
    touched = torch.zeros(len(batch), fused.tokens.length - 1, dtype=torch.bool)
    touched[alignment.rows, alignment.receiver] = True
    assert (~fused.tokens.mask[:, :-1]).any()  # there is padding
    assert not (touched & ~fused.tokens.mask[:, :-1]).any()
    for new, old in zip(entries(fused.cache), entries(own), strict=True):
        assert new.shape == old.shape
        assert torch.equal((new != old).any(-1).any(1), touched)


@cases
def test_a_batch_is_its_rows_in_any_order(names, fuser):
    model = open_fusers(made(names, fuser))
    together = model.prefill(PROMPTS)
    answers = token_ids(model.generate(PROMPTS, max_new_tokens=6))
    for row, prompt in enumerate(PROMPTS):
        alone = model.prefill(prompt)
        n = kv_cache.length(alone.cache)
        for batched, single in zip(entries(together.cache), entries(alone.cache), strict=True):
            assert torch.allclose(batched[row, :, -n:], single[0], atol=2e-4 * max(1.0, float(single.abs().max())))
        assert model.generate(prompt, max_new_tokens=6).ids.tolist() == answers[row]
    order = [2, 0, 1]
    assert token_ids(model.generate([PROMPTS[i] for i in order], max_new_tokens=6)) == [answers[i] for i in order]
    assert answers != token_ids(model.receiver.answer(PROMPTS, max_new_tokens=6))


@cases
def test_the_same_call_gives_the_same_bits(names, fuser):
    model = open_fusers(made(names, fuser))
    assert_equal_caches(*(model.prefill(PROMPTS).cache for _ in range(2)))
    again = open_fusers(made(names, fuser)) if fuser == "bottleneck" else model
    assert token_ids(again.generate(PROMPTS, max_new_tokens=5)) == token_ids(model.generate(PROMPTS, max_new_tokens=5))


@cases
def test_the_sharers_prompt_matters(names, fuser):
    """The receiver reads the same; the sharer reads other words of the same length."""
    model = open_fusers(made(names, fuser))
    mine = torch.arange(20, 40).unsqueeze(0)
    fuse = torch.tensor([True] * 19 + [False])
    one, other = (model.fuse_ids(mine, theirs, fuse_mask=fuse) for theirs in (mine, mine.flip(1)))
    for a, b in zip([*one.keys, *one.values], [*other.keys, *other.values], strict=True):
        assert (a[:, :, :-1] != b[:, :, :-1]).any(-1).any(1).all()
    assert not torch.allclose(one.last_logits, other.last_logits)


def test_gemma_keeps_every_token_beyond_its_window():
    model = pair("gemma3", "gemma3")
    prompt = "the quick brown fox " * 10
    fused = model.prefill(prompt)
    assert fused.tokens.length > 3 * WINDOW
    assert {keys.shape[2] for keys, _ in kv_cache.layers(fused.cache)} == {fused.tokens.length - 1}
    plain = model.receiver.model.generate(
        input_ids=fused.tokens.ids, attention_mask=fused.tokens.mask.long(), max_new_tokens=8, pad_token_id=0
    )
    assert model.generate(prompt, max_new_tokens=8).ids.tolist() == plain[0, fused.tokens.length :].tolist()


def test_two_sharers_with_their_own_tokenizers():
    receiver = Receiver(build("llama", 1), tokenizer("chatml"))
    sharers = [Sharer(build("qwen2", 2), tokenizer("llama3")), Sharer(build("gemma3", 4), tokenizer("metaspace"))]
    models = {
        mode: open_fusers(C2CModel.from_models(receiver, sharers, mode=mode)) for mode in ("sequential", "parallel")
    }
    caches = {mode: kv_cache.layer(model.prefill(PROMPTS).cache, 2)[1] for mode, model in models.items()}
    assert not torch.allclose(caches["sequential"], caches["parallel"])
    # in parallel the order of the sharers does not matter
    swapped = C2CModel(receiver, sharers[::-1], list(models["parallel"].fusers)[::-1], mode="parallel")
    torch.testing.assert_close(
        kv_cache.layer(swapped.prefill(PROMPTS).cache, 2)[1], caches["parallel"], rtol=1e-3, atol=1e-3
    )


def test_partial_layer_maps_leave_other_layers_alone():
    model = open_fusers(pair("llama", "qwen2", layer_map=[None, 0, None, 2, None]))
    fused = model.prefill(PROMPTS[1])
    own = model.receiver.prefill(fused.tokens, fused.tokens.length - 1)
    same = [torch.equal(a[0], b[0]) for a, b in zip(kv_cache.layers(fused.cache), kv_cache.layers(own), strict=True)]
    assert same == [True, False, True, False, True]
    assert fused.report.fused_layers == [1, 3]
    assert set(fused.report.skipped_layers) == {0, 2, 4}


def test_use_leaves_the_models_unchanged():
    model = open_fusers(pair("qwen3", "gemma3"))
    before = [{n: p.clone() for n, p in m.model.state_dict().items()} for m in (model.receiver, model.sharers[0])]
    alone = model.receiver.answer(TALK, max_new_tokens=5).ids
    model.generate(PROMPTS, max_new_tokens=5, num_beams=2)
    for state, m in zip(before, (model.receiver, model.sharers[0]), strict=True):
        assert all(torch.equal(p, state[n]) for n, p in m.model.state_dict().items())
    assert torch.equal(model.receiver.answer(TALK, max_new_tokens=5).ids, alone)


@pytest.mark.parametrize("fuser", ["bottleneck", "c2c", "linear", "memory"])
@pytest.mark.parametrize(("dtype", "other", "near"), [("float32", "bfloat16", 0.05), ("bfloat16", "float16", 0.2)])
def test_a_sharer_of_another_type(fuser, dtype, other, near, tmp_path_factory):
    """A sharer's type changes what the receiver reads only by its rounding; the receiver keeps its own type."""
    folders = pair_folders(tmp_path_factory.mktemp)
    model = C2CModel.from_models(*folders, fuser=fuser, dtype=dtype, sharer_dtype=other)
    open_fusers(model, scale=0.3)
    assert (model.receiver.dtype, model.sharers[0].dtype) == (getattr(torch, dtype), getattr(torch, other))
    same = C2CModel.from_models(*folders, fuser=fuser, dtype=dtype)
    same.fusers.load_state_dict(model.fusers.state_dict())
    given = {"sharer_messages": "the quick brown fox"} if model.private else {}
    fused = model.prefill(PROMPTS, **given)
    assert {(e.dtype, e.device) for e in entries(fused.cache)} == {(model.receiver.dtype, model.receiver.device)}
    scores = []
    for one in (model, same):
        scores.append(Scores())
        one.generate(["Hello the lazy dog", "Hi"], max_new_tokens=1, logits_processor=[scores[-1]], **given)
    torch.testing.assert_close(scores[0].seen[0], scores[1].seen[0], rtol=near, atol=near)
