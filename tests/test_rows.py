"""Training rows: kinds, forms, filters, and what is refused."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from c2c.config import ConfigError
from c2c.data.config import DataSource
from c2c.data.formats import LETTERS, load_rows, multiple_choice, normalise, questions, vary_options
from c2c.training.examples import build_examples, choice_tokens
from tiny import pair, tokenizer

QUESTION = {"id": 1, "question": "2 + 2?", "choices": ["3", "4"], "answer": 1}


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def one(folder, data, **source):
    write(folder, "rows.jsonl", [data])
    return load_rows([DataSource("rows.jsonl", **source)], folder, 0)[0][0]


@pytest.mark.parametrize(
    "data",
    [
        {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answerKey": "B"},
        {"question_stem": "q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        {"question": "q", "A": "x", "B": "y", "C": "z", "answer": "B", "explanation": ""},
        {"question": "q", "options": ["x", "y", "z"], "answer": 1},
        {"question": "q", "choices": ["x", "y", "z"], "answer": 1},
    ],
)
def test_layouts_of_well_known_data_sets(data):
    row = multiple_choice(normalise(data), DataSource())
    assert (row.choices, row.answer) == ((" A", " B", " C"), 1)
    assert "Question: q\nA. x\nB. y\nC. z" in row.messages[-1]["content"]


def test_worked_answers_are_told_from_their_result():
    data = normalise({"question": "q", "answer": "2 + 2 = 4\n#### 4"})
    assert (data["answer"], data["solution"]) == ("4", "2 + 2 = 4\n#### 4")
    assert normalise({"question": "q", "answer": "four"}) == {"question": "q", "answer": "four"}


def test_all_subsets_of_a_data_set_and_rows_to_keep(tmp_path):
    pytest.importorskip("datasets")
    header = "---\nconfigs:\n"
    for name in ("law", "art"):
        rows = [{"id": i, "question": f"{name} {i}", "A": "x", "B": "y", "answer": "AB"[i % 2]} for i in range(3)]
        rows = [row | {"error_type": "ok" if row["id"] else "wrong"} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        header += f"- config_name: {name}\n  data_files: {name}.jsonl\n"
    (tmp_path / "README.md").write_text(header + "---\n")
    source = DataSource(dataset=str(tmp_path), subset="*", keep={"error_type": "ok"})
    rows, _ = load_rows([source], tmp_path, 0)
    assert sorted(row.id for row in rows) == ["art/1", "art/2", "law/1", "law/2"]
    assert {row.answer for row in rows} == {0, 1}


def test_a_range_of_options():
    """Between the bounds, each number and each letter as answer about equally often; bad bounds are refused."""
    rows = [{"question": f"q{i}", "choices": [f"{i}a", f"{i}b", f"{i}c", f"{i}d"], "answer": i % 4} for i in range(400)]
    varied = vary_options(rows, DataSource(options=[6, 10]), seed=0)
    counts = Counter(len(row["choices"]) for row in varied)
    assert set(counts) == {6, 7, 8, 9, 10}
    assert min(counts.values()) > 50
    answers = Counter(row["answer"] for row in varied if len(row["choices"]) == 10)
    assert set(answers) == set(range(10))
    for row, old in zip(varied, rows, strict=True):
        assert row["choices"][row["answer"]] == old["choices"][old["answer"]]
    for bad in (1, 27, [6, 4], [2, 3, 4], []):
        with pytest.raises(ConfigError, match="options is"):
            DataSource(options=bad)


def test_letter_form():
    row = multiple_choice(QUESTION, DataSource())
    assert (row.answer_prefix, row.lead, row.response) == ("The answer is", "", " B")
    assert row.choices == (" A", " B")
    assert "B. 4" in row.messages[-1]["content"]


@pytest.mark.parametrize(
    ("form", "response"), [("published", "The correct answer is B"), ("sentence", "The correct answer is B. 4")]
)
def test_forms_that_answer_in_a_sentence(form, response):
    row = multiple_choice(QUESTION, DataSource(form=form))
    assert row.response == response
    assert row.lead + row.choices[row.answer] == "The correct answer is B"
    assert row.answer_prefix == ""


def test_open_kinds(tmp_path):
    solved = one(tmp_path, {"id": 1, "question": "q", "answer": "4", "solution": "2 + 2 = 4"}, kind="question")
    assert solved.response == "2 + 2 = 4"
    told = one(tmp_path, {"instruction": "do", "input": "this", "output": "done"}, kind="instruction")
    assert (told.messages[-1]["content"], told.response) == ("do\n\nthis", "done")
    read = one(tmp_path, {"context": "c", "question": "q", "answers": ["x", "y"]}, kind="context_question")
    assert read.response == "x"
    assert "Passage: c" in read.messages[-1]["content"]


@pytest.mark.parametrize(
    "turns",
    [
        [("role", "content"), ("user", "hi"), ("assistant", "hello"), ("user", "again"), ("assistant", "hello again")],
        [("from", "value"), ("human", "hi"), ("gpt", "hello"), ("human", "again"), ("gpt", "hello again")],
    ],
)
def test_conversations_teach_their_last_turn(tmp_path, turns):
    keys, *said = turns
    data = {"messages": [dict(zip(keys, turn, strict=True)) for turn in said]}
    row = one(tmp_path, data, kind="chat")
    assert [m["role"] for m in row.messages] == ["user", "assistant", "user"]
    assert row.response == "hello again"


def test_loss_is_on_the_response_only_in_a_conversation_of_several_turns(tmp_path):
    model = pair()
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "again"), ("assistant", "bye")]
    data = {"messages": [{"role": role, "content": content} for role, content in turns]}
    row = one(tmp_path, data, kind="chat")
    example = build_examples(model, [row], 512, 64)[0][0]
    words = model.receiver.tokenizer
    assert words.decode(example.receiver_ids).count("bye") == 0
    assert "hello" in words.decode(example.receiver_ids)
    assert words.decode(example.response_ids, skip_special_tokens=True) == "bye"
    assert sum(example.weights) == pytest.approx(1)


def test_the_letter_counts_as_much_as_all_other_tokens(tmp_path):
    model = pair(tokenizers=("chatml", "llama3"))
    for words in (model.receiver.tokenizer, model.sharers[0].tokenizer):
        words.add_tokens([" B", " C"])
    example = build_examples(model, [multiple_choice(QUESTION, DataSource(form="sentence"))], 512, 64)[0][0]
    assert example.weights[example.decisive] == 1
    assert sum(example.weights) == pytest.approx(2)
    assert example.response_ids[example.decisive] == example.choice_ids[1]


def test_choices_that_no_single_token_tells_apart_are_dropped_and_counted():
    words = tokenizer("chatml")  # " A" is a token there, " B" and " C" share their first
    assert choice_tokens(words, "", [" A", " B"])[0] == 0
    with pytest.raises(ValueError, match="no single token"):
        choice_tokens(words, "", [" A", " B", " C"])
    row = multiple_choice(QUESTION | {"choices": ["3", "4", "5"]}, DataSource())
    examples, dropped = build_examples(pair(), [row], 512, 64)
    assert examples == []
    assert sum(dropped.values()) == 1


def test_varied_options_keep_the_right_one():
    rows = [{"question": f"q{i}", "choices": [f"{i}a", f"{i}b", f"{i}c", f"{i}d"], "answer": i % 4} for i in range(200)]
    varied = vary_options(rows, DataSource(vary_options=0.5), seed=0)
    for before, after in zip(rows, varied, strict=True):
        assert before["choices"][before["answer"]] == after["choices"][after["answer"]]
        assert len(set(after["choices"])) == len(after["choices"])
    changed = [row for row, before in zip(varied, rows, strict=True) if row is not before]
    assert 70 < len(changed) < 130
    assert {len(row["choices"]) for row in changed} == set(range(2, 9))
    assert varied == vary_options(rows, DataSource(vary_options=0.5), seed=0)


def test_every_question_gets_the_number_of_options_asked_for():
    rows = [{"question": f"q{i}", "choices": [f"{i}a", f"{i}b", f"{i}c"], "answer": i % 3} for i in range(20)]
    for wanted in (2, 5, 8):
        varied = vary_options(rows, DataSource(options=wanted), seed=0)
        assert {len(row["choices"]) for row in varied} == {wanted}
        assert all(row["choices"][row["answer"]] == f"{i}{'abc'[i % 3]}" for i, row in enumerate(varied))


def test_few_different_options_do_not_hang():
    rows = [{"question": "q", "choices": ["yes", "no"], "answer": 0}]
    assert len(vary_options(rows * 5, DataSource(vary_options=1.0), seed=1)) == 5


def test_questions_of_excluded_files_are_dropped_and_counted(tmp_path):
    write(tmp_path, "train.jsonl", [QUESTION | {"question": f"What is {i}?"} for i in range(10)])
    write(tmp_path, "test.jsonl", [QUESTION | {"question": "what  is 3?"}])
    rows, dropped = load_rows([DataSource("train.jsonl")], tmp_path, 0, questions([tmp_path / "test.jsonl"]))
    assert len(rows) == 9
    assert sum(dropped.values()) == 1


def test_skip_makes_sources_of_one_file_disjoint(tmp_path):
    write(tmp_path, "train.jsonl", [QUESTION | {"id": i} for i in range(20)])
    sources = [DataSource("train.jsonl", limit=5), DataSource("train.jsonl", form="sentence", skip=5, limit=5)]
    rows, _ = load_rows(sources, tmp_path, 0)
    assert len({row.id for row in rows}) == 10


def test_columns_are_renamed(tmp_path):
    row = one(
        tmp_path,
        {"prompt": "do", "completion": "done"},
        kind="instruction",
        columns={"instruction": "prompt", "output": "completion"},
    )
    assert (row.messages[-1]["content"], row.response) == ("do", "done")


def test_rows_come_from_a_data_set(tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path, "train.jsonl", [{"instruction": f"say {i}", "output": str(i)} for i in range(4)])
    rows, _ = load_rows([DataSource(dataset=str(tmp_path), kind="instruction", limit=3)], tmp_path, 0)
    assert len(rows) == 3
    assert all(row.response in row.messages[-1]["content"] for row in rows)
    with pytest.raises(ConfigError, match="could not read data set"):
        load_rows([DataSource(dataset=str(tmp_path / "nowhere"), kind="instruction")], tmp_path, 0)


@pytest.mark.parametrize(
    ("data", "source", "message"),
    [
        ({"id": "x", "question": "q", "choices": ["a"], "answer": 0}, {}, "row 'x' as multiple_choice: 'choices'"),
        ({"id": "x", "question": "q", "choices": ["a", "b"], "answer": True}, {}, "'answer' is True"),
        ({"id": "x", "question": "q", "choices": ["a", "b"], "answer": 0}, {"form": "poem"}, "unknown form 'poem'"),
        ({"id": "x", "instruction": "do"}, {"kind": "instruction"}, "'output' is missing"),
        ({"id": "x", "messages": [{"role": "user", "content": "hi"}]}, {"kind": "chat"}, "end with the assistant's"),
        ({"id": "x"}, {"kind": "songs"}, "unknown kind of rows 'songs'"),
    ],
)
def test_broken_rows_are_named(tmp_path, data, source, message):
    with pytest.raises(ConfigError, match=message):
        one(tmp_path, data, **source)


def test_a_source_is_a_file_or_a_data_set(tmp_path):
    with pytest.raises(ConfigError, match="either 'path' or 'dataset'"):
        load_rows([DataSource()], tmp_path, 0)


def test_there_are_letters_for_many_options():
    row = multiple_choice({"question": "q", "choices": [str(i) for i in range(26)], "answer": 25}, DataSource())
    assert row.response == f" {LETTERS[25]}"


@pytest.mark.parametrize("kind", ["private_question", "context_question"])
def test_rows_with_an_empty_passage_are_dropped_and_counted_and_without_one_refused(kind, tmp_path):
    """HotpotQA has two such rows among five hundred."""
    rows = [
        {"question": f"Who signed page {n}?", "answer": "Anna", "context": "Anna signed." * (n > 0)} for n in range(4)
    ]
    write(tmp_path, "pages.jsonl", rows)
    kept, dropped = load_rows([DataSource("pages.jsonl", kind=kind)], tmp_path, 0)
    assert sorted(row.question for row in kept) == [row["question"] for row in rows[1:]]
    assert dropped == {"context is empty": 1}
    write(tmp_path, "pages.jsonl", [{"question": "Who?", "answer": "Anna"}])
    with pytest.raises(ConfigError, match="'context' is missing or empty"):
        load_rows([DataSource("pages.jsonl", kind=kind)], tmp_path, 0)
