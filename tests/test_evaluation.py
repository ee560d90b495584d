"""Evaluation on tiny models: systems, numbers, resuming, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from c2c import C2CModel
from c2c.cli.app import app
from c2c.evaluation import EvalConfig, evaluate
from c2c.evaluation.answers import read_letter
from c2c.evaluation.config import EvaluationError
from c2c.evaluation.numbers import mcnemar, summarise
from c2c.prompting import RenderOptions
from c2c.training.config import ConfigError, DataSource
from c2c.training.rows import load_rows
from tiny import open_fusers, pair_folders


@pytest.fixture(scope="module")
def fuser(tmp_path_factory):
    """A fuser with random weights between two tiny models."""
    receiver, sharer = pair_folders(tmp_path_factory.mktemp)
    model = open_fusers(C2CModel.from_models(receiver, sharer, fuser_options={"rank": 8}))
    model.fusers[0].config.training = {"config": "random"}
    folder = tmp_path_factory.mktemp("fuser")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    words = ["fox", "dog", "sun", "sea", "sky"]
    rows = [
        {"id": str(i), "question": f"Which is number {i}?", "choices": words[: 2 + i % 4], "answer": i % 2}
        for i in range(11)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    opens = [{"id": str(i), "question": f"Say {i}", "answer": f"it is {i}"} for i in range(5)]
    (folder / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in opens))
    return folder


def config(fuser, data, *files, **changes) -> EvalConfig:
    sources = [DataSource(name, **changes.pop("source", {})) for name in files or ("a.jsonl",)]
    return EvalConfig(fuser, sources, data_dir=str(data), batch_size=changes.pop("batch_size", 4), **changes)


def test_every_system_answers_every_item(fuser, data):
    result = evaluate(config(fuser, data))
    assert result["n"] == 11
    assert set(result["systems"]) == {"receiver", "sharer", "matched", "deranged", "zero"}
    matched, other = result["systems"]["matched"]["accuracy"], result["systems"]["deranged"]["accuracy"]
    assert result["P"] == pytest.approx(matched - other, abs=1e-3)
    assert result["P_ci95"][0] <= result["P"] <= result["P_ci95"][1]


def test_answers_are_those_of_the_public_path(fuser, data, tmp_path):
    """What is evaluated from stored caches is what ``prepare`` and ``answer`` give a user."""
    evaluate(config(fuser, data, output_dir=str(tmp_path)))
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()[1:]]
    model = C2CModel.from_pretrained(fuser)
    rows = {row.id: row for row in load_rows([DataSource("a.jsonl")], data, 0)[0]}
    agree = {"receiver": 0, "sharer": 0, "matched": 0}
    for item in items:
        row = rows[item["id"]]
        options = RenderOptions(answer_prefix=row.answer_prefix)
        fused = model.prepare(row.messages, options=options)
        logits = {"matched": model.receiver.next_logits(fused.tokens, fused.cache)}
        for name, side in (("receiver", model.receiver), ("sharer", model.sharers[0])):
            tokens = side.encode(row.messages, options)
            logits[name] = side.next_logits(tokens, side.prefill(tokens, tokens.length - 1))
        for name, scores in logits.items():
            tokenizer = (model.sharers[0] if name == "sharer" else model.receiver).tokenizer
            ids = [tokenizer.encode(choice, add_special_tokens=False)[0] for choice in row.choices]
            agree[name] += int(scores[0, ids].argmax()) == item["chosen"][name]
    assert all(count >= len(items) - 1 for count in agree.values()), agree  # the store keeps bfloat16


@pytest.mark.parametrize("form", ["published", "sentence"])
@pytest.mark.parametrize("mode", ["logits", "generate"])
def test_forms_and_modes(fuser, data, form, mode):
    result = evaluate(config(fuser, data, source={"form": form}, mode=mode, max_new_tokens=3, limit=4))
    assert result["n"] == 4


def test_nll_of_open_answers(fuser, data):
    result = evaluate(
        config(
            fuser,
            data,
            "open.jsonl",
            source={"kind": "question"},
            mode="nll",
            systems=("receiver", "matched", "deranged"),
        )
    )
    assert result["unit"] == "nats per token"
    assert all(system["mean"] > 0 for system in result["systems"].values())


def test_an_untrained_fuser_is_the_receiver(tmp_path, data):
    receiver, sharer = pair_folders(lambda name: (tmp_path / name).mkdir() or tmp_path / name)
    C2CModel.from_models(receiver, sharer).save_pretrained(tmp_path / "fuser")
    result = evaluate(config(str(tmp_path / "fuser"), data))
    assert result["G"] == result["P"] == 0
    assert result["mended"] == result["spoiled"] == 0


def test_several_files_are_pooled_and_told_apart(fuser, data):
    result = evaluate(config(fuser, data, "a.jsonl", "b.jsonl", systems=("receiver", "matched")))
    assert result["n"] == 14
    assert {name: part["n"] for name, part in result["sources"].items()} == {"a.jsonl": 11, "b.jsonl": 3}


def test_a_killed_run_resumes_to_the_same_numbers(fuser, data, tmp_path):
    whole = evaluate(config(fuser, data, "a.jsonl", "b.jsonl", output_dir=str(tmp_path / "whole")))

    class Killed(Exception):
        pass

    def kill(stage, done, total):
        if done >= 8:
            raise Killed

    part = config(fuser, data, "a.jsonl", "b.jsonl", output_dir=str(tmp_path / "part"))
    with pytest.raises(Killed):
        evaluate(part, kill)
    journal = tmp_path / "part" / "items.jsonl"
    journal.write_text(journal.read_text()[:-20])  # the last line was cut
    seen = []
    resumed = evaluate(part, lambda stage, done, total: seen.append((stage, done)))
    assert seen[0] == ("a.jsonl", 8)  # the cut batch was done again, the first one was not
    assert resumed["systems"] == whole["systems"]
    assert (tmp_path / "part" / "items.jsonl").read_text().splitlines()[1:] == (
        tmp_path / "whole" / "items.jsonl"
    ).read_text().splitlines()[1:]


def test_several_sharers_are_refused_before_anything_is_written(tmp_path, data):
    receiver, sharer = pair_folders(lambda name: (tmp_path / name).mkdir() or tmp_path / name)
    C2CModel.from_models(receiver, [sharer, sharer]).save_pretrained(tmp_path / "fusers")
    with pytest.raises(EvaluationError, match="has 2 sharers"):
        evaluate(config(str(tmp_path / "fusers"), data, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_another_evaluation_is_not_continued(fuser, data, tmp_path):
    first = config(fuser, data, output_dir=str(tmp_path))
    evaluate(first)
    with pytest.raises(EvaluationError, match="another evaluation"):
        evaluate(replace(first, seed=1))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "q", "choices": ["a", "b"], "answer": 2},
            "'answer' is 2; expected the index of a choice, 0 to 1",
        ),
        ({"question": "q", "choices": ["a", "b"], "answer": "B"}, "'answer' is 'B'"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "'choices' is"),
        ({"question": "q", "answer": 0}, "'choices' is None"),
        ({"choices": ["a", "b"], "answer": 0}, "'question' is missing"),
    ],
)
def test_broken_items_are_named(fuser, tmp_path, row, message):
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "seven"} | row))
    with pytest.raises(ConfigError, match="seven") as error:
        evaluate(config(fuser, tmp_path, "x.jsonl", output_dir=str(tmp_path / "out")))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_impossible_requests_are_refused(fuser, data):
    with pytest.raises(EvaluationError, match="unknown systems"):
        config(fuser, data, systems=("receivr",))
    with pytest.raises(EvaluationError, match="unknown mode"):
        config(fuser, data, mode="guess")
    with pytest.raises(EvaluationError, match="does not share"):
        config(fuser, data, mode="nll")
    with pytest.raises(ConfigError, match="no such data file"):
        evaluate(config(fuser, data, "nothing.jsonl"))
    with pytest.raises(EvaluationError, match="multiple-choice"):
        evaluate(config(fuser, data, "open.jsonl", source={"kind": "question"}))


def test_command_ends_with_one_json_object(fuser, data):
    run = CliRunner().invoke(app, ["eval", "--fuser", fuser, "--data", str(data / "a.jsonl"), "--limit", "5", "--json"])
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout.strip().splitlines()[-1])
    assert result["n"] == 5
    assert {"n", "systems", "G", "P", "P_ci95"} <= set(result)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("The correct answer is C", 4, 2),
        ("The correct answer is: D. a lamp", 4, 3),
        ("Answer: E", 5, 4),
        ("Answer: E", 4, None),
        ("B", 4, 1),
        ("b.", 4, 1),
        ("It is a dog", 4, None),
        ("A lamp would help", 4, None),
        ("I think (B) since it is light.", 4, 1),
        ("the answer is not known\nanswer: C", 4, 2),
        ("", 4, None),
    ],
)
def test_letters_are_read_from_text(text, options, expected):
    assert read_letter(text, options) == expected


def test_numbers():
    result = summarise({"receiver": [0, 0, 1, 1], "matched": [1, 1, 1, 0], "sharer": [1, 1, 1, 1]}, seed=0)
    assert result["G"] == 25
    assert result["mended"] == 50
    assert result["spoiled"] == 25
    assert result["gap_recovered"] == 50
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)
    assert mcnemar(5, 5) == 1
    assert 0 < mcnemar(900, 700) < 1e-5


def test_interval_covers_a_known_mean():
    values = torch.rand(400, generator=torch.Generator().manual_seed(0)).lt(0.3).float().tolist()
    low, high = summarise({"matched": values}, seed=0)["systems"]["matched"]["ci95"]
    assert low < 30 < high
    assert high - low < 12
