"""The published token alignment: the recorded cases, and what the published code fails on."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from itertools import accumulate, pairwise

import pytest

from c2c import C2CModel
from c2c.alignment import CharSpanAligner, PublishedAligner
from c2c.alignment.slots import align_rendered, translate
from c2c.errors import AlignmentError
from c2c.language_model import Receiver
from c2c.prompting import Rendered, RenderOptions, pad_id, render, render_text
from c2c.sharer import Sharer
from tiny import FIXTURES, build, open_fusers, pair, token_ids, tokenizer

CASES = json.loads((FIXTURES / "align" / "cases.json").read_text())
NAMES = sorted({case["case"] for case in CASES["chat"]})
TOKENIZERS = {name: tokenizer(name) for name in ("chatml", "chatml_sys", "llama3", "metaspace", "human")}


def sides(case):
    return TOKENIZERS[case["receiver_tokenizer"]], TOKENIZERS[case["sharer_tokenizer"]]


def rendered(tokenizer, case):
    """A prompt; one without its last suffix is all but the last message, and that one's raw text."""
    if not case["remove_last_surfix"]:
        return render(tokenizer, case["messages"], RenderOptions(case["add_generation_prompt"]))
    head, last = render(tokenizer, case["messages"][:-1], RenderOptions()), case["messages"][-1]["content"]
    span = ((len(head.text), len(head.text + last)), 0) if last else None
    return Rendered(head.text + last, (*head.contents, last), (*head.spans, span))


def aligned(case):
    """What is recorded of an aligned case: ids, masks and sections, slot by slot."""
    receiver, sharer = sides(case)
    prompts = rendered(receiver, case), rendered(sharer, case)
    found = align_rendered(receiver, sharer, *prompts, strategy=case["strategy"])
    slots = [(section.kind, *slot) for section in found for slot in section.slots]
    kinds, ours, theirs = (list(column) for column in zip(*slots, strict=True))
    borders = [0, *accumulate(len(section.slots) for section in found)]
    return {
        "receiver_ids": [pad_id(receiver) if token is None else token for token in ours],
        "sharer_ids": [pad_id(sharer) if token is None else token for token in theirs],
        "message_mask": [kind == "message" for kind in kinds],
        "receiver_padding": [token is None for token in ours],
        "sharer_padding": [token is None for token in theirs],
        "sections": [[s.kind, *border] for s, border in zip(found, pairwise(borders), strict=True)],
    }


def conversation(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def read(name, talk):
    """Token ids of a conversation as its template renders it."""
    return TOKENIZERS[name].encode(render_text(TOKENIZERS[name], talk, RenderOptions()), add_special_tokens=False)


def test_all_recorded_cases_are_here():
    assert sum("expected" in case for case in CASES["chat"]) == 420
    assert sum("error" in case for case in CASES["chat"]) == 42
    assert {case["strategy"] for case in CASES["plain_text"]} == {"first", "longest"}


@pytest.mark.parametrize("name", NAMES)
def test_recorded_cases(name):
    for case in CASES["chat"]:
        if case["case"] != name or "error" in case:
            continue
        found = aligned(case)
        where = (case["receiver_tokenizer"], case["sharer_tokenizer"], case["strategy"])
        assert found == {key: case["expected"][key] for key in found}, where


@pytest.mark.parametrize("name", sorted({case["case"] for case in CASES["chat"] if "error" in case}))
def test_cases_that_the_published_code_fails_on(name):
    """Both sides keep their own text, and every message that both templates show is aligned as a message."""
    for case in CASES["chat"]:
        if case["case"] != name or "error" not in case:
            continue
        slots, (receiver, _) = aligned(case), sides(case)
        own = [i for i, pad in zip(slots["receiver_ids"], slots["receiver_padding"], strict=True) if not pad]
        if not case["remove_last_surfix"]:
            text = render_text(receiver, case["messages"], RenderOptions(case["add_generation_prompt"]))
            assert own == receiver.encode(text, add_special_tokens=False)
        messages = [part for kind, *part in slots["sections"] if kind == "message"]
        for (start, stop), content in zip(messages, shown_by_both(case), strict=True):
            assert content in receiver.decode(slots["receiver_ids"][start:stop])
            assert not any(slots["receiver_padding"][start:stop] + slots["sharer_padding"][start:stop])


def shown_by_both(case):
    """Contents, trimmed, of the messages that no template drops; `human` shows users and assistants only."""
    names = (case["receiver_tokenizer"], case["sharer_tokenizer"])
    kept = [m for m in case["messages"] if "human" not in names or m["role"] in ("user", "assistant")]
    if case["remove_last_surfix"] and case["messages"][-1] not in kept:
        kept.append(case["messages"][-1])
    return [m["content"].strip() for m in kept if m["content"].strip()]


def test_plain_text():
    for case in CASES["plain_text"]:
        receiver, sharer = sides(case)
        ids = receiver.encode(case["text"], add_special_tokens=False)
        assert ids == case["receiver_ids"]
        assert [translate(receiver, sharer, token, case["strategy"]) for token in ids] == case["sharer_ids"]


def test_special_tokens_are_translated_by_role():
    llama3, chatml, metaspace = (TOKENIZERS[name] for name in ("llama3", "chatml", "metaspace"))
    start = "<|im_start|>"
    assert translate(llama3, chatml, llama3.eos_token_id, "first") == chatml.eos_token_id
    assert translate(chatml, chatml, chatml.eos_token_id, "first") == chatml.eos_token_id
    assert translate(chatml, metaspace, chatml.convert_tokens_to_ids(start), "first") == (
        metaspace.convert_tokens_to_ids(start)
    )


@pytest.mark.parametrize(("ours", "theirs"), [("chatml", "llama3"), ("human", "chatml"), ("llama3", "chatml")])
def test_the_prompt_fuses_message_slots_and_nothing_else(ours, theirs):
    """And ends with a token of the receiver, though the sharer's closing template may be longer."""
    receiver, sharer = TOKENIZERS[ours], TOKENIZERS[theirs]
    talk = conversation("Hello there", "Fine", "And now?")
    sections = align_rendered(receiver, sharer, *(render(one, talk, RenderOptions()) for one in (receiver, sharer)))
    messages = [section.kind == "message" for section in sections for _ in section.slots]
    (prompt,) = PublishedAligner().align(receiver, [sharer], [talk], RenderOptions())
    (alignments,) = zip(*(chunk.alignments for chunk in prompt.chunks), strict=True)
    columns = [column for alignment in alignments for column in alignment.receiver.tolist()]
    assert columns == [i for i, message in enumerate(messages) if message]
    assert columns == [column for alignment in alignments for column in alignment.sharer.tolist()]
    assert prompt.receiver.ids[prompt.receiver.mask].tolist() == read(ours, talk)
    assert prompt.receiver.mask[0, -1]
    skipped = sum(count for reason, count in prompt.skipped.items() if reason != "padding")
    assert int(prompt.receiver.mask.sum()) == prompt.fused_tokens + skipped


def test_without_alignment_the_sharer_reads_the_receivers_ids():
    sharers = [TOKENIZERS["llama3"], TOKENIZERS["human"]]
    talks = [conversation("Hello"), conversation("Bye bye")]
    prompts = PublishedAligner(enabled=False).align(TOKENIZERS["chatml"], sharers, talks, RenderOptions())
    for prompt, talk in zip(prompts, talks, strict=True):
        ids = read("chatml", talk)
        assert [part.ids[0].tolist() for part in (prompt.receiver, *prompt.sharers)] == [ids] * 3
        assert [alignment.block for alignment in prompt.chunks[0].alignments] == [(0, 0, len(ids) - 1)] * 2
        assert prompt.skipped == {"last section, run on the fused cache": 1}


def test_impossible_prompts_are_refused():
    receiver, sharer, bare = TOKENIZERS["chatml"], TOKENIZERS["llama3"], tokenizer("chatml")
    bare.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(AlignmentError, match=r"2 sharers.*spans"):
        PublishedAligner().align(receiver, [sharer, sharer], [conversation("Hello")], RenderOptions())
    with pytest.raises(AlignmentError, match=r"last section.*spans"):
        PublishedAligner().align(bare, [bare], [conversation("Hello")], RenderOptions(False))
    with pytest.raises(AlignmentError, match="nothing is left to fuse"):
        PublishedAligner(enabled=False).align(bare, [bare], [conversation("a")], RenderOptions(False))


@pytest.mark.parametrize("options", [{}, {"strategy": "longest"}, {"enabled": False}], ids=str)
def test_a_batch_equals_its_singles(options):
    """Rows have sections of their own here, and pads in the middle of a prompt."""
    receiver = Receiver(build("qwen3", 1), tokenizer("chatml"))
    sharer = Sharer(build("llama", 2), tokenizer("chatml_sys"))
    fuser = {"fuser": "c2c", "fuser_options": {"hidden_dim": 16, "intermediate_dim": 16}}
    model = open_fusers(C2CModel.from_models(receiver, sharer, **fuser, aligner=PublishedAligner(**options)))
    prompts = ["Hello world!", conversation("What is the capital of France?", "Paris.", "Sure?"), "你好 🙂"]
    together = token_ids(model.generate(prompts, max_new_tokens=6))
    assert together == [token_ids(model.generate(prompt, max_new_tokens=6))[0] for prompt in prompts]
    assert token_ids(model.generate(prompts[::-1], max_new_tokens=6)) == together[::-1]
    assert together != token_ids(model.receiver.answer(prompts, max_new_tokens=6))


@pytest.mark.parametrize("aligner", [CharSpanAligner, PublishedAligner])
def test_documented_attributes_are_fields(aligner):
    documented = re.findall(r"^ {8}(\w+):", aligner.__doc__, re.MULTILINE)
    assert documented == [field.name for field in fields(aligner)]


def test_the_aligner_is_part_of_the_fuser():
    model = pair(aligner=PublishedAligner("longest"))
    assert model.fusers[0].config.alignment == {"name": "published", "strategy": "longest", "enabled": True}
    assert C2CModel(model.receiver, model.sharers, list(model.fusers)).aligner == PublishedAligner("longest")
