"""Alignment by character spans, on any text and any two of five tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from c2c.alignment import SpanAligner
from c2c.errors import AlignmentError
from c2c.prompting import RenderOptions, encode, render, text_tokens
from tiny import tokenizer

TOKENIZERS = {name: tokenizer(name) for name in ("chatml", "chatml_sys", "llama3", "metaspace", "human")}
names = st.sampled_from(list(TOKENIZERS))
slow = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))

# words that templates use too, scripts, combined characters, whitespace of all kinds
WORDS = [
    *("user", "assistant", "system", "Human:", "###", "<", "|", "im_start", "\n", "\n\n", "  ", "\t", "a", "Hello"),
    *("naïve", "e\u0301", "你好", "🙂", "👩‍👩‍👧", "عربى", "x=1;", "1,080", "\u00a0", "�"),
]
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=10).map("".join)
spaced = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join)
anything = st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"]), min_size=1, max_size=24)
texts = st.one_of(words, spaced, anything)
visible = texts.filter(lambda text: text.strip())
messages = st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), texts)
talks = st.lists(messages, min_size=1, max_size=5).filter(lambda talk: any(m["content"].strip() for m in talk))


def read(name, talk, options=None):
    return encode(TOKENIZERS[name], render(TOKENIZERS[name], talk, options or RenderOptions()))


def say(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def covering(encoded, character):
    """The last token whose text contains a character: several may hold a part of it."""
    found = [i for i, (start, end) in enumerate(encoded.offsets) if start <= character < end]
    return found[-1] if found else None


@slow
@given(names, talks)
@example("llama3", say("user", "user", " user"))
@example("human", say("### Assistant:", "### Human: a", "a"))
def test_spans_are_where_the_messages_are(name, talk):
    """In order, apart from each other, and with the text of the message: never in the template's own words."""
    trims = name == "llama3"
    talk = [m for m in talk if m["content"].strip() or not trims]
    rendered = render(TOKENIZERS[name], talk, RenderOptions())
    cursor = 0
    for message, found in zip(talk, rendered.spans, strict=True):
        expected = message["content"].strip() if trims else message["content"]
        (start, end), offset = found
        assert start >= cursor
        assert rendered.text[start:end] == expected
        assert message["content"][offset : offset + len(expected)] == expected
        cursor = end
    # what is left is the template, as it is around other words
    other = render(TOKENIZERS[name], [{**m, "content": "@"} for m in talk], RenderOptions())
    assert cut(rendered) == cut(other)


@pytest.mark.parametrize("blank", ["  ", "\n\n", "\n"])
def test_a_message_trimmed_to_nothing_is_not_found_elsewhere(blank):
    """Its whitespace also occurs in the template and in other messages."""
    talk = say(blank, f"a{blank}b", f"c{blank}d")
    rendered = render(TOKENIZERS["llama3"], talk, RenderOptions())
    shown = [found and rendered.text[slice(*found[0])] for found in rendered.spans]
    assert shown == [None, talk[1]["content"], talk[2]["content"]]


def cut(rendered):
    pieces, cursor = [], 0
    for (start, end), _ in rendered.spans:
        pieces.append(rendered.text[cursor:start])
        cursor = end
    return [*pieces, rendered.text[cursor:]]


@slow
@given(names, names, talks)
def test_each_token_takes_the_one_that_covers_its_last_character(receiver, sharer, talk):
    talk = [m for m in talk if m["content"].strip()]
    ours, theirs = read(receiver, talk), read(sharer, talk)
    targets, owner = SpanAligner().pairs(ours, theirs), text_tokens(ours)
    checked = 0
    for token, message in enumerate(owner):
        if message is None:
            continue
        (start, end), trimmed = ours.rendered.spans[message]
        (other_start, other_end), other_trimmed = theirs.rendered.spans[message]
        character = min(ours.offsets[token][1], end) - 1 - start + trimmed
        place = min(max(character - other_trimmed + other_start, other_start), other_end - 1)
        if other_start <= character - other_trimmed + other_start < other_end:
            assert theirs.rendered.text[place] == talk[message]["content"][character]
        expected = covering(theirs, place)
        if expected is not None:
            assert targets[token] == expected
            checked += 1
    assert checked


@slow
@given(names, names, talks)
def test_targets_never_go_back(receiver, sharer, talk):
    talk = [m for m in talk if m["content"].strip()]
    ours, theirs = read(receiver, talk), read(sharer, talk)
    targets, owner = SpanAligner().pairs(ours, theirs), text_tokens(ours)
    assert len(targets) == len(ours.ids)
    for message in range(len(talk)):
        inside = [t for t, m in zip(targets, owner, strict=True) if m == message]
        assert inside
        assert inside == sorted(inside)
    known = [t for t in targets if t is not None]
    assert all(0 <= t < len(theirs.ids) for t in known)
    assert known == sorted(known)


@slow
@given(names, talks)
def test_the_same_model_twice_is_the_identity(name, talk):
    talk = [m for m in talk if m["content"].strip()]
    ours = read(name, talk)
    targets, owner = SpanAligner().pairs(ours, ours), text_tokens(ours)
    for token, message in enumerate(owner):
        if message is None:
            continue
        end = min(ours.offsets[token][1], ours.rendered.spans[message][0][1])
        alone = [i for i, (a, b) in enumerate(ours.offsets) if a < end <= b]
        # a character of several tokens is complete at the last of them
        assert targets[token] == max(alone)
        if alone == [token]:
            assert targets[token] == token


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_the_identity_holds_for_every_token_of_plain_words(name):
    ours = read(name, say("What is the capital of France?", "Paris, of course.", "user user assistant"))
    targets, owner = SpanAligner().pairs(ours, ours), text_tokens(ours)
    inside = [i for i, message in enumerate(owner) if message is not None]
    assert len(inside) > 10
    assert [targets[i] for i in inside] == inside


@slow
@given(names, names, visible)
def test_template_before_is_left_and_after_takes_the_end(receiver, sharer, text):
    ours, theirs = read(receiver, say(text)), read(sharer, say(text))
    targets, owner = SpanAligner().pairs(ours, theirs), text_tokens(ours)
    first, last = owner.index(0), max(i for i, m in enumerate(owner) if m == 0)
    assert targets[:first] == [None] * first
    closing = len(owner) - last - 1
    assert closing
    assert targets[last + 1 :] == [len(theirs.ids) - 1] * closing
    bare = SpanAligner(fuse_template=False).pairs(ours, theirs)
    assert bare == [t if m is not None else None for t, m in zip(targets, owner, strict=True)]


@slow
@given(names, names, st.lists(talks, min_size=1, max_size=3))
def test_a_batch_is_its_rows_and_the_last_token_is_never_fused(receiver, sharer, batch):
    batch = [[m for m in talk if m["content"].strip()] for talk in batch]
    (prompt,) = SpanAligner().align(TOKENIZERS[receiver], [TOKENIZERS[sharer]], batch, RenderOptions())
    (chunk,) = prompt.chunks
    (alignment,) = chunk.alignments
    width, other_width = prompt.receiver.length, prompt.sharers[0].length
    assert chunk.stop == width - 1
    assert int(alignment.receiver.max()) < width - 1
    found = list(zip(alignment.rows.tolist(), alignment.receiver.tolist(), alignment.sharer.tolist(), strict=True))
    expected = []
    for row, talk in enumerate(batch):
        ours, theirs = read(receiver, talk), read(sharer, talk)
        assert prompt.receiver.ids[row][prompt.receiver.mask[row]].tolist() == ours.ids
        assert prompt.sharers[0].ids[row][prompt.sharers[0].mask[row]].tolist() == theirs.ids
        shift, other_shift = width - len(ours.ids), other_width - len(theirs.ids)
        expected += [
            (row, t + shift, s + other_shift)
            for t, s in enumerate(SpanAligner().pairs(ours, theirs)[:-1])
            if s is not None
        ]
    assert found == expected
    assert prompt.fused_tokens == len(found)
    assert int(prompt.receiver.mask.sum()) == len(found) + sum(prompt.skipped.values())


def test_template_between_turns_takes_the_end_of_its_stretch():
    ours, theirs = (read(name, say("Hello", "Fine", "Bye")) for name in ("chatml", "llama3"))
    targets, owner, other = SpanAligner().pairs(ours, theirs), text_tokens(ours), text_tokens(theirs)
    seen = 0
    for message in (0, 1):
        place = max(i for i, m in enumerate(owner) if m == message) + 1
        end = min(i for i, m in enumerate(other) if m == message + 1) - 1
        while owner[place] is None:
            assert targets[place] == end
            place, seen = place + 1, seen + 1
    assert seen >= 4


@pytest.mark.parametrize(("receiver", "sharer"), [("chatml", "llama3"), ("llama3", "chatml")])
def test_trimmed_contents_are_aligned_by_the_characters_that_are_left(receiver, sharer):
    text = "  \n leading and trailing \n\n"
    ours, theirs = read(receiver, say(text)), read(sharer, say(text))
    targets, owner = SpanAligner().pairs(ours, theirs), text_tokens(ours)
    (start, end), trimmed = (ours if receiver == "llama3" else theirs).rendered.spans[0]
    assert (end - start, trimmed) == (len(text.strip()), text.index("l"))
    for token in (i for i, m in enumerate(owner) if m == 0):
        character = ours.offsets[token][1] - 1
        if ours.rendered.text[character].isalpha():
            begin, stop = theirs.offsets[targets[token]]
            back = theirs.rendered.spans[0]
            assert begin <= character - ours.rendered.spans[0][0][0] + ours.rendered.spans[0][1] - back[1] + back[0][0]
            assert stop > begin
    if receiver == "chatml":  # what the sharer has not read takes the nearest that it has
        inside = [targets[i] for i, m in enumerate(owner) if m == 0]
        shown = [i for i, m in enumerate(text_tokens(theirs)) if m == 0]
        assert inside[0] == shown[0]
        assert inside[-1] == shown[-1]


@pytest.mark.parametrize("receiver", ["chatml", "human"])
def test_a_system_message_that_one_template_drops(receiver):
    talk = [{"role": "system", "content": "Be kind to users."}, *say("Hello user", "Hi", "Bye")]
    sharer = "human" if receiver == "chatml" else "chatml"
    ours, theirs = read(receiver, talk), read(sharer, talk)
    targets, owner = SpanAligner().pairs(ours, theirs), text_tokens(ours)
    dropped = (ours if receiver == "human" else theirs).rendered
    assert dropped.spans[0] is None
    assert "kind" not in dropped.text
    assert all(target is None for target, message in zip(targets, owner, strict=True) if message == 0)
    for message in (1, 2, 3):
        pieces = [t for t, m in zip(targets, owner, strict=True) if m == message]
        assert {text_tokens(theirs)[t] for t in pieces} == {message}


def test_a_prompt_without_common_text_is_refused():
    deaf, half = tokenizer("llama3"), tokenizer("llama3")
    deaf.chat_template = "{{ 'Hi' }}"
    half.chat_template = "{% if messages[0]['content'] == 'b' %}Hi{% else %}{{ messages[0]['content'] }}{% endif %}"
    with pytest.raises(AlignmentError, match=r"no token of prompt 1.*Receiver reads.*sharer reads 'Hi'"):
        SpanAligner().align(TOKENIZERS["chatml"], [half], [say("aa"), say("b")], RenderOptions())
    with pytest.raises(AlignmentError, match="prompt 0"):
        SpanAligner().align(TOKENIZERS["chatml"], [deaf], [say("a")], RenderOptions())


def test_an_answer_prefix_is_template_after_the_message():
    options = RenderOptions(answer_prefix="The answer is")
    ours, theirs = read("chatml", say("Hello"), options), read("llama3", say("Hello"), options)
    assert ours.rendered.text.endswith("assistant\n<think>\n\n</think>\n\nThe answer is")
    assert theirs.rendered.text.endswith("The answer is")
    assert SpanAligner().pairs(ours, theirs)[-1] == len(theirs.ids) - 1


def test_thinking_is_passed_to_templates_that_know_it():
    closed, opened = (read("chatml", say("Hello"), RenderOptions(enable_thinking=on)) for on in (False, True))
    assert "<think>" in closed.rendered.text
    assert "<think>" not in opened.rendered.text


def test_base_models_without_a_template_get_a_plain_one():
    base = tokenizer("human")
    base.chat_template = None
    rendered = render(base, say("Hello", "Hi", "Bye"), RenderOptions())
    assert rendered.text == "User: Hello\n\nAssistant: Hi\n\nUser: Bye\n\nAssistant:"
    assert [rendered.text[start:end] for (start, end), _ in rendered.spans] == ["Hello", "Hi", "Bye"]


def test_a_cue_is_read_by_the_sharer_alone():
    """The closing template takes the sharer's position at the end of the cue; a prompt's own answer prefix wins."""
    receiver, sharer = TOKENIZERS["chatml"], TOKENIZERS["llama3"]
    cued = SpanAligner(cue="The answer is")
    plain, with_cue = (
        aligner.align(receiver, [sharer], [say("Hello")], RenderOptions())[0] for aligner in (SpanAligner(), cued)
    )
    assert with_cue.receiver.ids.tolist() == plain.receiver.ids.tolist()
    expected = read("llama3", say("Hello"), RenderOptions(answer_prefix="The answer is")).ids
    assert with_cue.sharers[0].ids[0].tolist() == expected
    assert int(with_cue.chunks[0].alignments[0].sharer[-1]) == len(expected) - 1
    assert with_cue.chunks[0].alignments[0].sharer[0] == plain.chunks[0].alignments[0].sharer[0]
    own = RenderOptions(answer_prefix="Answer:")
    assert cued.align(receiver, [sharer], [say("Hello")], own)[0].sharers[0].ids.tolist() == (
        SpanAligner().align(receiver, [sharer], [say("Hello")], own)[0].sharers[0].ids.tolist()
    )
    assert SpanAligner(**{k: v for k, v in cued.to_dict().items() if k != "name"}) == cued
    assert "cue" not in SpanAligner().to_dict()
