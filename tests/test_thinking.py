"""Thinking steps: the last hidden state goes back in, its entries are handed over, and what can't think says why."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from c2c import C2CModel, Handoff, kv_cache
from c2c.errors import CacheError, ContextLengthError, HandoffError, PromptError
from c2c.families import build_tiny, byte_tokenizer
from c2c.language_model import Receiver
from c2c.prompting import with_passage
from c2c.sharer import Sharer
from c2c.systems import SystemOptions, make_system
from c2c.thinking import REALIGNMENTS, check_embeddings, realigned, ridge
from c2c.tokens import SLOT
from tiny import assert_equal_caches, build, memory_pair, token_ids, tokenizer

DOCUMENT = "The fox sleeps in a red house by the sea."
OTHER = "A dog and a cat went to the market."
QUESTION = "Where does the fox sleep?"
GREEDY = {"max_new_tokens": 5, "do_sample": False}
FAMILIES = ["llama", "gemma3", "qwen3"]
SHARERS = {family: Sharer(build(family, 2), tokenizer("chatml"), family) for family in FAMILIES}


def twins(family: str = "llama", **options) -> C2CModel:
    sharer = SHARERS[family]
    return C2CModel.from_models(
        Receiver(sharer.model, sharer.tokenizer, family), sharer, fuser="copy", fuser_options=options
    )


def cache(handoff: Handoff):
    return handoff.cache(torch.float32, torch.device("cpu"))


def by_hand(model, ids: list[int], steps: int, realign: str) -> list:
    """Whole forward passes over embeddings, without a cache, and every realignment written out."""
    with torch.no_grad():
        layer, head = model.get_input_embeddings(), model.get_output_embeddings().weight
        table = layer(torch.arange(layer.num_embeddings))
        inputs = layer(torch.tensor([ids]))
        for _ in range(steps):
            out = model(inputs_embeds=inputs, output_hidden_states=True)
            state = out.hidden_states[-1][0, -1]
            if realign == "soft":
                state = out.logits[0, -1].softmax(-1) @ table
            elif realign == "filler":
                state = table[ids[-1]]
            elif realign != "none":
                if realign == "ridge":
                    gram = head.double().T @ head.double() + 1e-5 * torch.eye(head.shape[1]).double()
                    state = (state.double() @ gram.inverse() @ head.double().T @ table.double()).float()
                state = state / state.norm() * table.norm(dim=-1).mean()
            inputs = torch.cat([inputs, state[None, None]], dim=1)
        found = model(inputs_embeds=inputs, past_key_values=kv_cache.empty_cache(model.config), use_cache=True)
    return kv_cache.layers(found.past_key_values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("realign", REALIGNMENTS)
def test_steps_are_those_of_a_loop_written_out(family, realign):
    sharer = SHARERS[family]
    plain, handoff = sharer.read(DOCUMENT), sharer.read(DOCUMENT, think=3, realign=realign)
    assert handoff.ids.tolist() == [*plain.ids.tolist(), *[SLOT] * 3]
    assert handoff.kept.tolist() == [*plain.kept.tolist(), *handoff.thoughts.tolist()]
    expected = by_hand(sharer.model, plain.ids.tolist(), 3, realign)
    for found, wanted in zip(kv_cache.layers(cache(handoff)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_ridge_matrix(tied):
    table, _ = torch.linalg.qr(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(ridge(table, table), torch.eye(8), rtol=0, atol=1e-4)
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(ridge(table, table @ turn, scale=3.0), 3 * turn, rtol=0, atol=1e-3)
    model = build("llama", 2)
    if tied:
        model.set_output_embeddings(model.get_input_embeddings())
    state = torch.randn(1, 48, generator=torch.Generator().manual_seed(2))
    same = torch.allclose(realigned(model, state, "ridge"), realigned(model, state, "norm"), rtol=1e-3, atol=1e-5)
    assert same == tied, "where the head is tied, the matrix is the identity"


def test_inputs_have_the_norm_of_embeddings_also_where_these_are_scaled_and_after_weights_have_changed():
    model = build("gemma3", 2)
    made = model.get_input_embeddings()(torch.arange(512))
    assert check_embeddings(model).scale == pytest.approx(48**0.5, rel=1e-3)
    state = torch.randn(1, 48)
    assert float(realigned(model, state, "norm").norm()) == pytest.approx(float(made.norm(dim=-1).mean()), rel=1e-3)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    assert float(realigned(model, state, "norm").norm()) == pytest.approx(2 * float(made.norm(dim=-1).mean()), rel=1e-3)


def test_no_steps_are_as_without_and_steps_are_the_same_each_time():
    sharer = SHARERS["llama"]
    plain, none, thinking = (sharer.read(DOCUMENT, **how) for how in ({}, {"think": 0}, {"think": 4}))
    assert none.id == plain.id
    assert_equal_caches(cache(none), cache(plain))
    assert_equal_caches(cache(sharer.read(DOCUMENT, think=4)), cache(thinking))
    assert_equal_caches(kv_cache.crop(cache(thinking), len(plain.ids)), cache(plain), rtol=1e-4, atol=1e-5)
    ids = {sharer.read(DOCUMENT, think=count, realign=how).id for count, how in ((3, "soft"), (4, "soft"), (4, "norm"))}
    assert len({*ids, plain.id}) == 4


def test_thoughts_stand_behind_a_copied_document_as_entries_without_tokens():
    model = twins()
    handoff = model.sharers[0].read(DOCUMENT, before="", think=4)
    prompt = model.prefill(QUESTION, sharer_messages=handoff)
    assert "as the receiver itself" in prompt.report.notes[0]
    assert_equal_caches(kv_cache.crop(prompt.cache, len(handoff.ids)), cache(handoff))
    plain = model.prefill(QUESTION, sharer_messages=model.sharers[0].read(DOCUMENT, before=""))
    assert prompt.tokens.length == plain.tokens.length + 4
    assert int(prompt.tokens.slots.sum()) == 4
    assert prompt.report.memory_slots == plain.report.memory_slots + 4
    assert len(prompt.generate(**GREEDY)[0].ids) == 5


@pytest.mark.parametrize("refresh", [0, 3, 100])
def test_several_documents_with_thoughts_and_tokens_read_again(refresh):
    """A receiver can read tokens again in their new place, but no thoughts."""
    model = twins(refresh=refresh)
    read = [model.sharers[0].read(text, before="", think=2) for text in (DOCUMENT, OTHER)]
    result = model.generate(QUESTION, sharer_messages=read, **GREEDY)
    assert result.report.memory_slots == sum(len(one.kept) for one in read)
    both = model.generate([QUESTION, OTHER], sharer_messages=[read, read[0]], **GREEDY)
    assert token_ids(both)[0] == token_ids(result)[0]


def test_a_memory_fuser_takes_thoughts_as_any_entries():
    model = memory_pair()
    plain, thinking = (model.sharers[0].read(DOCUMENT, think=count) for count in (0, 3))
    found = [model.generate(QUESTION, sharer_messages=one, **GREEDY).report.memory_slots for one in (plain, thinking)]
    assert found[1] == found[0] + 3


@pytest.mark.parametrize("count", [1, 4])
def test_a_draft_follows_the_thoughts(count):
    sharer = SHARERS["qwen3"]
    thinking, both = sharer.read(DOCUMENT, think=3), sharer.read(DOCUMENT, think=3, draft_tokens=count)
    length = len(thinking.ids)
    assert both.ids[:length].tolist() == thinking.ids.tolist()
    assert 1 <= len(both.ids) - length <= count
    assert int(both.ids[length:].min()) >= 0
    assert_equal_caches(kv_cache.crop(cache(both), length), cache(thinking))
    assert both.kept[-1] == len(both.ids) - 1
    assert sharer.read(DOCUMENT, think=3, draft_tokens=1).ids[length] == both.ids[length]


def test_a_document_grows_and_is_thought_about_again():
    sharer = SHARERS["llama"]
    first, longer = sharer.read(DOCUMENT, think=3), f"{DOCUMENT} {OTHER}"
    for how in ({"think": 2}, {"think": 0}):
        again, anew = sharer.read(longer, reuse=first, **how), sharer.read(longer, **how)
        assert again.id == anew.id
        assert_equal_caches(cache(again), cache(anew), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_file(tmp_path, precision):
    handoff = SHARERS["llama"].read(DOCUMENT, think=3, realign="norm").to(precision)
    handoff.save(tmp_path / "a.safetensors")
    again = Handoff.load(tmp_path / "a.safetensors")
    assert (again.id, again.realign, again.thoughts.tolist()) == (handoff.id, "norm", handoff.thoughts.tolist())
    assert_equal_caches(cache(again), cache(handoff))


def test_a_file_whose_columns_without_tokens_are_no_thoughts_is_refused(tmp_path):
    handoff = SHARERS["llama"].read(DOCUMENT, think=3)
    odd = torch.where(handoff.ids == SLOT, -5, handoff.ids)
    for wrong in ({"realign": None}, {"ids": odd}, {"ids": handoff.ids.clamp_min(0)}):
        dataclasses.replace(handoff, **wrong).save(tmp_path / "a.safetensors")
        with pytest.raises(HandoffError, match="without a token"):
            Handoff.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"think": -1}, PromptError, "think is -1"),
        ({"think": True}, PromptError, "think is True"),
        ({"think": 2, "realign": "magic"}, PromptError, "none, norm, ridge"),
        ({"think": 600}, ContextLengthError, "made for 512"),
    ],
)
def test_mistakes(options, error, says):
    with pytest.raises(error, match=says):
        SHARERS["llama"].read(DOCUMENT, **options)


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "granitemoehybrid", "falcon_h1"])
def test_a_hybrid_thinks_with_its_states(name):
    sharer = Sharer(build_tiny(name), byte_tokenizer(), name)
    plain, handoff = sharer.read(DOCUMENT), sharer.read(DOCUMENT, think=3)
    expected = by_hand(sharer.model, plain.ids.tolist(), 3, "soft")
    for found, wanted in zip(kv_cache.layers(cache(handoff)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_a_model_with_embeddings_for_every_layer_is_refused_with_the_reason(name):
    sharer = Sharer(build_tiny(name), byte_tokenizer(), name)
    with pytest.raises(CacheError, match=r"no thinking steps.*every layer"):
        sharer.read(DOCUMENT, think=2)


def test_systems_hand_over_thoughts_and_their_controls_none():
    model, messages = twins(), [{"role": "user", "content": QUESTION}]
    asked = with_passage(messages, DOCUMENT)

    def answer(name: str, **options):
        system = make_system(name, model, SystemOptions(other=OTHER, **options))
        return system.prefill(messages, DOCUMENT).cache

    def expected(handoff: Handoff):
        return model.prefill(messages, sharer_messages=handoff).cache

    read = model.sharers[0].read(asked, think=3, realign="norm")
    for name in ("think", "c2c"):
        assert_equal_caches(answer(name, think=3, realign="norm"), expected(read))
    assert_equal_caches(answer("think_zero", think=3, realign="norm"), expected(read.zeros_like(read.thoughts)))
    filler = model.sharers[0].read(asked, think=3, realign="filler")
    assert_equal_caches(answer("think_filler", think=3), expected(filler))
    assert_equal_caches(answer("matched", think=3), answer("c2c"))
