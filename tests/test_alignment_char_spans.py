"""Alignment by character spans, on any text and any two of five tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from c2c.alignment import CharSpanAligner
from c2c.alignment.base import merge
from c2c.errors import AlignmentError, PromptError
from c2c.prompting import RenderOptions, encode, render, text_tokens
from tiny import tokenizer

TOKENIZERS = {name: tokenizer(name) for name in ("chatml", "chatml_sys", "llama3", "metaspace", "human")}
names = st.sampled_from(list(TOKENIZERS))
thorough = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))

# words that templates use too, scripts, combined characters, whitespace of all kinds
WORDS = [
    *("user", "assistant", "system", "Human:", "###", "<", "|", "im_start", "\n", "\n\n", "  ", "\t", "a", "Hello"),
    *("naïve", "e\u0301", "你好", "🙂", "👩‍👩‍👧", "عربى", "x=1;", "1,080", "\u00a0", "�"),
]
texts = st.one_of(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=10).map("".join),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join),
    st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"]), min_size=1, max_size=24),
)
visible = texts.filter(lambda text: text.strip())
roles = st.sampled_from(["user", "assistant"])
conversations = st.lists(
    st.builds(lambda role, text: {"role": role, "content": text}, roles, visible), min_size=1, max_size=5
)


def read(name, conversation, options=None):
    return encode(TOKENIZERS[name], render(TOKENIZERS[name], conversation, options or RenderOptions()))


def say(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def aligned(receiver, sharer, conversation, aligner=None):
    """Both prompts, the sharer token of each receiver token, and the message that each receiver token belongs to."""
    ours, theirs = read(receiver, conversation), read(sharer, conversation)
    return ours, theirs, (aligner or CharSpanAligner()).pairs(ours, theirs), text_tokens(ours)


def last_covering(encoded, character):
    """The last token whose text contains a character: several may hold a part of it."""
    return max((i for i, (start, end) in enumerate(encoded.offsets) if start <= character < end), default=None)


def cut_out(rendered):
    """The template around the messages."""
    pieces, cursor = [], 0
    for (start, end), _ in rendered.spans:
        pieces.append(rendered.text[cursor:start])
        cursor = end
    return [*pieces, rendered.text[cursor:]]


@thorough
@given(names, conversations)
@example("llama3", say("user", "user", " user"))
@example("chatml", say("  ", "a"))
@example("human", say("### Assistant:", "### Human: a", "a"))
def test_spans_are_where_the_messages_are(name, conversation):
    """In order, apart from each other, and with the text of the message: never in the template's own words."""
    rendered = render(TOKENIZERS[name], conversation, RenderOptions())
    cursor = 0
    for message, ((start, end), offset) in zip(conversation, rendered.spans, strict=True):
        expected = message["content"].strip() if name == "llama3" else message["content"]
        assert start >= cursor
        assert rendered.text[start:end] == expected
        assert message["content"][offset : offset + len(expected)] == expected
        cursor = end
    # what is left is the template, as it is around other words
    other = render(TOKENIZERS[name], [{**m, "content": "@"} for m in conversation], RenderOptions())
    assert cut_out(rendered) == cut_out(other)


@pytest.mark.parametrize("blank", ["  ", "\n\n", "\n"])
def test_a_message_trimmed_to_nothing_is_not_found_elsewhere(blank):
    """Its whitespace also occurs in the template and in other messages."""
    conversation = say(blank, f"a{blank}b", f"c{blank}d")
    rendered = render(TOKENIZERS["llama3"], conversation, RenderOptions())
    shown = [found and rendered.text[slice(*found[0])] for found in rendered.spans]
    assert shown == [None, conversation[1]["content"], conversation[2]["content"]]


def test_base_models_without_a_template_get_a_plain_one():
    base = tokenizer("human")
    base.chat_template = None
    rendered = render(base, say("Hello", "Hi", "Bye"), RenderOptions())
    assert rendered.text == "User: Hello\n\nAssistant: Hi\n\nUser: Bye\n\nAssistant:"
    assert [rendered.text[start:end] for (start, end), _ in rendered.spans] == ["Hello", "Hi", "Bye"]


@pytest.mark.parametrize("thinking", [False, True])
def test_thinking_is_passed_to_templates(thinking):
    text = read("chatml", say("Hello"), RenderOptions(enable_thinking=thinking)).rendered.text
    assert ("<think>" in text) != thinking  # an empty thought closes the thinking


@thorough
@given(names, names, conversations)
@example("chatml", "llama3", say("  \n leading and trailing \n\n"))
@example("llama3", "chatml", say("  \n leading and trailing \n\n"))
@example("chatml", "chatml", say("What is the capital of France?", "Paris, of course.", "user user assistant"))
def test_each_token_takes_the_one_that_covers_its_last_character(receiver, sharer, conversation):
    ours, theirs, targets, owner = aligned(receiver, sharer, conversation)
    checked = 0
    for token, message in enumerate(owner):
        if message is None:
            continue
        (start, end), trimmed = ours.rendered.spans[message]
        (other_start, other_end), other_trimmed = theirs.rendered.spans[message]
        character = min(ours.offsets[token][1], end) - 1 - start + trimmed
        same = character - other_trimmed + other_start
        # text that the sharer's template trims away takes the nearest character that is left
        place = min(max(same, other_start), other_end - 1)
        if place == same:
            assert theirs.rendered.text[place] == conversation[message]["content"][character]
        expected = last_covering(theirs, place)
        if expected is not None:
            assert targets[token] == expected
            checked += 1
    assert checked


@thorough
@given(names, names, conversations)
def test_targets_never_go_back(receiver, sharer, conversation):
    _, theirs, targets, owner = aligned(receiver, sharer, conversation)
    assert len(targets) == len(owner)
    assert {message for target, message in zip(targets, owner, strict=True) if target is not None} >= set(
        range(len(conversation))
    )
    found = [target for target in targets if target is not None]
    assert all(0 <= target < len(theirs.ids) for target in found)
    assert found == sorted(found)


@thorough
@given(names, names, visible)
def test_template_before_is_left_and_after_takes_the_end(receiver, sharer, text):
    _, theirs, targets, owner = aligned(receiver, sharer, say(text))
    first, last = owner.index(0), max(i for i, m in enumerate(owner) if m == 0)
    closing = len(owner) - last - 1
    assert closing
    assert targets[:first] == [None] * first
    assert targets[last + 1 :] == [len(theirs.ids) - 1] * closing
    _, _, bare, _ = aligned(receiver, sharer, say(text), CharSpanAligner(fuse_template=False))
    assert bare == [t if m is not None else None for t, m in zip(targets, owner, strict=True)]


def test_template_between_turns_takes_the_end_of_its_stretch():
    _, theirs, targets, owner = aligned("chatml", "llama3", say("Hello", "Fine", "Bye"))
    for message in (0, 1):
        begin = max(i for i, m in enumerate(owner) if m == message) + 1
        end = owner.index(message + 1)
        assert end - begin >= 2
        assert targets[begin:end] == [text_tokens(theirs).index(message + 1) - 1] * (end - begin)


@pytest.mark.parametrize(("receiver", "sharer"), [("chatml", "human"), ("human", "chatml")])
def test_a_system_message_that_one_template_drops(receiver, sharer):
    conversation = [{"role": "system", "content": "Be kind to users."}, *say("Hello user", "Hi", "Bye")]
    ours, theirs, targets, owner = aligned(receiver, sharer, conversation)
    dropped = (ours if receiver == "human" else theirs).rendered
    assert dropped.spans[0] is None
    assert "kind" not in dropped.text
    assert all(target is None for target, message in zip(targets, owner, strict=True) if message == 0)
    for message in (1, 2, 3):
        pieces = [t for t, m in zip(targets, owner, strict=True) if m == message]
        assert {text_tokens(theirs)[t] for t in pieces} == {message}


@thorough
@given(names, names, st.lists(conversations, min_size=1, max_size=3))
def test_a_batch_is_its_rows_and_the_last_token_is_never_fused(receiver, sharer, batch):
    prompts = CharSpanAligner().align(TOKENIZERS[receiver], [TOKENIZERS[sharer]], batch, RenderOptions())
    (prompt,) = merge(prompts)
    (chunk,) = prompt.chunks
    (alignment,) = chunk.alignments
    width, other_width = prompt.receiver.length, prompt.sharers[0].length
    assert chunk.stop == width - 1 > int(alignment.receiver.max())
    expected = []
    for row, conversation in enumerate(batch):
        ours, theirs, targets, _ = aligned(receiver, sharer, conversation)
        assert prompt.receiver.ids[row][prompt.receiver.mask[row]].tolist() == ours.ids
        assert prompt.sharers[0].ids[row][prompt.sharers[0].mask[row]].tolist() == theirs.ids
        shift, other_shift = width - len(ours.ids), other_width - len(theirs.ids)
        expected += [(row, t + shift, s + other_shift) for t, s in enumerate(targets[:-1]) if s is not None]
    assert alignment.pairs() == expected
    assert prompt.fused_tokens == len(expected)
    assert int(prompt.receiver.mask.sum()) == len(expected) + sum(sum(one.skipped.values()) for one in prompts)


def test_a_prompt_without_common_text_is_refused():
    empty, half = tokenizer("llama3"), tokenizer("llama3")
    empty.chat_template = "{{ 'Hi' }}"
    half.chat_template = "{% if messages[0]['content'] == 'b' %}Hi{% else %}{{ messages[0]['content'] }}{% endif %}"
    with pytest.raises(AlignmentError, match=r"no token of prompt 1.*Receiver reads.*sharer 'Hi'"):
        CharSpanAligner().align(TOKENIZERS["chatml"], [half], [say("aa"), say("b")], RenderOptions())
    with pytest.raises(PromptError, match=r"leaves out messages \[0\]"):
        CharSpanAligner().align(TOKENIZERS["chatml"], [empty], [say("a")], RenderOptions())


def test_a_cue_is_read_by_the_sharer_alone():
    """The closing template takes the sharer's position at the end of the cue; a prompt's own answer prefix wins."""
    cued = CharSpanAligner(cue="The answer is")

    def align(aligner, **options):
        receiver, sharer = TOKENIZERS["chatml"], TOKENIZERS["llama3"]
        (prompt,) = aligner.align(receiver, [sharer], [say("Hello")], RenderOptions(**options))
        return prompt.receiver.ids.tolist(), prompt.sharers[0].ids[0].tolist(), prompt.chunks[0].alignments[0].sharer

    plain_ids, _, plain = align(CharSpanAligner())
    ids, sharer_ids, targets = align(cued)
    assert ids == plain_ids
    assert sharer_ids == read("llama3", say("Hello"), RenderOptions(answer_prefix="The answer is")).ids
    assert (targets[0], targets[-1]) == (plain[0], len(sharer_ids) - 1)
    assert align(cued, answer_prefix="Answer:")[1] == align(CharSpanAligner(), answer_prefix="Answer:")[1]
    assert CharSpanAligner(**{k: v for k, v in cued.to_dict().items() if k != "name"}) == cued
    assert "cue" not in CharSpanAligner().to_dict()
