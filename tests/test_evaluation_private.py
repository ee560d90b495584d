"""Evaluation of private context on tiny models, and scores of written answers."""

from __future__ import annotations

import json

import pytest
import torch

from c2c import C2CModel
from c2c.data.config import DataSource
from c2c.data.prompts import passage_with_question
from c2c.data.sources import load_rows
from c2c.evaluation import EvalConfig, evaluate
from c2c.evaluation.config import STAGES, EvaluationError
from c2c.evaluation.metrics import contains, exact, f1
from c2c.language_model import LanguageModel, Receiver
from c2c.private_context import documents
from c2c.prompting import with_passage
from tiny import open_fusers, pair_folders

PASSAGES = ["The fox sleeps in a red house by the sea.", "A dog and a cat went to the market.", "Rain fell for a week."]
COSTLY = ("receiver", "sharer", "reader", "summary_50", "matched", "draft", "draft_text")
SYSTEMS = (*COSTLY, "deranged", "zero", "draft_deranged")
GREEDY = {"max_new_tokens": 4, "do_sample": False}


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


def write(folder, count=7, **more):
    """Write rows whose passages come round again; ``more`` is added to each."""
    rows = [
        {"id": f"{i}", "context": PASSAGES[i % 3], "question": f"Who was number {i}?", "answers": ["fox", "a dog"]}
        for i in range(count)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("passages"))


def config(fuser, data, **changes) -> EvalConfig:
    source = DataSource("a.jsonl", kind=changes.pop("kind", "private_question"), draft=changes.pop("draft", 0))
    settings = {"systems": SYSTEMS, "mode": "answers", "max_new_tokens": 4, "batch_size": 3, "draft_tokens": 3}
    return EvalConfig(fuser, [source], data_dir=str(data), **(settings | changes))


def records(folder):
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()[1:]]


def test_every_system_answers_and_costs(fuser, data, tmp_path):
    result = evaluate(config(fuser, data, timed=2, output_dir=str(tmp_path)))
    assert (result["n"], result["unit"]) == (7, "percent f1")
    assert set(result["systems"]) == set(SYSTEMS)
    for name in SYSTEMS:
        system = result["systems"][name]
        assert 0 <= system["exact"] <= system["f1"] <= 100
        assert system["exact"] <= system["holds"] <= 100
    answers = [item for item in records(tmp_path) if "text" in item]
    assert len(answers) >= 7 * len(SYSTEMS)
    rows = map(json.loads, (data / "a.jsonl").read_text().splitlines())
    asked = {row["question"]: row.get("answer") or row["answers"] for row in rows}
    for item in answers:
        expected = asked[item["prompt"]]
        assert item["references"] == (expected if isinstance(expected, list) else [expected])
        assert item["answer"] == item["references"][0]
    timed = [item for item in records(tmp_path) if "seconds" in item]
    assert len(timed) == 2 * len(COSTLY)
    for item in timed:
        assert sum(item.get(stage, 0) for stage in STAGES) <= item["seconds"] + 1e-4
    draft, matched, summary = (result["systems"][name] for name in ("draft", "matched", "summary_50"))
    assert draft["seconds"] > draft["sharer_prefill"] + draft["sharer_decode"] > draft["sharer_decode"] > 0
    assert draft["tokens"] > 4, "the draft counts"
    assert draft["bytes"] > matched["bytes"] > summary["bytes"] > 0, "question and draft cross as well"
    assert "mended" not in result  # F1 is no right or wrong


def test_answers_are_those_of_the_public_path(fuser, tmp_path):
    data = write(tmp_path)
    evaluate(config(fuser, data, output_dir=str(tmp_path)))
    texts = {(item["id"], item["system"]): item["text"] for item in records(tmp_path)}
    model = C2CModel.from_pretrained(fuser)
    receiver, sharer = model.receiver, model.sharers[0]
    rows = load_rows([DataSource("a.jsonl", kind="private_question")], data, 0)[0]
    wrong = []
    for row in rows:
        passage = row.sharer_messages[-1]["content"]
        question = [{"role": "user", "content": f"Question: {row.question}"}]
        asked = passage_with_question(row)
        draft = sharer.read(asked, draft_tokens=3).to("bfloat16")  # as the store keeps it
        written = sharer.answer(asked, max_new_tokens=3, do_sample=False).text
        expected = {
            "receiver": receiver.answer(row.messages, **GREEDY),
            "sharer": sharer.answer(asked, **GREEDY),
            "reader": receiver.answer(with_passage(question, passage), **GREEDY),
            "matched": model.generate(row.messages, sharer_messages=row.sharer_messages, **GREEDY),
            "draft": model.generate(row.messages, sharer_messages=draft, **GREEDY),
            "draft_text": receiver.answer(with_passage(question, written), **GREEDY),
        }
        wrong += [(row.id, name) for name, result in expected.items() if result.text != texts[row.id, name]]
    assert len(wrong) <= 2, wrong  # stored prefills are bfloat16


def test_each_side_reads_its_own(fuser, tmp_path, monkeypatch):
    """The receiver alone reads what it knows, the sharer alone the passage, the ceiling both."""
    data, read = write(tmp_path, count=2, known="The receiver's half."), []
    encode = LanguageModel.encode

    def note(self, messages, options=None):
        read.extend("\n".join(turn["content"] for turn in one) for one in messages if isinstance(one, list))
        return encode(self, messages, options)

    monkeypatch.setattr(LanguageModel, "encode", note)
    for name, known, passage in (("receiver", True, False), ("sharer", False, True), ("reader", True, True)):
        evaluate(config(fuser, data, systems=(name,)))
        for text in read[-2:]:
            assert ("receiver's half" in text, any(one in text for one in PASSAGES)) == (known, passage)
            assert "Who was number" in text
    with pytest.raises(EvaluationError, match="known"):
        evaluate(config(fuser, data, systems=("draft_text",)))


def test_a_deranged_draft_is_another_items(fuser, data, monkeypatch):
    given = {}
    prefill = C2CModel.prefill

    def note(self, messages, *, sharer_messages=None, **kwargs):
        column = sharer_messages[0] if isinstance(sharer_messages, tuple) else sharer_messages
        given.setdefault(str(messages), []).append(
            [tuple(one.ids.tolist()) for (one,) in documents(column, len(column), False)]
        )
        return prefill(self, messages, sharer_messages=sharer_messages, **kwargs)

    monkeypatch.setattr(C2CModel, "prefill", note)
    evaluate(config(fuser, data, systems=("draft", "draft_deranged")))
    for own, others in given.values():
        assert sorted(own) == sorted(others)
        assert all(a != b for a, b in zip(own, others, strict=True))


@pytest.mark.parametrize(("systems", "texts"), [(("draft", "draft_deranged", "draft_text"), 7), (("summary_50",), 3)])
def test_a_text_is_generated_once_for_all_that_need_it(fuser, data, tmp_path, monkeypatch, systems, texts):
    decoded = []
    generate = LanguageModel.generate

    def count(self, tokens, *arguments, **kwargs):
        decoded.append(tokens.rows)
        return generate(self, tokens, *arguments, **kwargs)

    monkeypatch.setattr(LanguageModel, "generate", count)
    monkeypatch.setattr(Receiver, "generate", generate, raising=False)
    made = config(fuser, data, systems=systems, batch_size=4, store_dir=str(tmp_path / "store"))
    first = evaluate(made)
    assert sum(decoded) == texts
    assert evaluate(made)["systems"] == first["systems"]
    assert sum(decoded) == texts, "kept beside the prefills, for the next evaluation"


def test_losses_and_rows_without_a_passage_which_are_left_out(fuser, data, tmp_path):
    text = (write(tmp_path) / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text + '{"id": "8", "context": "", "question": "Who?", "answers": ["fox"]}\n')
    left = evaluate(config(fuser, tmp_path, mode="nll", systems=("receiver", "matched", "deranged", "zero")))
    assert (left["n"], left["dropped"]) == (7, {"a.jsonl: context is empty": 1})
    assert all(system["mean"] > 0 for system in left["systems"].values())
    assert len({system["mean"] for system in left["systems"].values()}) == 4


def test_answers_of_shared_context_are_scored_too(folders, data, tmp_path):
    model = open_fusers(C2CModel.from_models(*folders, fuser_options={"rank": 8}))
    model.save_pretrained(tmp_path)
    systems, dev = ("receiver", "sharer", "matched", "text", "router"), [DataSource("a.jsonl", kind="context_question")]
    made = config(str(tmp_path), data, kind="context_question", systems=systems, message_tokens=4, dev=dev, routed=1.0)
    result = evaluate(made)
    assert result["systems"]["router"]["f1"] == result["systems"]["sharer"]["f1"], (
        "routed by F1 where that is the score"
    )
    assert set(result["systems"]["text"]) >= {"f1", "exact", "ci95"}
    with pytest.raises(EvaluationError, match="shared context, which has no reader"):
        evaluate(config(str(tmp_path), data, systems=("matched", "reader")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ("matched", "text")}, "private context, which has no text"),
        ({"mode": "logits"}, "use 'answers'"),
        ({"kind": "context_question"}, "--kind private_question"),
        ({"draft": 5}, "system 'draft'"),
    ],
)
def test_what_private_context_does_not_have_is_refused(fuser, data, changes, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(config(fuser, data, **({"systems": ("matched",)} | changes)))


@pytest.mark.parametrize(
    ("text", "references", "overlap", "same", "contained"),
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
def test_scores_of_texts(text, references, overlap, same, contained):
    assert f1(text, references) == pytest.approx(overlap)
    assert exact(text, references) == same
    assert contains(text, references) == contained
