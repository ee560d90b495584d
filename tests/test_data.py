"""Rows: kinds, forms, layouts, sources, synthetic ones, and what is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from c2c.config import ConfigError
from c2c.data.config import LETTERS, DataSource
from c2c.data.formats import FORMS, KINDS, multiple_choice, normalise, vary_options
from c2c.data.prompts import choice_tokens
from c2c.data.sources import load_rows, questions
from c2c.data.synthetic import GENERATORS, WORDS
from c2c.training.examples import build_examples
from tiny import pair, tokenizer

QUESTION = {"id": 1, "question": "2 + 2?", "choices": ["3", "4"], "answer": 1}


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def one(folder, data, **source):
    write(folder, "rows.jsonl", [data])
    return load_rows([DataSource("rows.jsonl", **source)], folder, 0)[0][0]


def numbered(count, options=4):
    return [
        {"question": f"q{i}", "choices": [f"{i}{letter}" for letter in "abcd"[:options]], "answer": i % options}
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "data",
    [
        {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answerKey": "B"},
        {"question_stem": "q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        {"question": "q", "A": "x", "B": "y", "C": "z", "answer": "B", "explanation": ""},
        {"question": "q", "options": ["x", "y", "z"], "answer": 1},
        {"question": "q", "choices": ["x", "y", "z"], "answer": 1},
        {"question": "q", "choices": [{"text": "x"}, {"text": "y"}, {"text": "z"}], "answer": 1},
        {
            "question": {
                "stem": "q",
                "choices": [{"text": text, "label": label} for text, label in zip("xyz", "123", strict=True)],
            },
            "answerKey": "2",
        },
    ],
)
def test_layouts_of_well_known_data_sets(data):
    row = multiple_choice(normalise(data), DataSource())
    assert (row.choices, row.answer) == ((" A", " B", " C"), 1)
    assert "Question: q\nA. x\nB. y\nC. z" in row.messages[-1]["content"]


def test_worked_answers_are_split_from_their_result():
    data = normalise({"question": "q", "answer": "2 + 2 = 4\n#### 4"})
    assert (data["answer"], data["solution"]) == ("4", "2 + 2 = 4\n#### 4")
    assert normalise({"question": "q", "answer": "four"}) == {"question": "q", "answer": "four"}


@pytest.mark.parametrize(
    ("form", "prefix", "lead", "response"),
    [
        ("letter", "The answer is", "", " B"),
        ("published", "", "The correct answer is", "The correct answer is B"),
        ("sentence", "", "The correct answer is", "The correct answer is B. 4"),
    ],
)
def test_forms(form, prefix, lead, response):
    row = multiple_choice(QUESTION, DataSource(form=form))
    assert (row.answer_prefix, row.lead, row.response) == (prefix, lead, response)
    assert row.choices == (" A", " B")
    assert "B. 4" in row.messages[-1]["content"]
    many = FORMS[form].row("q", [str(i) for i in range(26)], 25)
    assert f" {LETTERS[25]}" in many.response


@pytest.mark.parametrize(("options", "counts"), [([6, 10], {6, 7, 8, 9, 10}), (2, {2}), (5, {5}), (8, {8})], ids=str)
def test_every_question_gets_the_number_of_options_given(options, counts):
    rows = numbered(400)
    varied = vary_options(rows, DataSource(options=options), seed=0)
    found = Counter(len(row["choices"]) for row in varied)
    assert set(found) == counts
    assert min(found.values()) > 50
    most = max(counts)
    assert {row["answer"] for row in varied if len(row["choices"]) == most} == set(range(most))
    for row, old in zip(varied, rows, strict=True):
        assert row["choices"][row["answer"]] == old["choices"][old["answer"]]
        assert len(set(row["choices"])) == len(row["choices"])


def test_a_share_of_the_questions_gets_other_options():
    rows = numbered(200)
    varied = vary_options(rows, DataSource(vary_options=0.5), seed=0)
    changed = [row for row, before in zip(varied, rows, strict=True) if row is not before]
    assert 70 < len(changed) < 130
    assert {len(row["choices"]) for row in changed} == set(range(2, 9))
    assert varied == vary_options(rows, DataSource(vary_options=0.5), seed=0)
    few = [{"question": "q", "choices": ["yes", "no"], "answer": 0}] * 5
    assert len(vary_options(few, DataSource(vary_options=1.0), seed=1)) == 5, "few different options do not hang"


@pytest.mark.parametrize("bad", [1, 27, [6, 4], [2, 3, 4], []])
def test_impossible_numbers_of_options_are_refused(bad):
    with pytest.raises(ConfigError, match="options is"):
        DataSource(options=bad)


def test_choices_that_no_single_token_distinguishes_are_dropped_and_counted():
    words = tokenizer("chatml")  # " A" is a token there, " B" and " C" share their first
    assert choice_tokens(words, "", [" A", " B"])[0] == 0
    with pytest.raises(ValueError, match="no single token"):
        choice_tokens(words, "", [" A", " B", " C"])
    row = multiple_choice(QUESTION | {"choices": ["3", "4", "5"]}, DataSource())
    examples, dropped = build_examples(pair(), [row], 512, 64)
    assert examples == []
    assert sum(dropped.values()) == 1


def test_the_letter_counts_as_much_as_all_other_tokens():
    model = pair(tokenizers=("chatml", "llama3"))
    for words in (model.receiver.tokenizer, model.sharers[0].tokenizer):
        words.add_tokens([" B", " C"])
    example = build_examples(model, [multiple_choice(QUESTION, DataSource(form="sentence"))], 512, 64)[0][0]
    assert example.weights[example.decisive] == 1
    assert sum(example.weights) == pytest.approx(2)
    assert example.response_ids[example.decisive] == example.choice_ids[1]


def test_open_kinds(tmp_path):
    solved = one(tmp_path, {"id": 1, "question": "q", "answer": "4", "solution": "2 + 2 = 4"}, kind="question")
    assert solved.response == "2 + 2 = 4"
    columns = {"instruction": "prompt", "output": "completion"}
    renamed = {"prompt": "do", "input": "this", "completion": "done"}
    done = one(tmp_path, renamed, kind="instruction", columns=columns)
    assert (done.messages[-1]["content"], done.response) == ("do\n\nthis", "done")
    read = one(tmp_path, {"context": "c", "question": "q", "answers": ["x", "y"]}, kind="context_question")
    assert (read.response, read.references) == ("x", ("x", "y"))
    assert "Passage: c" in read.messages[-1]["content"]


@pytest.mark.parametrize("keys", [("role", "content", "user", "assistant"), ("from", "value", "human", "gpt")])
def test_conversations_teach_their_last_turn_only(tmp_path, keys):
    role, content, user, assistant = keys
    turns = [(user, "hi"), (assistant, "hello"), (user, "again"), (assistant, "bye")]
    row = one(tmp_path, {"messages": [{role: who, content: text} for who, text in turns]}, kind="chat")
    assert [m["role"] for m in row.messages] == ["user", "assistant", "user"]
    model = pair()
    example = build_examples(model, [row], 512, 64)[0][0]
    words = model.receiver.tokenizer
    assert "hello" in words.decode(example.receiver_ids)
    assert "bye" not in words.decode(example.receiver_ids)
    assert words.decode(example.response_ids, skip_special_tokens=True) == "bye"
    assert sum(example.weights) == pytest.approx(1)


def test_all_subsets_of_a_data_set_and_rows_to_keep(tmp_path):
    pytest.importorskip("datasets")
    header = "---\nconfigs:\n"
    for name in ("law", "art"):
        rows = [{"id": i, "question": f"{name} {i}", "A": "x", "B": "y", "answer": "AB"[i % 2]} for i in range(3)]
        write(tmp_path, f"{name}.jsonl", [row | {"error_type": "ok" if row["id"] else "wrong"} for row in rows])
        header += f"- config_name: {name}\n  data_files: {name}.jsonl\n"
    (tmp_path / "README.md").write_text(header + "---\n")
    rows, _ = load_rows([DataSource(dataset=str(tmp_path), subset="*", keep={"error_type": "ok"})], tmp_path, 0)
    assert sorted((row.id, row.answer) for row in rows) == [("art/1", 1), ("art/2", 0), ("law/1", 1), ("law/2", 0)]
    with pytest.raises(ConfigError, match="could not read data set"):
        load_rows([DataSource(dataset=str(tmp_path / "nowhere"))], tmp_path, 0)


def test_sources_of_one_file_are_disjoint_and_excluded_questions_are_dropped_and_counted(tmp_path):
    write(tmp_path, "train.jsonl", [QUESTION | {"id": i, "question": f"What is {i}?"} for i in range(20)])
    write(tmp_path, "test.jsonl", [QUESTION | {"question": "what  is 3?"}])
    rows, dropped = load_rows([DataSource("train.jsonl")], tmp_path, 0, questions([tmp_path / "test.jsonl"]))
    assert (len(rows), sum(dropped.values())) == (19, 1)
    sources = [DataSource("train.jsonl", limit=5), DataSource("train.jsonl", form="sentence", skip=5, limit=5)]
    assert len({row.id for row in load_rows(sources, tmp_path, 0)[0]}) == 10


@pytest.mark.parametrize("kind", ["private_question", "context_question"])
def test_rows_with_an_empty_passage_are_dropped_and_counted_and_without_one_refused(kind, tmp_path):
    """HotpotQA has two such rows among five hundred."""
    rows = [{"question": f"Who signed {n}?", "answer": "Anna", "context": "Anna signed." * (n > 0)} for n in range(4)]
    write(tmp_path, "pages.jsonl", rows)
    kept, dropped = load_rows([DataSource("pages.jsonl", kind=kind)], tmp_path, 0)
    assert sorted(row.question for row in kept) == [row["question"] for row in rows[1:]]
    assert dropped == {"context is empty": 1}
    with pytest.raises(ConfigError, match="'context' is missing or empty"):
        one(tmp_path, {"question": "Who?", "answer": "Anna"}, kind=kind)


ASKED, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SAID = {"from": "human", "value": "q"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"answers": {"text": ["1924", "in 1924", "1924"], "answer_start": [27, 24, 27]}}, ("1924", "in 1924")),
        ({"answers": [{"text": "1924", "answer_start": 27}]}, ("1924",)),
        ({"answers": "1924"}, ("1924",)),
        ({"answer": 1924}, ("1924",)),
        ({"answer": ["1924", "in 1924"]}, ("1924", "in 1924")),
        ({"answer": {"value": "1924", "aliases": ["in 1924"], "normalized_value": "1924"}}, ("1924", "in 1924")),
        ({"answer": "1924", "answers": ["in 1924", ""]}, ("1924", "in 1924")),
    ],
)
def test_open_answers_in_the_layouts_of_squad_triviaqa_and_others(tmp_path, layout, expected):
    row = one(tmp_path, {"question": "When?", "context": "Built in 1924.", **layout}, kind="private_question")
    assert (row.references, row.response) == (expected, expected[0])


@pytest.mark.parametrize(
    "context",
    [
        {"title": ["House", "Boat"], "sentences": [["Built. ", "Red."], ["Lost."]]},
        [["House", ["Built. ", "Red."]], ["Boat", ["Lost."]]],
        ["House: Built. Red.", "Boat: Lost."],
    ],
)
def test_passages_in_parts_are_joined(tmp_path, context):
    data = {"question": {"text": "When?"}, "context": context, "answer": "1924"}
    row = one(tmp_path, data, kind="private_question")
    assert row.sharer_messages[0]["content"] == "House: Built. Red.\n\nBoat: Lost."
    assert row.question == "When?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"[]", "empty"),
        (b'{"question": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"question": "q", "answer": NaN}', "line 1.*'answer' is missing"),
    ],
)
def test_files_without_rows_or_values(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_rows([DataSource("a.jsonl", kind="question")], tmp_path, 0)


def test_columns_are_renamed_before_layouts_are_read(tmp_path):
    data = {"q": "2 + 2?", "opts": ["3", "4"], "key": "B"}
    row = one(tmp_path, data, columns={"question": "q", "choices": "opts", "answer": "key"})
    assert (row.answer, row.options) == (1, ("3", "4"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"columns": {"answer": "gold"}}, "columns.*gold"),
        ({"keep": {"subject": "law"}}, "'keep'"),
        ({"skip": 1}, "skip is 1"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": -3}, "limit is -3"),
        ({"skip": -1}, "skip is -1"),
        ({"kind": "question", "options": 4}, "multiple_choice"),
        ({"columns": "answer"}, "columns is 'answer'; expected keys and values"),
    ],
)
def test_sources_that_would_give_no_or_other_rows_are_refused(tmp_path, source, message):
    with pytest.raises(ConfigError, match=message):
        one(tmp_path, QUESTION, **source)


@pytest.mark.parametrize(
    "marked",
    [
        {"answers": {"text": [], "answer_start": []}},
        {"answers": []},
        {"is_impossible": True, "answers": ["a"]},
        {"answers": {"value": "<unk>", "aliases": []}},
    ],
)
def test_questions_without_an_answer_are_dropped_and_counted(tmp_path, marked):
    rows = [{"question": "Who?", "context": "c", "answer": "Anna"}, {"question": "Why?", "context": "c", **marked}]
    kept, dropped = load_rows([DataSource("a.jsonl", kind="private_question")], write(tmp_path, "a.jsonl", rows), 0)
    assert [row.question for row in kept] == ["Who?"]
    assert dropped == {"question without an answer": 1}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "value", "label", "title", "sentences", "a"]), inner, max_size=2)
    ),
    max_leaves=5,
)
columns = st.sampled_from(
    [
        "question",
        "answer",
        "answers",
        "context",
        "choices",
        "options",
        "A",
        "B",
        "messages",
        "instruction",
        "input",
        "output",
    ]
)


@pytest.mark.fuzz
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(columns, json_values, max_size=6), st.sampled_from(sorted(KINDS)))
def test_any_row_is_read_as_texts_or_is_an_error_that_names_it(tmp_path, data, kind):
    write(tmp_path, "any.jsonl", [data])
    try:
        rows, dropped = load_rows([DataSource("any.jsonl", kind=kind)], tmp_path, 0)
    except ConfigError as error:
        refused = str(error)
        assert "line 1" in refused
        return
    assert len(rows) + sum(dropped.values()) == 1
    for row in rows:
        assert row.response.strip()
        assert all(isinstance(text, str) for text in (row.question, *row.references))
        assert all(isinstance(turn["content"], str) for turn in row.messages)


@pytest.mark.parametrize(
    ("data", "source", "message"),
    [
        ({"id": "x", "question": "q", "choices": ["a"], "answer": 0}, {}, "line 1, row 'x' as multiple_choice: 'choi"),
        ({"id": "x", "question": "q", "choices": ["a", "b"], "answer": True}, {}, "'answer' is True"),
        ({"id": "x", "question": "q", "choices": ["a", "b"], "answer": 0}, {"form": "poem"}, "unknown form 'poem'"),
        ({"id": "x", "instruction": "do"}, {"kind": "instruction"}, "'output' is missing"),
        ({"id": "x", "instruction": "do", "input": ["a"], "output": "b"}, {"kind": "instruction"}, "'input' is"),
        ({"id": "x", "question": "q", "choices": [{"a": 1}, "b"], "answer": 0}, {}, "'choices' has"),
        (
            {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": 1},
            {},
            "line 1.*'answer' is 1, an index or one of the labels",
        ),
        (
            {"question": "q", "answer": "a", "context": {"title": ["t"], "sentences": []}},
            {"kind": "private_question"},
            "line 1.*'context' is",
        ),
        ({"id": "x", "messages": [{"role": "user", "content": "hi"}]}, {"kind": "chat"}, "end with a text"),
        ({"id": "x", "messages": ["hi", "hello"]}, {"kind": "chat"}, "a turn is 'hi'"),
        ({"id": "x", "conversations": [SAID, {"from": "bard", "value": "a"}]}, {"kind": "chat"}, "role 'bard'"),
        ({"id": "x", "conversations": [SAID, {"from": "gpt"}]}, {"kind": "chat"}, "content must be text"),
        ({"id": "x", "messages": [ASKED, {"role": "assistant", "content": " "}]}, {"kind": "chat"}, "end with a text"),
        ({"id": "x", "messages": [ASKED, CALLED]}, {"kind": "chat"}, "end with a text"),
        ({"id": "x", "messages": [ASKED, CALLED, {"role": "assistant", "content": "a"}]}, {"kind": "chat"}, "tools"),
        ({"id": "x", "messages": [ASKED, REPLY], "tools": [{}]}, {"kind": "chat"}, "tools"),
        ({"id": "x", "question": "q", "answers": {"spans": ["a"]}}, {"kind": "question"}, "line 1.*'answers' is"),
        ({"id": "x", "question": "q", "answer": True}, {"kind": "question"}, "'answer' is True"),
        ({"id": "x", "question": {"tokens": ["q"]}, "answer": "a"}, {"kind": "question"}, "'question' is"),
        ({"id": "x", "question": "q", "context": [1], "answer": "a"}, {"kind": "context_question"}, "'context' is"),
        ({"id": "x"}, {"kind": "songs"}, "unknown kind of rows 'songs'"),
    ],
)
def test_broken_rows_are_named(tmp_path, data, source, message):
    with pytest.raises(ConfigError, match=message):
        one(tmp_path, data, **source)


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        (b"{}\n[1]\n", {"path": "a.jsonl"}, "line 2: expected an object"),
        (b"{}\n{", {"path": "a.jsonl"}, "line 2: not JSON"),
        (b"\xff\xfe", {"path": "a.jsonl"}, "no text in UTF-8"),
        (b"", {"path": "nothing.jsonl"}, "Set data_dir"),
        (b"", {}, "either 'path' or 'dataset'"),
        (b"", {"synthetic": "relay"}, "how many rows"),
        (b"", {"synthetic": "poems", "limit": 1}, "expected one of relay, relay_test"),
    ],
)
def test_impossible_sources_are_named(tmp_path, content, source, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_rows([DataSource(**source, kind="private_question")], tmp_path, 0)


def synthetic(name, limit, seed=0):
    return load_rows([DataSource(synthetic=name, kind="private_question", limit=limit)], ".", seed)[0]


def secret(kind, row) -> str:
    """The part of an answer that only the sharer has read, or what it is about."""
    if kind == "halves":
        return row.response.partition(", ")[2]
    return {"skeleton": row.response.partition(">")[0], "facts": row.question + row.response}.get(kind, row.response)


@pytest.mark.parametrize("kind", GENERATORS)
def test_what_is_asked_in_the_test_split_is_never_trained(kind):
    rows, tests = synthetic(kind, 600), synthetic(f"{kind}_test", 150)
    assert not {secret(kind, row) for row in rows} & {secret(kind, row) for row in tests}
    assert synthetic(kind, 9) == synthetic(kind, 9) != synthetic(kind, 9, seed=1)


@pytest.mark.parametrize("kind", ["relay", "facts"])
def test_the_answer_stands_in_the_passage_alone(kind):
    for row in synthetic(kind, 200):
        assert row.response.lower() in row.sharer_messages[-1]["content"].lower()
        assert row.response not in row.messages[-1]["content"]


def test_facts_have_several_sentences_of_one_kind():
    """Otherwise the kind of the question would give the answer away, and no name need be read."""
    pages = list(islice(GENERATORS["facts"]("train", 0), 600))
    assert {len(page["context"].removesuffix(".").split(". ")) for page in pages} == {2, 3, 4, 5}
    assert len({" ".join(page["question"].split()[:3]) for page in pages}) > len(WORDS["facts"])
    numbers = [page for page in pages if page["answer"].isdigit() and len(page["answer"]) == 4]
    several = [page for page in numbers if sum(word.strip(".").isdigit() for word in page["context"].split()) > 1]
    assert len(several) > 0.7 * len(numbers) > 50


def test_halves_need_both_models():
    kinds = set()
    for row in synthetic("halves", 60):
        asked, passage = row.messages[-1]["content"], row.sharer_messages[-1]["content"]
        mine, theirs = row.response.split(", ")
        assert asked == f"{row.known} {row.question}"
        assert (mine in row.known, theirs in row.known) == (True, False)
        assert (mine in passage, theirs in passage) == (False, True)
        assert not re.search(r"\d", row.question)
        kinds.add(row.question.split(":")[0].split(" for ")[0])
    assert len(kinds) == 3


def test_a_skeleton_names_the_topic_before_its_element():
    """The sharer's entries of an element depend only on what precedes it."""
    for row in synthetic("skeleton", 80):
        opening, rest = row.response.split(">", 1)
        passage, asked = row.sharer_messages[-1]["content"], row.messages[-1]["content"]
        topic = re.search(r"for the (.+?), with this text", asked)[1]
        assert passage.count(f"<!-- {topic} --> {opening}></") == 1
        assert opening not in asked
        assert asked.endswith(rest.split("<")[0])
