"""The published token alignment: the recorded cases, and what the published code fails on."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from c2c import C2CModel
from c2c.alignment import PublishedAligner
from c2c.alignment.slots import align_conversation, translate
from c2c.errors import AlignmentError
from c2c.language_model import Receiver, Sharer
from c2c.prompting import RenderOptions, render_text
from tiny import FIXTURES, build, pair, tokenizer

CASES = json.loads((FIXTURES / "align" / "cases.json").read_text())
WORKING = [case for case in CASES["chat"] if "expected" in case]
FAILING = [case for case in CASES["chat"] if "error" in case]
TOKENIZERS = {name: tokenizer(name) for name in ("chatml", "chatml_sys", "llama3", "metaspace", "human")}


def sides(case):
    return TOKENIZERS[case["receiver_tokenizer"]], TOKENIZERS[case["sharer_tokenizer"]]


def aligned(case):
    return align_conversation(
        *sides(case),
        case["messages"],
        options=RenderOptions(case["add_generation_prompt"]),
        strategy=case["strategy"],
        remove_last_suffix=case["remove_last_surfix"],
    )


def conversation(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def test_all_cases_are_here():
    assert (len(WORKING), len(FAILING)) == (420, 42)


@pytest.mark.parametrize("name", sorted({case["case"] for case in WORKING}))
def test_recorded_cases(name):
    for case in WORKING:
        if case["case"] != name:
            continue
        slots, expected = aligned(case), case["expected"]
        where = (case["receiver_tokenizer"], case["sharer_tokenizer"], case["strategy"])
        assert slots.receiver_ids == expected["receiver_ids"], where
        assert slots.sharer_ids == expected["sharer_ids"], where
        assert [int(x) for x in slots.message_mask] == expected["message_mask"], where
        assert [int(x) for x in slots.receiver_padding] == expected["receiver_padding"], where
        assert [int(x) for x in slots.sharer_padding] == expected["sharer_padding"], where
        assert [[s.kind, s.start, s.stop] for s in slots.sections] == expected["sections"], where


@pytest.mark.parametrize("name", sorted({case["case"] for case in FAILING}))
def test_cases_that_the_published_code_fails_on(name):
    """Both sides keep their own text, and every message that both templates show is aligned as a message."""
    for case in FAILING:
        if case["case"] != name:
            continue
        slots, (receiver, _) = aligned(case), sides(case)
        width = len(slots.receiver_ids)
        assert {
            len(x) for x in (slots.sharer_ids, slots.message_mask, slots.receiver_padding, slots.sharer_padding)
        } == {width}
        borders = [0, *(section.stop for section in slots.sections)]
        assert [section.start for section in slots.sections] == borders[:-1]
        assert borders[-1] == width
        own = [i for i, pad in zip(slots.receiver_ids, slots.receiver_padding, strict=True) if not pad]
        if not case["remove_last_surfix"]:
            text = render_text(receiver, case["messages"], RenderOptions(case["add_generation_prompt"]))
            assert own == receiver.encode(text, add_special_tokens=False)
        shown = shown_by_both(case)
        messages = [section for section in slots.sections if section.kind == "message"]
        assert len(messages) == len(shown)
        for section, content in zip(messages, shown, strict=True):
            assert content in receiver.decode(slots.receiver_ids[section.start : section.stop])
            assert all(slots.message_mask[section.start : section.stop])
            assert not any(slots.receiver_padding[section.start : section.stop])
            assert not any(slots.sharer_padding[section.start : section.stop])


def shown_by_both(case):
    """Contents, trimmed, of the messages that no template drops; `human` knows users and assistants only."""
    names = (case["receiver_tokenizer"], case["sharer_tokenizer"])
    kept = [m for m in case["messages"] if "human" not in names or m["role"] in ("user", "assistant")]
    if case["remove_last_surfix"] and case["messages"][-1] not in kept:
        kept.append(case["messages"][-1])
    return [m["content"].strip() for m in kept if m["content"].strip()]


def test_plain_text():
    counts = Counter()
    for case in CASES["plain_text"]:
        receiver, sharer = sides(case)
        ids = receiver.encode(case["text"], add_special_tokens=False)
        assert ids == case["receiver_ids"]
        assert [translate(receiver, sharer, token, case["strategy"]) for token in ids] == case["sharer_ids"]
        counts[case["strategy"]] += 1
    assert set(counts) == {"first", "longest"}


def test_special_tokens_are_translated_by_role():
    llama3, chatml = TOKENIZERS["llama3"], TOKENIZERS["chatml"]
    assert translate(llama3, chatml, llama3.eos_token_id, "first") == chatml.eos_token_id
    assert translate(chatml, chatml, chatml.eos_token_id, "first") == chatml.eos_token_id
    start = chatml.convert_tokens_to_ids("<|im_start|>")
    metaspace = TOKENIZERS["metaspace"]
    assert translate(chatml, metaspace, start, "first") == metaspace.convert_tokens_to_ids("<|im_start|>")


def test_the_prompt_fuses_message_slots_and_nothing_else():
    receiver, sharer = TOKENIZERS["chatml"], TOKENIZERS["llama3"]
    talk = conversation("Hello there", "Fine", "And now?")
    slots = align_conversation(receiver, sharer, talk, options=RenderOptions())
    (prompt,) = PublishedAligner().align(receiver, [sharer], [talk], RenderOptions())
    fused = [column for chunk in prompt.chunks for column in chunk.alignments[0].receiver.tolist()]
    assert fused == [i for i, message in enumerate(slots.message_mask) if message]
    assert [a.sharer.tolist() == a.receiver.tolist() for c in prompt.chunks for a in c.alignments] == [True] * 3
    assert prompt.receiver.ids[prompt.receiver.mask].tolist() == receiver.encode(
        render_text(receiver, talk, RenderOptions()), add_special_tokens=False
    )
    assert int(prompt.receiver.mask.sum()) == prompt.fused_tokens + sum(
        n for reason, n in prompt.skipped.items() if reason != "padding"
    )


def test_without_alignment_the_sharer_reads_the_receivers_ids():
    receiver, sharers = TOKENIZERS["chatml"], [TOKENIZERS["llama3"], TOKENIZERS["human"]]
    prompts = PublishedAligner(enabled=False).align(
        receiver, sharers, [conversation("Hello"), conversation("Bye bye")], RenderOptions()
    )
    assert len(prompts) == 2
    for prompt, text in zip(prompts, ("Hello", "Bye bye"), strict=True):
        ids = receiver.encode(render_text(receiver, conversation(text), RenderOptions()), add_special_tokens=False)
        assert prompt.receiver.ids[0].tolist() == ids
        assert [sharer.ids[0].tolist() for sharer in prompt.sharers] == [ids, ids]
        assert [alignment.block for alignment in prompt.chunks[0].alignments] == [(0, 0, len(ids) - 1)] * 2
        assert prompt.skipped == {"last section, run on the fused cache": 1}


def test_what_it_cannot_align():
    receiver, sharer = TOKENIZERS["chatml"], TOKENIZERS["llama3"]
    with pytest.raises(AlignmentError, match=r"2 sharers.*spans"):
        PublishedAligner().align(receiver, [sharer, sharer], [conversation("Hello")], RenderOptions())
    bare = tokenizer("chatml")
    bare.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(AlignmentError, match=r"last section.*spans"):
        PublishedAligner().align(bare, [bare], [conversation("Hello")], RenderOptions(False))
    with pytest.raises(AlignmentError, match="nothing is left to fuse"):
        PublishedAligner(enabled=False).align(bare, [bare], [conversation("a")], RenderOptions(False))


@pytest.mark.parametrize("options", [{}, {"strategy": "longest"}, {"enabled": False}])
def test_answers_of_a_batch_are_those_of_its_rows(options):
    """Rows have sections of their own here, and pads in the middle of a prompt."""
    receiver = Receiver(build("qwen3", 1), tokenizer("chatml"))
    sharer = Sharer(build("llama", 2), tokenizer("chatml_sys"))
    model = C2CModel.from_models(
        receiver,
        sharer,
        fuser="c2c",
        fuser_options={"hidden_dim": 16, "intermediate_dim": 16},
        aligner=PublishedAligner(**options),
    )
    for name, parameter in model.fusers[0].named_parameters():
        if name.endswith("gate_logit"):
            parameter.data.fill_(1.0)
    prompts = ["Hello world!", conversation("What is the capital of France?", "Paris.", "Sure?"), "你好 🙂"]
    together = [r.ids.tolist() for r in model.generate(prompts, max_new_tokens=6)]
    assert together == [model.generate(p, max_new_tokens=6).ids.tolist() for p in prompts]
    backwards = [r.ids.tolist() for r in model.generate(prompts[::-1], max_new_tokens=6)]
    assert backwards == together[::-1]
    assert together != [r.ids.tolist() for r in model.receiver.answer(prompts, max_new_tokens=6)]


def test_the_aligner_is_part_of_the_fuser():
    model = pair(aligner=PublishedAligner("longest"))
    assert model.fusers[0].config.alignment == {"name": "published", "strategy": "longest", "enabled": True}
    again = C2CModel(model.receiver, model.sharers, list(model.fusers))
    assert again.aligner == PublishedAligner("longest")
