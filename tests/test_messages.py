"""Messages as clients, frameworks and chat exports have them: read rightly, or refused; nothing is lost on the way."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from c2c import C2CModel
from c2c.errors import C2CError, PromptError
from c2c.language_model import Receiver
from c2c.messages import conversations
from c2c.prompting import RenderOptions, render
from c2c.sharer import Sharer
from tiny import build, pair, tokenizer

ASK = "Weather in Paris?"
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Ask.", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": ASK}
TURNS = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "18"}]
WITH_TOOLS = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %}{% endfor %}<assistant>"
)


def one(messages):
    ((conversation,), single) = conversations(messages)
    assert single
    return conversation


def with_tools(name="chatml"):
    made = tokenizer(name)
    made.chat_template = WITH_TOOLS
    return made


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]}], "ab"),
        ([{"role": "assistant", "content": None, "refusal": "No."}], "No."),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}], "No."),
        (({"role": "user", "content": "a"},), "a"),
    ],
)
def test_texts_are_found_where_the_api_has_them(given, expected):
    assert one(given)[0]["content"] == expected


def test_other_fields_are_kept_under_their_names():
    given = {"role": "developer", "content": "Be brief.", "name": "boss", "reasoning": "Why?", "weight": 1}
    assert one([given, USER])[0] == {
        "role": "system",
        "content": "Be brief.",
        "name": "boss",
        "reasoning_content": "Why?",
    }
    assert one(TURNS)[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {"city": "Paris"}}}],
    }


@pytest.mark.parametrize(
    "given",
    [
        [],
        b"bytes",
        "",
        "a\ud800b",
        [""],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "text", "text": None}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": ["a text"]}],
        [{"role": " ", "content": "a"}],
        [{"role": "assistant", "content": "", "function_call": {"name": "f"}}],
        [USER, {"role": "assistant", "content": None, "tool_calls": "f"}],
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\udfff"}}}]}],
    ],
)
def test_what_is_no_message_is_refused(given):
    with pytest.raises(PromptError):
        conversations(given)


def test_tools_and_calls_are_rendered_where_the_template_has_them():
    text = render(with_tools(), one(TURNS), RenderOptions(tools=(TOOL,))).text
    assert text == f'[weather]<user>{ASK}<assistant>(weather {{"city": "Paris"}})<tool>18<assistant>'


@pytest.mark.parametrize(("turns", "tools"), [(TURNS, ()), ([USER], (TOOL,))])
def test_a_template_without_tools_refuses_them(turns, tools):
    with pytest.raises(PromptError, match="weather"):
        render(tokenizer("chatml"), one(turns), RenderOptions(tools=tools))
    with pytest.raises(PromptError, match="chat template"):
        render(with_tools(), one(turns), RenderOptions(tools=tools, chat_template=False))


def test_a_template_that_leaves_a_message_out_is_an_error():
    made = tokenizer("chatml")
    made.chat_template = "{% for m in messages if m.role == 'user' %}<{{ m.content }}>{% endfor %}"
    with pytest.raises(PromptError, match=r"leaves out messages \[1\].*critic"):
        render(made, one([USER, {"role": "critic", "content": "Bad."}]), RenderOptions())


def test_a_call_reaches_both_models():
    receiver, sharer = Receiver(build("llama", 1), with_tools()), Sharer(build("qwen2", 2), with_tools("llama3"))
    model = C2CModel.from_models(receiver, sharer)
    prompts = model.align([one(TURNS)], RenderOptions(tools=(TOOL,)))
    sides = ((model.receiver, prompts[0].receiver), (model.sharers[0], prompts[0].sharers[0]))
    assert all('(weather {"city": "Paris"})' in side.tokenizer.decode(tokens.ids[0]) for side, tokens in sides)
    other = [{**TURNS[1], "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]}]
    answers = [model.generate([USER, *turns, TURNS[2]], max_new_tokens=4) for turns in ([TURNS[1]], other)]
    assert answers[0].ids.tolist() != answers[1].ids.tolist()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    ["role", "content", "name", "tool_calls", "tool_call_id", "refusal", "reasoning", "function_call"]
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "developer"])
likely = st.fixed_dictionaries({"role": roles, "content": st.text(st.characters(), max_size=12) | json_values})
anything = st.dictionaries(fields, json_values, max_size=5)


@pytest.mark.fuzz
@settings(max_examples=300, deadline=None)
@given(st.lists(likely | anything, max_size=4) | json_values)
def test_whatever_comes_is_read_or_refused(messages):
    """Nothing else is raised, reading twice changes nothing, and every text is in the prompt."""
    try:
        batch, _ = conversations(messages)
    except C2CError:
        return
    assert conversations(batch)[0] == batch
    for conversation in batch:
        json.dumps(conversation)
        try:
            text = render(with_tools(), conversation, RenderOptions()).text
        except C2CError:
            continue
        assert all(message["content"] in text for message in conversation)


USERS_ONLY = "{% for m in messages if m.role != 'system' %}<{{ m.content }}>{% endfor %}<answer>"
MERGED = (
    "{% for m in messages if m.role == 'user' %}<{{ messages[0].content if loop.first }}\n{{ m.content }}>{% endfor %}"
)
IN_FRENCH = [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": ASK}]


@pytest.mark.parametrize("deaf", ["receiver", "sharer"])
def test_a_system_message_that_a_template_drops_is_in_the_report(deaf):
    model = pair()
    {"receiver": model.receiver, "sharer": model.sharers[0]}[deaf].tokenizer.chat_template = USERS_ONLY
    with pytest.warns(UserWarning, match="system message"):
        report = model.generate(IN_FRENCH, max_new_tokens=2).report
    assert [note for note in report.notes if "system message" in note and "does not read it" in note]


@pytest.mark.parametrize("template", [None, MERGED])
def test_a_system_message_that_a_template_renders_is_nothing_to_remark(template, recwarn):
    model = pair()
    if template:
        model.receiver.tokenizer.chat_template = template
    assert not model.generate(IN_FRENCH, max_new_tokens=2).report.notes
    model.receiver.tokenizer.chat_template = USERS_ONLY
    assert not model.generate(IN_FRENCH[1:], max_new_tokens=2).report.notes
    assert not [one for one in recwarn if "system message" in str(one.message)]
