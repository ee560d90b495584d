"""Copy: the same model on both sides takes over what it has read as if it had read it itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from c2c import C2CModel, Handoff, kv_cache
from c2c.errors import FuserError, MismatchError, PromptError
from c2c.fusers.base import load_fuser
from c2c.language_model import Receiver
from c2c.prompting import RenderOptions, with_passage
from c2c.recompute import recompute_tokens
from c2c.sharer import Sharer
from c2c.systems import SystemOptions, make_system
from c2c.systems.fused import Untrained
from c2c.tokens import left_pad
from tiny import assert_equal_caches, build, pair, token_ids, tokenizer

FAMILIES = ["llama", "qwen3", "gemma3"]
DOCUMENT = "The fox sleeps in a red house by the sea."
OTHER = "A dog and a cat went to the market, and came back late."
SHORT = "Wheat is a grain."
QUESTION = "Where does the fox sleep?"
SYSTEM = {"role": "system", "content": "Be brief."}
GREEDY = {"max_new_tokens": 6, "do_sample": False}
TEXTS = (
    st.text(st.characters(codec="ascii", categories=("L", "N", "P")) | st.just(" "), min_size=3, max_size=80)
    .map(str.strip)
    .filter(len)
)


def twins(family: str = "llama", **options) -> C2CModel:
    """One model on both sides."""
    receiver = Receiver(build(family, 1), tokenizer("chatml"), family)
    sharer = Sharer(receiver.model, receiver.tokenizer, family)
    return C2CModel.from_models(receiver, sharer, fuser="copy", fuser_options=options)


MODELS = {family: twins(family) for family in FAMILIES}


def asked(question: str, system: bool) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": question}] if system else [{"role": "user", "content": question}]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(document=TEXTS, question=TEXTS, system=st.booleans())
def test_a_copy_behind_the_same_tokens_is_the_receivers_own_reading_bit_for_bit(family, document, question, system):
    model, messages = MODELS[family], asked(question, system)
    handoff = model.sharers[0].read(document, before="Be brief." if system else "")
    found = model.prefill(messages, sharer_messages=handoff)
    tokens = model.receiver.encode(with_passage(messages, document))
    assert found.tokens.ids.tolist() == tokens.ids.tolist()
    assert_equal_caches(found.cache, model.receiver.prefill(tokens, len(handoff.ids)))
    assert "as the receiver itself" in found.report.notes[0]
    reader = make_system("reader", model).generate(messages, document, **GREEDY)
    assert token_ids(found.generate(**GREEDY)) == token_ids(reader)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_read_where_the_conversation_has_it(family):
    """Without a handoff the sharer reads behind the system message of each conversation."""
    model = MODELS[family]
    batch = [asked(QUESTION, True), asked("What is red?", False)]
    reader = make_system("reader", model).generate(batch, [DOCUMENT, OTHER], **GREEDY)
    assert token_ids(model.generate(batch, sharer_messages=[DOCUMENT, OTHER], **GREEDY)) == token_ids(reader)


@pytest.mark.parametrize("family", FAMILIES)
def test_moved_documents_have_the_keys_of_their_new_place(family):
    """In layer 0 keys and values depend on token and position alone, so that they can be compared with reading."""
    model = MODELS[family]
    handoffs = [model.sharers[0].read(document, before="") for document in (DOCUMENT, OTHER, DOCUMENT)]
    found = model.prefill(QUESTION, sharer_messages=handoffs)
    tokens = model.receiver.encode(with_passage(asked(QUESTION, False), DOCUMENT, OTHER, DOCUMENT))
    assert found.tokens.ids.tolist() == tokens.ids.tolist()
    held = kv_cache.length(found.cache)
    for mine, own in zip(
        kv_cache.layer(found.cache, 0), kv_cache.layer(model.receiver.prefill(tokens, held), 0), strict=True
    ):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-4)
    assert "2 of 3 documents were moved" in found.report.notes[0]
    assert found.report.memory_slots == sum(len(handoff.kept) for handoff in handoffs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_that_is_refreshed_whole_is_read_by_the_receiver(family):
    model = twins(family, refresh=1000)
    handoffs = [model.sharers[0].read(document, before="") for document in (DOCUMENT, OTHER)]
    found = model.prefill(QUESTION, sharer_messages=handoffs)
    tokens = model.receiver.encode(with_passage(asked(QUESTION, False), DOCUMENT, OTHER))
    own = model.receiver.prefill(tokens, kv_cache.length(found.cache))
    assert_equal_caches(found.cache, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("refresh", [0, 3])
@pytest.mark.parametrize("reread", [0, 1, 9])
def test_moved_documents_are_refreshed_in_one_pass(refresh, reread):
    model = twins(refresh=refresh, reread=reread)
    texts = (DOCUMENT, OTHER, QUESTION, SYSTEM["content"])
    handoffs = [model.sharers[0].read(text, before="") for text in texts]
    read: list[list[int]] = []
    decoder = model.receiver.model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    model.prefill(OTHER, sharer_messages=handoffs)  # once for what is probed
    read.clear()
    found = model.prefill(OTHER, sharer_messages=handoffs)
    hook.remove()
    moved = [one.ids[one.kept].tolist() for one in handoffs[1:]]
    anew = [
        [*(ids if reread == 9 or (reread and place == 0) else [] if reread else ids[:refresh])]
        for place, ids in enumerate(moved)
    ]
    columns = kv_cache.length(found.cache)
    question = found.tokens.ids[0, columns : min(columns + 64, found.tokens.length - 1)].tolist()
    assert read == [*([question] if reread else []), *([list(chain.from_iterable(anew))] if any(anew) else [])]


def test_the_nearest_document_equals_what_is_read_behind_the_others():
    model, texts = twins(refresh=0, reread=1), (DOCUMENT, OTHER, QUESTION, SYSTEM["content"])
    handoffs = [model.sharers[0].read(text, before="") for text in texts]
    found = model.prefill(OTHER, sharer_messages=handoffs)
    start, stop = len(handoffs[0].ids), len(handoffs[0].ids) + len(handoffs[1].kept)
    own = model.receiver.prefill(found.tokens, stop)  # the first is exact, so the second is read behind the very same
    for one, other in zip(kv_cache.layers(found.cache), kv_cache.layers(own), strict=True):
        for held, expected in zip(one, other, strict=True):
            torch.testing.assert_close(held[:, :, start:stop], expected[:, :, start:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_refreshing_in_one_pass_is_refreshing_one_after_the_other(attention):
    receiver = Receiver(build("llama", 1), tokenizer("chatml"), "llama")
    receiver.model.set_attn_implementation(attention)
    tokens = receiver.encode(DOCUMENT + OTHER)
    cache = receiver.prefill(left_pad([list(range(3, 3 + tokens.length))], 0))  # of other tokens
    one, other = kv_cache.copy(cache), kv_cache.copy(cache)
    spans = [(2, 5), (7, 8), (10, tokens.length)]
    recompute_tokens(receiver, tokens, spans, one)
    for span in spans:
        recompute_tokens(receiver, tokens, [span], other)
    assert_equal_caches(one, other, rtol=1e-4, atol=1e-5)
    kept = [0, 1, 5, 6, 8, 9]
    for (keys, values), (own_keys, own_values) in zip(kv_cache.layers(one), kv_cache.layers(cache), strict=True):
        assert torch.equal(keys[:, :, kept], own_keys[:, :, kept])
        assert torch.equal(values[:, :, kept], own_values[:, :, kept])
        assert not torch.equal(values[:, :, 2:5], own_values[:, :, 2:5])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("other", [True, "Bread is made of flour."])
def test_a_document_read_among_others_is_the_second_of_two(family, other, monkeypatch):
    monkeypatch.setattr("c2c.handoff.OTHER_PASSAGE", SHORT)  # there are 512 tokens, of a letter each
    model = MODELS[family]
    handoff = model.sharers[0].read(DOCUMENT, before="", among=other)
    text = SHORT if other is True else other
    tokens = model.receiver.encode(with_passage(asked(QUESTION, False), text, DOCUMENT))
    assert handoff.ids.tolist() == tokens.ids[0, : len(handoff.ids)].tolist()
    alone = model.sharers[0].read(DOCUMENT, before="")
    assert handoff.ids[handoff.kept].tolist() == alone.ids[alone.kept].tolist()
    own = model.receiver.prefill(tokens, len(handoff.ids))
    assert_equal_caches(handoff.cache(torch.float32, torch.device("cpu")), own)
    found = model.prefill(QUESTION, sharer_messages=handoff)
    asked_alone = model.receiver.encode(with_passage(asked(QUESTION, False), DOCUMENT))
    assert found.tokens.ids.tolist() == asked_alone.ids.tolist()
    assert "1 of 1 documents were moved" in found.report.notes[0]


@pytest.mark.parametrize("wrong", [{"among": True}, {"among": "", "before": ""}, {"among": 3, "before": ""}], ids=str)
def test_among_is_for_a_document_behind_a_text(wrong):
    with pytest.raises(PromptError, match="among"):
        MODELS["llama"].sharers[0].read(DOCUMENT, **wrong)


def test_a_subset_of_documents_in_any_order_and_batches_are_their_single_runs():
    model = MODELS["llama"]
    one, two, three = (model.sharers[0].read(text, before="") for text in (DOCUMENT, OTHER, QUESTION))
    sets = [[one], [two, one], [three, one, two]]
    batch = ["Where?", "Who went to the market, and when?", "What?"]
    singles = [
        model.generate(question, sharer_messages=documents, **GREEDY)
        for question, documents in zip(batch, sets, strict=True)
    ]
    assert token_ids(model.generate(batch, sharer_messages=sets, **GREEDY)) == token_ids(singles)
    assert token_ids(model.generate(batch, sharer_messages=[one, two, three], **GREEDY)) == token_ids(
        [model.generate(q, sharer_messages=d, **GREEDY) for q, d in zip(batch, (one, two, three), strict=True)]
    )


@pytest.mark.parametrize("room", [True, False])
def test_texts_for_one_conversation_are_documents_each_read_apart(room, monkeypatch):
    if room:
        monkeypatch.setattr("c2c.handoff.OTHER_PASSAGE", SHORT)
    model = MODELS["llama"]
    apart = [model.sharers[0].read(text, before="", among=among) for text, among in ((DOCUMENT, False), (OTHER, room))]
    expected = token_ids(model.generate(QUESTION, sharer_messages=apart, **GREEDY))
    assert token_ids(model.generate(QUESTION, sharer_messages=[DOCUMENT, OTHER], **GREEDY)) == expected


@pytest.mark.parametrize("precision", ["int8", "float16"])
def test_a_handoff_that_was_rounded_is_not_called_exact(precision):
    model = MODELS["llama"]
    handoff = model.sharers[0].read(DOCUMENT, before="").to(precision)
    found = model.prefill(QUESTION, sharer_messages=handoff)
    assert "1 of 1 documents were moved" in found.report.notes[0]
    exact = model.prefill(QUESTION, sharer_messages=model.sharers[0].read(DOCUMENT, before=""))
    assert_equal_caches(found.cache, exact.cache, rtol=0.1, atol=0.1)


def test_controls_of_a_copy():
    model = MODELS["llama"]
    own, other = (
        make_system(name, model, SystemOptions(other=OTHER)).generate(QUESTION, DOCUMENT, **GREEDY)
        for name in ("c2c", "deranged")
    )
    expected = model.generate(QUESTION, sharer_messages=OTHER, **GREEDY)
    assert token_ids(other) == token_ids(expected) != token_ids(own)
    zero = make_system("zero", model).prefill(QUESTION, DOCUMENT)
    plain = model.prefill(QUESTION, sharer_messages=DOCUMENT)
    column = kv_cache.length(zero.cache) - len(model.sharers[0].read(DOCUMENT, before="").kept)
    for emptied, full in zip(kv_cache.layers(zero.cache), kv_cache.layers(plain.cache), strict=True):
        assert torch.equal(emptied[1][:, :, :column], full[1][:, :, :column])
        assert not emptied[1][:, :, column : kv_cache.length(zero.cache)].any()
    assert Untrained.unavailable(model, SystemOptions())


def test_other_wording_of_instruction_and_passage():
    options = RenderOptions(instruction="Read this.\n\n", passage="<doc>\n{passage}\n</doc>\n\n")
    model = MODELS["llama"]
    reader = make_system("reader", model).generate(QUESTION, DOCUMENT, options=options, **GREEDY)
    found = model.prefill(QUESTION, sharer_messages=DOCUMENT, options=options)
    assert "as the receiver itself" in found.report.notes[0]
    assert token_ids(found.generate(**GREEDY)) == token_ids(reader)
    with pytest.raises(PromptError, match="passage"):
        RenderOptions(passage="no place for it")


def test_a_copy_is_saved_and_loaded_without_weights(tmp_path):
    model = twins(refresh=3)
    model.save_pretrained(tmp_path / "copy")
    fuser = load_fuser(tmp_path / "copy")
    assert (fuser.family, fuser.config.refresh, fuser.trained) == ("copy", 3, True)
    loaded = C2CModel.from_pretrained(tmp_path / "copy", receiver=model.receiver, sharer=model.sharers[0])
    expected = token_ids(model.generate(QUESTION, sharer_messages=DOCUMENT, **GREEDY))
    assert token_ids(loaded.generate(QUESTION, sharer_messages=DOCUMENT, **GREEDY)) == expected


def test_a_handoff_from_a_file_is_as_exact(tmp_path):
    model = MODELS["gemma3"]
    model.sharers[0].read(DOCUMENT, before="").save(tmp_path / "document.safetensors")
    found = model.prefill(QUESTION, sharer_messages=Handoff.load(tmp_path / "document.safetensors"))
    assert "as the receiver itself" in found.report.notes[0]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_another_geometry_is_refused():
    with pytest.raises(FuserError, match="same model"):
        pair("llama", "qwen2", fuser="copy")


@pytest.mark.parametrize("change", ["weights", "tokenizer", "rotation"])
def test_models_whose_entries_mean_something_else_are_refused(change):
    receiver = Receiver(build("llama", 1), tokenizer("chatml"), "one")
    other = build("llama", 2 if change == "weights" else 1)
    if change == "rotation":
        other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 777.0}
        other = type(other)(other.config)
        other.load_state_dict(receiver.model.state_dict())
    sharer = Sharer(other, tokenizer("llama3" if change == "tokenizer" else "chatml"), "two")
    with pytest.raises(MismatchError, match={"rotation": "rope"}.get(change, change)):
        C2CModel.from_models(receiver, sharer, fuser="copy")
    if change == "weights":
        C2CModel.from_models(receiver, sharer, fuser="copy", fuser_options={"variant": True})


def test_a_handoff_of_another_model_is_refused():
    foreign = Sharer(build("llama", 2), tokenizer("chatml"), "other").read(DOCUMENT, before="")
    with pytest.raises(MismatchError, match="weights"):
        MODELS["llama"].generate(QUESTION, sharer_messages=foreign, **GREEDY)
    own = MODELS["llama"].sharers[0].read(DOCUMENT, before="")
    turned = replace(own, sharer=replace(own.sharer, rope='{"rope_theta": 1.0, "rope_type": "default"}'))
    with pytest.raises(MismatchError, match="rope"):
        MODELS["llama"].generate(QUESTION, sharer_messages=turned, **GREEDY)


@pytest.mark.parametrize(
    ("document", "before", "message"),
    [
        ([SYSTEM, {"role": "user", "content": "a"}], "", "one document"),
        ("text", [{"role": "user", "content": "b"}], "user message"),
    ],
)
def test_what_can_not_be_read_as_a_document_is_refused(document, before, message):
    with pytest.raises(PromptError, match=message):
        MODELS["llama"].sharers[0].read(document, before=before)


def test_a_wrong_number_of_documents_is_refused():
    model = MODELS["llama"]
    for given_documents in ([DOCUMENT], [DOCUMENT, OTHER, DOCUMENT], [], [[], [DOCUMENT]]):
        with pytest.raises(PromptError):
            model.generate(["one", "two"], sharer_messages=given_documents, **GREEDY)
    for name in ("refresh", "reread"):
        with pytest.raises(FuserError, match=name):
            twins(**{name: -1})
