"""Private context: what a sharer alone has read reaches a receiver that has not, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from c2c import C2CModel, kv_cache
from c2c.errors import FuserError, MismatchError, PromptError
from c2c.fusers import Entries, MemoryFuser
from c2c.layer_map import layer_map
from c2c.private_context import PrivateEntries, align_shared, first_user_column, place, prefill_entries
from c2c.prompting import RenderOptions
from c2c.sharer import Sharer
from tiny import assert_equal_caches, build, entries, memory_pair, open_fusers, pair, token_ids, tokenizer

DOCUMENT = "The fox sleeps in a red house by the sea."
LONGER = "A dog and a cat went to the market. " * 4
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where does the fox sleep?"}]
RECEIVERS = ["llama", "qwen3", "gemma3"]
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return memory_pair()


def logits(model: C2CModel, messages, given, **options):
    """Logits of the first new token."""
    fused = model.prefill(messages, sharer_messages=given, **options)
    return fused.model.next_logits(fused.tokens, fused.cache)


def receiver_logits(model, messages):
    fused = model.receiver.prefill_messages(messages)
    return fused.model.next_logits(fused.tokens, fused.cache)


def user_column(model):
    return first_user_column(model.receiver.tokenizer, QUESTION, RenderOptions())


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_without_entries_it_is_the_receiver_alone_bit_for_bit(receiver):
    """Pooled to no slots, untrained, or left out by the blend."""
    for model, blend in (
        (memory_pair(receiver, slots=0), 1.0),
        (pair(receiver, fuser="memory"), 1.0),
        (memory_pair(receiver), 0.0),
    ):
        assert torch.equal(logits(model, QUESTION, DOCUMENT, blend=blend), receiver_logits(model, QUESTION))


@pytest.mark.parametrize("receiver", RECEIVERS)
def test_entries_that_are_the_receivers_own_are_the_text_itself(receiver):
    """Positions, masks and rotation are right: a perfect memory of a text answers as if the text stood there."""
    model = memory_pair(receiver)
    ours, column, options = model.receiver, user_column(model), RenderOptions()
    whole = ours.encode([QUESTION[0], {"role": "user", "content": DOCUMENT + QUESTION[1]["content"]}])
    question = ours.encode(QUESTION)
    slots = whole.length - question.length
    assert slots > 5
    assert whole.ids[0].tolist()[:column] + whole.ids[0].tolist()[column + slots :] == question.ids[0].tolist()
    cache, part = ours.prefill(whole, whole.length - 1), slice(column, column + slots)
    tables = ours.rotary(whole.positions[:, part])
    own = [
        (table.undo(keys[:, :, part]), values[:, :, part])
        for table, (keys, values) in zip(tables, kv_cache.layers(cache), strict=True)
    ]
    prompt = align_shared(model, QUESTION, options)
    placed = place(prompt, ours, QUESTION, options, [PrivateEntries(own, 0)])
    tokens = placed.receiver
    assert tokens.positions.tolist() == whole.positions.tolist()
    built = ours.prefill(tokens, tokens.length - 1, prefill_entries(kv_cache.empty_cache(), ours, placed))
    expected = ours.next_logits(whole, cache)
    torch.testing.assert_close(ours.next_logits(tokens, built), expected, rtol=1e-4, atol=1e-4)


def test_the_receivers_own_entries_before_the_memory_are_untouched(model):
    fused, column = model.prefill(QUESTION, sharer_messages=DOCUMENT), user_column(model)
    tokens = model.receiver.encode(QUESTION)
    assert_equal_caches(kv_cache.crop(fused.cache, column), model.receiver.prefill(tokens, column))
    slots = fused.report.memory_slots
    assert slots == len(model.sharers[0].read(DOCUMENT).kept)
    assert kv_cache.length(fused.cache) == column + slots
    assert fused.report.prompt_tokens == tokens.length


def test_the_document_matters_and_its_form_does_not(model):
    first = logits(model, QUESTION, DOCUMENT)
    assert not torch.allclose(first, logits(model, QUESTION, LONGER), atol=1e-3)
    assert torch.equal(first, logits(model, QUESTION, model.sharers[0].read(DOCUMENT)))


@pytest.mark.parametrize("slots", [None, 3])
@pytest.mark.parametrize("receiver", RECEIVERS)
def test_a_batch_equals_its_singles(receiver, slots):
    model = memory_pair(receiver, slots=slots)
    questions = [QUESTION, "Who?", [{"role": "user", "content": "Tell me what they bought there, please."}]]
    documents = [DOCUMENT, LONGER, "Sun."]
    batch = model.generate(questions, sharer_messages=documents, **GREEDY)
    for question, document, answer in zip(questions, documents, batch, strict=True):
        assert token_ids(model.generate(question, sharer_messages=document, **GREEDY)) == token_ids(answer)
        if slots:
            assert model.prefill(question, sharer_messages=document).report.memory_slots == slots
    turned = model.generate(questions[::-1], sharer_messages=documents[::-1], **GREEDY)
    assert token_ids(turned) == token_ids(batch)[::-1]


def test_pooling_does_not_see_padding():
    model = memory_pair(slots=3)
    fuser, geometry = model.fusers[0], model.sharers[0].geometry
    shape = (2, geometry.kv_heads, 7, geometry.head_dim)
    keys, values = ([torch.randn(shape) for _ in fuser.config.source_layers] for _ in range(2))
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    both = fuser(Entries(keys, values), mask=mask)
    short = fuser(Entries([key[1:, :, :4] for key in keys], [value[1:, :, :4] for value in values]))
    for padded, alone in zip(both, short, strict=True):
        torch.testing.assert_close([entry[1:] for entry in padded], list(alone))


def test_beams_and_several_sequences(model):
    options = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    beams = model.generate([QUESTION, "Who?"], sharer_messages=[DOCUMENT, LONGER], **options)
    assert len(beams) == 4
    assert token_ids(beams[2:]) == token_ids(model.generate("Who?", sharer_messages=LONGER, **options))


def test_a_conversation_of_several_turns_equals_a_fresh_run(model):
    handoff = model.sharers[0].read(DOCUMENT)
    chat = model.chat("Be brief.", sharer_messages=handoff, **GREEDY)
    first = chat.send("Where does the fox sleep?")
    second = chat.send("And why?")
    turns = [*QUESTION, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And why?"}]
    assert token_ids(second) == token_ids(model.generate(turns, sharer_messages=DOCUMENT, **GREEDY))
    assert "".join(model.stream(QUESTION, sharer_messages=handoff, **GREEDY)) == first.text


def test_several_sharers_each_with_a_document(model):
    receiver, sharer = model.receiver, model.sharers[0]
    other = Sharer(build("qwen3", 5), tokenizer("chatml"), "other")
    mapping = layer_map("depth", receiver.geometry.layers, other.geometry.layers)
    second = MemoryFuser.from_geometry(other.geometry, receiver.geometry, mapping, rank=8)
    torch.nn.init.normal_(second.weight, std=0.3)
    second.config.training = {"config": "random"}
    both = C2CModel(receiver, [sharer, other], [model.fusers[0], second])
    for documents in ((DOCUMENT, LONGER), (LONGER, DOCUMENT)):
        kept = [len(one.read(document).kept) for one, document in zip(both.sharers, documents, strict=True)]
        assert both.prefill(QUESTION, sharer_messages=documents).report.memory_slots == sum(kept)
    with pytest.raises(PromptError, match="2 hand over private context"):
        both.generate(QUESTION, sharer_messages=DOCUMENT)


def test_shared_and_private_context_in_one_conversation(model):
    """With the private entries pooled to nothing the shared ones fuse as always; with both, both count."""
    shared = open_fusers(pair(fuser_options={"rank": 8}))
    receiver, sharer, memory = shared.receiver, shared.sharers[0], model.fusers[0]
    none = MemoryFuser.from_geometry(sharer.geometry, receiver.geometry, memory.config.layer_map, rank=8, slots=0)
    mixed = C2CModel(receiver, [sharer, sharer], [shared.fusers[0], none])
    expected = shared.prefill(QUESTION)
    assert_equal_caches(mixed.prefill(QUESTION, sharer_messages=DOCUMENT).cache, expected.cache)
    both = C2CModel(receiver, [sharer, sharer], [shared.fusers[0], memory])
    fused = both.prefill(QUESTION, sharer_messages=DOCUMENT)
    assert fused.report.fused_tokens == expected.report.fused_tokens
    # the receiver reads its prompt with the memory, and the fused entries lie behind it
    alone = C2CModel(receiver, [sharer], [memory]).prefill(QUESTION, sharer_messages=DOCUMENT)
    assert fused.report.memory_slots == alone.report.memory_slots > 0
    begin, end = user_column(both), user_column(both) + alone.report.memory_slots
    for one, other in zip(entries(fused.cache), entries(alone.cache), strict=True):
        assert torch.equal(one[:, :, begin:end], other[:, :, begin:end])
        assert not torch.equal(one[:, :, end:], other[:, :, end:])


def test_saved_and_loaded(tmp_path):
    model = memory_pair(slots=4)
    model.save_pretrained(tmp_path)
    again = C2CModel.from_pretrained(tmp_path, receiver=model.receiver, sharer=model.sharers[0])
    assert torch.equal(logits(model, QUESTION, DOCUMENT), logits(again, QUESTION, DOCUMENT))


def test_a_draft_is_handed_over(model):
    sharer = model.sharers[0]
    plain, drafted = sharer.read(DOCUMENT), sharer.read(DOCUMENT, draft_tokens=5)
    written = sharer.answer(DOCUMENT, max_new_tokens=5, do_sample=False)
    assert drafted.ids.tolist() == [*plain.ids.tolist(), *written.ids.tolist()]
    assert drafted.kept.tolist() == [*plain.kept.tolist(), *range(len(plain.ids), len(drafted.ids))]
    whole = sharer.prefill(drafted.tokens)
    assert_equal_caches(drafted.cache(sharer.dtype, sharer.device), whole, rtol=1e-4, atol=1e-4)


def test_a_growing_document_is_not_read_again(model):
    sharer = model.sharers[0]
    begun = sharer.read(LONGER)
    lengths, before = [], len(begun.ids)
    hook = sharer.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    grown = sharer.read(LONGER + DOCUMENT, reuse=begun)
    hook.remove()
    assert sum(lengths) < len(grown.ids) / 2
    fresh = sharer.read(LONGER + DOCUMENT)
    assert grown.ids.tolist() == fresh.ids.tolist()
    caches = [handoff.cache(sharer.dtype, sharer.device) for handoff in (grown, fresh)]
    assert_equal_caches(*caches, rtol=1e-4, atol=1e-4)
    assert len(begun.ids) == before < len(grown.ids)
    with pytest.raises(MismatchError):
        Sharer(build("qwen3", 5), tokenizer("llama3"), "other").read(LONGER, reuse=begun)


def test_impossible_requests_are_refused(model):
    other = Sharer(build("qwen3", 5), tokenizer("llama3"), "other").read(DOCUMENT)
    system_only = [{"role": "system", "content": "Only this."}]
    for messages, given, error, message in [
        (QUESTION, None, PromptError, "pass sharer_messages"),
        (["a", "b"], ["x", "y", "z"], PromptError, "got 3 private contexts for 2 conversations"),
        (system_only, DOCUMENT, PromptError, "first user message"),
        (QUESTION, other, MismatchError, "handoff"),
    ]:
        with pytest.raises(error, match=message):
            model.generate(messages, sharer_messages=given)
    with pytest.raises(PromptError, match="both models read"):
        pair().generate(QUESTION, sharer_messages=DOCUMENT)
    with pytest.raises(PromptError, match="pass 0 or 1"):
        model.generate(QUESTION, sharer_messages=DOCUMENT, blend=0.5)
    with pytest.raises(FuserError, match="leaves out"):
        MemoryFuser.from_geometry(model.sharers[0].geometry, model.receiver.geometry, [None, 0, 1, 1, 2], rank=4)
    with pytest.raises(FuserError, match="slots"):
        memory_pair(slots=-1)
