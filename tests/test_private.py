"""Private context: what a sharer alone has read reaches a receiver that has not, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from c2c import C2CModel, kv_cache
from c2c.errors import FuserError, MismatchError, PromptError
from c2c.fusers import Entries, MemoryFuser
from c2c.fusers.base import load_fuser
from c2c.handoff import Handoff, reading
from c2c.language_model import Receiver, Sharer
from c2c.layer_map import layer_map
from c2c.private_context import PrivateEntries, first_user_column, place, prefill_entries, shared_part
from c2c.prompting import RenderOptions
from tiny import build, open_fusers, pair, tokenizer

DOCUMENT = "The fox sleeps in a red house by the sea."
LONGER = "A dog and a cat went to the market. " * 4
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where does the fox sleep?"}]
RECEIVERS = ["llama", "qwen3", "gemma"]


def private(receiver="llama", **options) -> C2CModel:
    """A pair with a memory fuser of random weights."""
    model = pair(receiver, fuser="memory", fuser_options={"rank": 8} | options)
    model.fusers[0].config.training = {"config": "random"}
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.fusers[0].named_parameters():
        if name in ("weight", "up", "bias"):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def logits(model: C2CModel, messages, given):
    fused = model.prefill(messages, sharer_messages=given)
    return model.receiver.next_logits(fused.tokens, fused.cache)


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_no_slots_are_the_receiver_alone_bit_for_bit(receiver):
    model = private(receiver, slots=0)
    tokens = model.receiver.encode(QUESTION)
    alone = model.receiver.next_logits(tokens, model.receiver.prefill(tokens, tokens.length - 1))
    assert torch.equal(logits(model, QUESTION, DOCUMENT), alone)


def test_an_untrained_fuser_is_the_receiver_alone_bit_for_bit():
    model = pair(fuser="memory")
    tokens = model.receiver.encode(QUESTION)
    alone = model.receiver.next_logits(tokens, model.receiver.prefill(tokens, tokens.length - 1))
    assert torch.equal(logits(model, QUESTION, DOCUMENT), alone)


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_entries_that_are_the_receivers_own_are_the_text_itself(receiver):
    """Positions, masks and rotation are right: a perfect memory of a text answers as if the text stood there."""
    model = private(receiver)
    ours = model.receiver
    with_text = [QUESTION[0], {"role": "user", "content": DOCUMENT + QUESTION[1]["content"]}]
    column = first_user_column(ours.tokenizer, QUESTION, RenderOptions())
    whole, question = ours.encode(with_text), ours.encode(QUESTION)
    slots = whole.length - question.length
    assert slots > 5
    assert whole.ids[0, :column].tolist() == question.ids[0, :column].tolist()
    assert whole.ids[0, column + slots :].tolist() == question.ids[0, column:].tolist()
    cache = ours.prefill(whole, whole.length - 1)
    tables = ours.rotary(whole.positions[:, column : column + slots])
    own = [
        (tables[layer].undo(keys[:, :, column : column + slots]), values[:, :, column : column + slots])
        for layer, (keys, values) in enumerate(kv_cache.layers(cache))
    ]
    options = RenderOptions()
    prompt = shared_part(model, QUESTION, options)
    placed = place(prompt, ours.tokenizer, QUESTION, options, [PrivateEntries(own, 0)])
    built = prefill_entries(kv_cache.empty_cache(), ours, placed)
    tokens = placed.receiver
    assert tokens.positions.tolist() == whole.positions.tolist()
    ours.prefill(tokens, tokens.length - 1, built)
    expected = ours.next_logits(whole, cache)
    torch.testing.assert_close(ours.next_logits(tokens, built), expected, rtol=1e-4, atol=1e-4)


def test_the_receivers_own_entries_before_the_memory_are_untouched():
    model = private()
    fused = model.prefill(QUESTION, sharer_messages=DOCUMENT)
    column = first_user_column(model.receiver.tokenizer, QUESTION, RenderOptions())
    tokens = model.receiver.encode(QUESTION)
    alone = model.receiver.prefill(tokens, column)
    for (keys, values), (own_keys, own_values) in zip(
        kv_cache.layers(fused.cache), kv_cache.layers(alone), strict=True
    ):
        assert torch.equal(keys[:, :, :column], own_keys)
        assert torch.equal(values[:, :, :column], own_values)
    slots = fused.report.memory_slots
    assert slots == len(
        reading(model.sharers[0].tokenizer, [{"role": "user", "content": DOCUMENT}], RenderOptions()).kept
    )
    assert kv_cache.length(fused.cache) == tokens.length - 1 + slots
    assert fused.report.prompt_tokens == tokens.length


def test_what_was_read_matters_and_what_was_not_does_not():
    model = private()
    assert not torch.allclose(logits(model, QUESTION, DOCUMENT), logits(model, QUESTION, LONGER), atol=1e-3)
    assert torch.equal(logits(model, QUESTION, DOCUMENT), logits(model, QUESTION, model.sharers[0].read(DOCUMENT)))


@pytest.mark.parametrize("slots", [None, 3])
@pytest.mark.parametrize("receiver", RECEIVERS)
def test_a_batch_equals_its_singles(receiver, slots):
    model = private(receiver, slots=slots)
    questions = [QUESTION, "Who?", [{"role": "user", "content": "Tell me what they bought there, please."}]]
    documents = [DOCUMENT, LONGER, "Sun."]
    batch = model.generate(questions, sharer_messages=documents, max_new_tokens=5, do_sample=False)
    for question, document, answer in zip(questions, documents, batch, strict=True):
        single = model.generate(question, sharer_messages=document, max_new_tokens=5, do_sample=False)
        assert single.ids.tolist() == answer.ids.tolist()
    turned = model.generate(questions[::-1], sharer_messages=documents[::-1], max_new_tokens=5, do_sample=False)
    assert [answer.ids.tolist() for answer in turned] == [answer.ids.tolist() for answer in batch[::-1]]


def test_slots_set_the_length():
    for slots in (1, 4):
        fused = private(slots=slots).prefill(QUESTION, sharer_messages=LONGER)
        assert fused.report.memory_slots == slots


def test_pooling_does_not_see_padding():
    model = private(slots=3)
    fuser = model.fusers[0]
    geometry = model.sharers[0].geometry
    keys = [torch.randn(2, geometry.kv_heads, 7, geometry.head_dim) for _ in fuser.config.source_layers]
    values = [torch.randn_like(key) for key in keys]
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    both = fuser(Entries(keys, values), mask=mask)
    short = fuser(Entries([key[1:, :, :4] for key in keys], [value[1:, :, :4] for value in values]))
    for (keys_both, values_both), (keys_short, values_short) in zip(both, short, strict=True):
        torch.testing.assert_close(keys_both[1:], keys_short)
        torch.testing.assert_close(values_both[1:], values_short)


def test_beams_and_several_sequences():
    model = private()
    given = {"sharer_messages": [DOCUMENT, LONGER], "max_new_tokens": 4, "do_sample": False}
    beams = model.generate([QUESTION, "Who?"], num_beams=3, num_return_sequences=2, **given)
    assert len(beams) == 4
    alone = model.generate("Who?", sharer_messages=LONGER, max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams[2].ids.tolist() == alone.ids.tolist()


def test_a_conversation_of_several_turns_equals_a_fresh_run():
    model = private()
    handoff = model.sharers[0].read(DOCUMENT)
    chat = model.chat("Be brief.", sharer_messages=handoff, max_new_tokens=4, do_sample=False)
    first = chat.send("Where does the fox sleep?")
    second = chat.send("And why?")
    fresh = model.generate(
        [
            *QUESTION,
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "And why?"},
        ],
        sharer_messages=DOCUMENT,
        max_new_tokens=4,
        do_sample=False,
    )
    assert second.ids.tolist() == fresh.ids.tolist()
    assert "".join(model.stream(QUESTION, sharer_messages=handoff, max_new_tokens=4, do_sample=False)) == first.text


def test_several_sharers_each_with_a_document():
    one = private()
    receiver, sharer = one.receiver, one.sharers[0]
    other = Sharer(build("qwen3", 5), tokenizer("chatml"), "other")
    second = (
        private()
        .fusers[0]
        .from_geometry(
            other.geometry,
            receiver.geometry,
            layer_map("depth", receiver.geometry.layers, other.geometry.layers),
            rank=8,
        )
    )
    torch.nn.init.normal_(second.weight, std=0.3)
    second.config.training = {"config": "random"}
    model = C2CModel(receiver, [sharer, other], [one.fusers[0], second])
    both = model.prefill(QUESTION, sharer_messages=(DOCUMENT, LONGER))
    kept = [len(sharer.read(DOCUMENT).kept), len(other.read(LONGER).kept)]
    assert both.report.memory_slots == sum(kept)
    swapped = model.prefill(QUESTION, sharer_messages=(LONGER, DOCUMENT))
    assert both.report.memory_slots != 0
    assert swapped.report.memory_slots != both.report.memory_slots
    with pytest.raises(PromptError, match="2 hand over private context"):
        model.generate(QUESTION, sharer_messages=DOCUMENT)


def test_shared_and_private_context_in_one_conversation():
    """With the private entries pooled to nothing the shared ones fuse as always; with both, both count."""
    shared = open_fusers(pair(fuser_options={"rank": 8}))
    receiver, sharer = shared.receiver, shared.sharers[0]
    mapping = layer_map("depth", receiver.geometry.layers, sharer.geometry.layers)
    none = MemoryFuser.from_geometry(sharer.geometry, receiver.geometry, mapping, rank=8, slots=0)
    mixed = C2CModel(receiver, [sharer, sharer], [shared.fusers[0], none])
    expected = shared.prefill(QUESTION)
    fused = mixed.prefill(QUESTION, sharer_messages=DOCUMENT)
    assert torch.equal(
        receiver.next_logits(fused.tokens, fused.cache), receiver.next_logits(expected.tokens, expected.cache)
    )
    memory = private().fusers[0]
    both = C2CModel(receiver, [sharer, sharer], [shared.fusers[0], memory])
    fused = both.prefill(QUESTION, sharer_messages=DOCUMENT)
    assert fused.report.memory_slots > 0
    assert fused.report.fused_tokens == expected.report.fused_tokens
    # the receiver reads its prompt with the memory, and the fused entries lie behind it
    alone = C2CModel(receiver, [sharer], [memory]).prefill(QUESTION, sharer_messages=DOCUMENT)
    assert kv_cache.length(fused.cache) == kv_cache.length(alone.cache)
    column = first_user_column(receiver.tokenizer, QUESTION, RenderOptions())
    slots = alone.report.memory_slots
    for (keys, _), (other, _) in zip(kv_cache.layers(fused.cache), kv_cache.layers(alone.cache), strict=True):
        assert torch.equal(keys[:, :, column : column + slots], other[:, :, column : column + slots])
        assert not torch.equal(keys[:, :, column + slots :], other[:, :, column + slots :])


def test_saved_and_loaded(tmp_path):
    model = private(slots=4)
    model.save_pretrained(tmp_path)
    fuser = load_fuser(tmp_path)
    assert isinstance(fuser, MemoryFuser)
    again = C2CModel.from_pretrained(tmp_path, receiver=model.receiver, sharer=model.sharers[0])
    assert torch.equal(logits(model, QUESTION, DOCUMENT), logits(again, QUESTION, DOCUMENT))


def test_what_was_drafted_is_handed_over():
    model = private()
    sharer = model.sharers[0]
    plain, drafted = sharer.read(DOCUMENT), sharer.read(DOCUMENT, draft_tokens=5)
    written = sharer.answer(DOCUMENT, max_new_tokens=5, do_sample=False)
    assert drafted.ids.tolist() == [*plain.ids.tolist(), *written.ids.tolist()]
    assert drafted.kept.tolist() == [*plain.kept.tolist(), *range(len(plain.ids), len(drafted.ids))]
    whole = sharer.prefill(drafted.tokens)
    for (keys, values), (own_keys, own_values) in zip(
        kv_cache.layers(drafted.cache(sharer.dtype, sharer.device)), kv_cache.layers(whole), strict=True
    ):
        torch.testing.assert_close(keys, own_keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values, own_values, rtol=1e-4, atol=1e-4)


def test_a_growing_document_is_not_read_again(monkeypatch):
    sharer = private().sharers[0]
    begun = sharer.read(LONGER)
    lengths = []
    prefill = Sharer.prefill

    def counted(self, batch, stop=None, cache=None):
        lengths.append(batch.length - (kv_cache.length(cache) if cache is not None and cache.layers else 0))
        return prefill(self, batch, stop, cache)

    monkeypatch.setattr(Sharer, "prefill", counted)
    grown = sharer.read(LONGER + DOCUMENT, reuse=begun)
    monkeypatch.undo()
    assert sum(lengths) < len(grown.ids) / 2
    fresh = sharer.read(LONGER + DOCUMENT)
    assert grown.ids.tolist() == fresh.ids.tolist()
    for (keys, _), (own, _) in zip(
        kv_cache.layers(grown.cache(torch.float32, sharer.device)),
        kv_cache.layers(fresh.cache(torch.float32, sharer.device)),
        strict=True,
    ):
        torch.testing.assert_close(keys, own, rtol=1e-4, atol=1e-4)
    assert len(begun.ids) < len(grown.ids)  # the earlier one is as it was
    other = Sharer(build("qwen3", 5), tokenizer("llama3"), "other")
    with pytest.raises(MismatchError):
        other.read(LONGER, reuse=begun)


def test_impossible_requests_are_refused():
    model = private()
    with pytest.raises(PromptError, match="pass sharer_messages"):
        model.generate(QUESTION)
    with pytest.raises(PromptError, match="both models read"):
        pair().generate(QUESTION, sharer_messages=DOCUMENT)
    with pytest.raises(PromptError, match="got 3 private contexts for 2 conversations"):
        model.generate(["a", "b"], sharer_messages=["x", "y", "z"])
    with pytest.raises(PromptError, match="first user message"):
        model.generate([{"role": "system", "content": "Only this."}], sharer_messages=DOCUMENT)
    with pytest.raises(FuserError, match="leaves out"):
        MemoryFuser.from_geometry(model.sharers[0].geometry, model.receiver.geometry, [None, 0, 1, 1, 2], rank=4)
    with pytest.raises(FuserError, match="slots is -1"):
        private(slots=-1)
    other = Sharer(build("qwen3", 5), tokenizer("llama3"), "other").read(DOCUMENT)
    with pytest.raises(MismatchError, match="handoff"):
        model.generate(QUESTION, sharer_messages=other)
    assert isinstance(model.receiver, Receiver)
    assert isinstance(other, Handoff)
