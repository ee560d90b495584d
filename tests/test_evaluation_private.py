"""Evaluation of private context on tiny models, and scores of written answers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

import c2c.training.drafts
from c2c import C2CModel
from c2c.data.config import DataSource
from c2c.data.formats import load_rows
from c2c.evaluation import EvalConfig, evaluate
from c2c.evaluation.config import EvaluationError
from c2c.evaluation.costs import STAGES
from c2c.evaluation.text_scores import exact, f1, holds
from c2c.language_model import Sharer
from c2c.systems.base import with_passage
from tiny import open_fusers, pair_folders

PASSAGES = ["The fox sleeps in a red house by the sea.", "A dog and a cat went to the market.", "Rain fell for a week."]
SYSTEMS = (
    "receiver",
    "sharer",
    "reader",
    "summary_50",
    "matched",
    "deranged",
    "zero",
    "draft",
    "draft_deranged",
    "draft_text",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return pair_folders(tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def fuser(folders, tmp_path_factory):
    model = C2CModel.from_models(*folders, fuser="memory", fuser_options={"rank": 8})
    torch.nn.init.normal_(model.fusers[0].weight, std=0.3, generator=torch.Generator().manual_seed(0))
    model.fusers[0].config.training = {"config": "random"}
    folder = tmp_path_factory.mktemp("fuser")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passages")
    rows = [
        {"id": f"{i}", "context": PASSAGES[i % 3], "question": f"Who was number {i}?", "answers": ["fox", "a dog"]}
        for i in range(7)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(fuser, data, **changes) -> EvalConfig:
    source = DataSource("a.jsonl", kind=changes.pop("kind", "private_question"))
    settings = {"systems": SYSTEMS, "mode": "answers", "max_new_tokens": 4, "batch_size": 3, "draft_tokens": 3}
    return EvalConfig(fuser, [source], data_dir=str(data), **(settings | changes))


def test_every_system_answers_and_costs(fuser, data, tmp_path):
    result = evaluate(config(fuser, data, timed=2, output_dir=str(tmp_path)))
    assert (result["n"], result["unit"]) == (7, "percent f1")
    assert set(result["systems"]) == set(SYSTEMS)
    costly = ("receiver", "sharer", "reader", "summary_50", "matched", "draft", "draft_text")
    for name in costly:
        system = result["systems"][name]
        assert 0 <= system["exact"] <= system["f1"] <= 100
        assert system["exact"] <= system["holds"] <= 100
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    timed = [item for item in items if "seconds" in item]
    assert len(timed) == 2 * len(costly)
    for item in timed:  # to five decimals; means have five digits, too few for this where seconds are many
        assert sum(item.get(stage, 0) for stage in STAGES) <= item["seconds"] + 1e-4
    drafted, matched = result["systems"]["draft"], result["systems"]["matched"]
    assert drafted["sharer_decode"] > 0
    assert drafted["seconds"] > drafted["sharer_prefill"] + drafted["sharer_decode"] > 0
    assert drafted["tokens"] > 4, "what the sharer wrote counts"
    assert drafted["bytes"] > matched["bytes"], "the question and the draft cross as well"
    assert result["systems"]["matched"]["bytes"] > result["systems"]["summary_50"]["bytes"] > 0
    assert "mended" not in result  # F1 is no right or wrong


def test_answers_are_those_of_the_public_path(fuser, data, tmp_path):
    evaluate(config(fuser, data, output_dir=str(tmp_path)))
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()[1:]]
    texts = {(item["id"], item["system"]): item["text"] for item in items}
    model = C2CModel.from_pretrained(fuser)
    rows = load_rows([DataSource("a.jsonl", kind="private_question")], data, 0)[0]
    agree = drafts_agree = 0
    for row in rows:
        passage = row.sharer_messages
        matched = model.generate(row.messages, sharer_messages=passage, max_new_tokens=4, do_sample=False).text
        assert model.receiver.answer(row.messages, max_new_tokens=4, do_sample=False).text == texts[row.id, "receiver"]
        agree += matched == texts[row.id, "matched"]
        asked = with_passage(
            [{"role": "user", "content": f"Question: {row.question}"}],
            row.sharer_messages[-1]["content"],
        )
        drafted = model.sharers[0].read(asked, draft_tokens=3).to("bfloat16")  # as the store keeps it
        draft = model.generate(row.messages, sharer_messages=drafted, max_new_tokens=4, do_sample=False).text
        drafts_agree += draft == texts[row.id, "draft"]
        written = model.sharers[0].answer(asked, max_new_tokens=3, do_sample=False).text
        told = with_passage([{"role": "user", "content": f"Question: {row.question}"}], written)
        told_answer = model.receiver.answer(told, max_new_tokens=4, do_sample=False).text
        assert told_answer == texts[row.id, "draft_text"]
    assert min(agree, drafts_agree) >= len(rows) - 1  # batches round differently, and this one holds bfloat16


def test_a_deranged_draft_is_another_items(fuser, data, monkeypatch):
    given = {}
    original = C2CModel.generate

    def note(self, messages, **kwargs: Any):
        given.setdefault(str(messages), []).append([tuple(one.ids.tolist()) for one in kwargs["sharer_messages"]])
        return original(self, messages, **kwargs)

    monkeypatch.setattr(C2CModel, "generate", note)
    evaluate(config(fuser, data, systems=("draft", "draft_deranged")))
    for own, others in given.values():
        assert sorted(own) == sorted(others)
        assert all(a != b for a, b in zip(own, others, strict=True))


def test_a_draft_is_written_once_for_the_systems_that_need_it(fuser, data, monkeypatch):
    written = []
    original = c2c.training.drafts.write_drafts

    def count(store, sharer, prompts, longest):
        written.extend(tuple(prompt) for prompt in prompts)
        return original(store, sharer, prompts, longest)

    monkeypatch.setattr("c2c.training.drafts.write_drafts", count)
    evaluate(config(fuser, data, systems=("draft", "draft_deranged")))
    assert len(written) == len(set(written)) == 7


def test_rows_with_drafts_are_for_training(fuser, data):
    made = config(fuser, data, systems=("matched",))
    source = DataSource("a.jsonl", kind="private_question", draft=5)
    with pytest.raises(EvaluationError, match="ask for the system 'draft'"):
        evaluate(dataclasses.replace(made, data=[source]))


def test_a_passage_is_summed_up_once_for_all_its_questions(fuser, data, tmp_path, monkeypatch):
    asked = []
    generate = Sharer.generate

    def count(self, tokens, *arguments: Any, **kwargs: Any):
        asked.append(tokens.rows)
        return generate(self, tokens, *arguments, **kwargs)

    monkeypatch.setattr(Sharer, "generate", count)
    made = config(fuser, data, systems=("summary_50",), batch_size=4, store_dir=str(tmp_path / "store"))
    first = evaluate(made)
    assert sum(asked) == len(PASSAGES)  # of seven questions
    assert evaluate(made)["systems"] == first["systems"]
    assert sum(asked) == len(PASSAGES), "kept beside the prefills, for the next evaluation"


def test_loss_of_the_reference(fuser, data):
    result = evaluate(config(fuser, data, mode="nll", systems=("receiver", "matched", "deranged", "zero")))
    assert all(system["mean"] > 0 for system in result["systems"].values())


def test_rows_without_a_passage_are_left_out_and_counted_in_the_result(fuser, data, tmp_path):
    text = (data / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text + '{"id": "8", "context": "", "question": "Who?", "answers": ["fox"]}\n')
    whole, left = (evaluate(config(fuser, folder, systems=("receiver", "matched"))) for folder in (data, tmp_path))
    assert left["n"] == whole["n"] == 7
    assert left["dropped"] == {"a.jsonl: context is empty": 1}


def test_answers_of_shared_context_are_scored_too(folders, data, tmp_path):
    model = open_fusers(C2CModel.from_models(*folders, fuser_options={"rank": 8}))
    model.save_pretrained(tmp_path)
    systems = ("receiver", "sharer", "matched", "deranged", "text")
    result = evaluate(config(str(tmp_path), data, kind="context_question", systems=systems, message_tokens=4))
    assert set(result["systems"]["text"]) >= {"f1", "exact", "ci95"}


def test_systems_of_the_other_kind_of_context_are_refused(fuser, folders, data, tmp_path):
    with pytest.raises(EvaluationError, match="fuser of private context, which has no text"):
        evaluate(config(fuser, data, systems=("matched", "text")))
    with pytest.raises(EvaluationError, match="answers in words"):
        evaluate(config(fuser, data, mode="logits", systems=("matched", "sharer")))
    with pytest.raises(EvaluationError, match="pass --kind private_question --mode answers"):
        evaluate(config(fuser, data, kind="context_question", systems=("matched", "sharer")))
    C2CModel.from_models(*folders).save_pretrained(tmp_path)
    with pytest.raises(EvaluationError, match="fuser of shared context, which has no reader"):
        evaluate(config(str(tmp_path), data, systems=("matched", "reader")))


@pytest.mark.parametrize(
    ("text", "references", "overlap", "same", "held"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1.0, 1.0, 1.0),
        ("in the Eiffel Tower", ["Eiffel Tower"], 0.8, 0.0, 1.0),
        ("a tower by Eiffel", ["Eiffel Tower"], 0.8, 0.0, 0.0),
        ("Parisian", ["Paris"], 0.0, 0.0, 0.0),
        ("Paris", ["London", "paris"], 1.0, 1.0, 1.0),
        ("", ["Paris"], 0.0, 0.0, 0.0),
        ("It is 7, so 1,200 in all.", ["1200"], 0.0, 1.0, 1.0),
        ("1200 or 7", ["1200"], 0.5, 0.0, 1.0),
        ("12000", ["1200"], 0.0, 0.0, 0.0),
    ],
)
def test_scores_of_texts(text, references, overlap, same, held):
    assert f1(text, references) == pytest.approx(overlap)
    assert exact(text, references) == same
    assert holds(text, references) == held
