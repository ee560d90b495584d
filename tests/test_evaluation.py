"""Evaluation on tiny models: systems, numbers, resuming, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from c2c import C2CModel
from c2c.cli.app import app
from c2c.config import ConfigError
from c2c.data.config import DataSource
from c2c.data.formats import letter_form, load_rows
from c2c.evaluation import EvalConfig, derived, evaluate, load_eval_config
from c2c.evaluation.answers import read_letter
from c2c.evaluation.config import EvaluationError
from c2c.evaluation.costs import STAGES
from c2c.evaluation.derived import abstain, route
from c2c.evaluation.journal import Journal
from c2c.evaluation.numbers import mcnemar, summarise
from c2c.language_model import Sharer
from c2c.prompting import RenderOptions
from c2c.systems.text_to_text import text_to_text
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
    chosen = {(item["id"], item["system"]): item["chosen"] for item in items}
    agree = {"receiver": 0, "sharer": 0, "matched": 0}
    for row in rows.values():
        options = RenderOptions(answer_prefix=row.answer_prefix)
        fused = model.prefill(row.messages, options=options)
        logits = {"matched": model.receiver.next_logits(fused.tokens, fused.cache)}
        for name, side in (("receiver", model.receiver), ("sharer", model.sharers[0])):
            tokens = side.encode(row.messages, options)
            logits[name] = side.next_logits(tokens, side.prefill(tokens, tokens.length - 1))
        for name, scores in logits.items():
            tokenizer = (model.sharers[0] if name == "sharer" else model.receiver).tokenizer
            ids = [tokenizer.encode(choice, add_special_tokens=False)[0] for choice in row.choices]
            agree[name] += int(scores[0, ids].argmax()) == chosen[row.id, name]
    assert all(count >= len(rows) - 1 for count in agree.values()), agree  # the store keeps bfloat16


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
    assert sorted((tmp_path / "part" / "items.jsonl").read_text().splitlines()) == sorted(
        (tmp_path / "whole" / "items.jsonl").read_text().splitlines()
    )


def test_several_sharers_are_refused_before_anything_is_written(tmp_path, data):
    receiver, sharer = pair_folders(lambda name: (tmp_path / name).mkdir() or tmp_path / name)
    C2CModel.from_models(receiver, [sharer, sharer]).save_pretrained(tmp_path / "fusers")
    with pytest.raises(EvaluationError, match="has 2 sharers"):
        evaluate(config(str(tmp_path / "fusers"), data, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_systems_are_added_to_a_finished_evaluation(fuser, data, tmp_path):
    whole = evaluate(config(fuser, data))
    first = config(fuser, data, output_dir=str(tmp_path), systems=("receiver", "matched"))
    evaluate(first)
    before = (tmp_path / "items.jsonl").read_text()
    added = evaluate(replace(first, systems=("receiver", "sharer", "matched", "deranged", "zero")))
    assert added["systems"] == whole["systems"]
    assert (tmp_path / "items.jsonl").read_text().startswith(before)  # nothing was answered twice


@pytest.fixture
def other_fuser(fuser, tmp_path):
    open_fusers(C2CModel.from_pretrained(fuser), scale=3.0).save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_answers_without_a_fuser_are_taken_over(fuser, other_fuser, data, tmp_path):
    systems = ("receiver", "sharer", "matched", "deranged", "text", "x")
    how = {"systems": systems, "fusers": {"x": fuser}, "message_tokens": 4, "output_dir": str(tmp_path / "1")}
    first = config(fuser, data, "a.jsonl", "b.jsonl", **how)
    evaluate(first)
    fresh = evaluate(replace(first, fuser=other_fuser, output_dir=None))
    second = replace(first, fuser=other_fuser, output_dir=str(tmp_path / "2"), reuse=str(tmp_path / "1"))
    taken = evaluate(second)
    assert taken["systems"] == fresh["systems"]
    assert taken["P"] == fresh["P"]
    assert set(taken["provenance"]["reused"]) == {"receiver", "sharer", "text", "x"}
    again = evaluate(replace(second, reuse=None))  # where they came from is told by what is written
    assert again["provenance"]["reused"] == taken["provenance"]["reused"]
    before, after = ((tmp_path / name / "items.jsonl").read_text() for name in "12")
    assert before.count('"reused"') == 0
    assert after.count('"reused"') == 4 * 14
    assert evaluate(replace(first, output_dir=None))["provenance"]["reused"] == {}


def test_taken_over_answers_are_those_on_disk(fuser, other_fuser, data, tmp_path):
    first = config(fuser, data, systems=("receiver", "sharer", "matched"), output_dir=str(tmp_path / "1"))
    evaluate(first)
    items = tmp_path / "1" / "items.jsonl"
    head, *lines = items.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    wrong = [r | {"chosen": 1 - r["answer"]} if r["system"] == "sharer" else r for r in records]
    items.write_text("\n".join([head, *map(json.dumps, wrong)]) + "\n")
    taken = evaluate(replace(first, fuser=other_fuser, output_dir=None, reuse=str(tmp_path / "1")))
    assert taken["systems"]["sharer"]["accuracy"] == 0


def test_answers_of_another_evaluation_are_not_taken_over(fuser, other_fuser, data, tmp_path):
    first = config(fuser, data, systems=("receiver", "matched"), output_dir=str(tmp_path / "1"))
    evaluate(first)
    second = replace(first, fuser=other_fuser, output_dir=str(tmp_path / "2"), reuse=str(tmp_path / "1"))
    with pytest.raises(EvaluationError, match=r"config\.limit was None, is 5"):
        evaluate(replace(second, limit=5))
    with pytest.raises(EvaluationError, match=r"data\..*a\.jsonl was .*, is None"):
        evaluate(replace(second, data=[DataSource("b.jsonl")]))
    assert not (tmp_path / "2" / "items.jsonl").exists()
    (tmp_path / "1" / "items.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"no items\.jsonl; expected the output_dir of an evaluation"):
        evaluate(second)


def test_a_journal_reads_back_any_text(tmp_path):
    text = "one\u2028two\x85three\r\nfour"  # some of these end a line for Python, none for JSON
    Journal(str(tmp_path), "key", 2).add("a", "text", [{"id": "1", "message": text}])
    assert Journal(str(tmp_path), "key", 2).records("a", "text") == [{"id": "1", "message": text}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_a_clear_error(fuser, data, tmp_path):
    made = config(fuser, data, output_dir=str(tmp_path))
    evaluate(made)
    lines = (tmp_path / "items.jsonl").read_text().splitlines(keepends=True)
    journal = Journal(str(tmp_path / "other"), "key", 2)
    journal.path.unlink()
    journal.path.symlink_to("/dev/full")
    with pytest.raises(EvaluationError, match=r"could not write .*No space left"):
        journal.add("a", "matched", [{"id": "1"}])
    assert (tmp_path / "items.jsonl").read_text().splitlines(keepends=True) == lines


def test_text_to_text_is_that_of_the_public_function(fuser, data, tmp_path):
    """Batched messages and answers are those of ``text_to_text`` one by one."""
    made = config(
        fuser,
        data,
        systems=("text", "text_published"),
        mode="generate",
        message_tokens=6,
        max_new_tokens=4,
        output_dir=str(tmp_path),
    )
    evaluate(made)
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()[1:]]
    model = C2CModel.from_pretrained(fuser)
    rows = {row.id: row for row in load_rows([DataSource("a.jsonl")], data, 0)[0]}
    assert len(items) == 2 * len(rows)
    for item in items:
        row = rows[item["id"]]
        alone = text_to_text(
            model.receiver,
            model.sharers[0],
            row.messages,
            variant="fair" if item["system"] == "text" else "published",
            message_tokens=6,
            max_new_tokens=4,
            do_sample=False,
            options=RenderOptions(answer_prefix=row.answer_prefix),
        )
        assert (item["message"], item["text"]) == (alone.message.text, alone.answer.text)


def test_messages_are_written_once(fuser, data, tmp_path, monkeypatch):
    """What the sharer writes is kept beside its prefills: another run, of any fuser, does not ask it again."""
    made = config(fuser, data, systems=("text",), message_tokens=6, store_dir=str(tmp_path / "store"))
    first = evaluate(made)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the sharer was asked again")

    monkeypatch.setattr(Sharer, "generate", refuse)
    assert evaluate(made)["systems"] == first["systems"]
    with pytest.raises(AssertionError, match="asked again"):
        evaluate(replace(made, message_tokens=5))


def test_further_fusers_and_an_untrained_one(fuser, data, tmp_path):
    """A fuser under another name is itself; one with the receiver as its sharer reads the receiver's own cache."""
    receiver = C2CModel.from_pretrained(fuser).receiver
    own = open_fusers(C2CModel.from_models(receiver, Sharer(receiver.model, receiver.tokenizer, receiver.name)))
    own.fusers[0].config.training = {"config": "random"}
    own.save_pretrained(tmp_path / "self")
    result = evaluate(
        config(
            fuser,
            data,
            systems=("receiver", "matched", "untrained", "again", "self"),
            fusers={"again": fuser, "self": str(tmp_path / "self")},
            output_dir=str(tmp_path / "out"),
        )
    )
    chosen = {}
    for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()[1:]:
        item = json.loads(line)
        chosen.setdefault(item["system"].partition("@")[0], []).append((item["chosen"], item["scores"]))
    assert chosen["again"] == chosen["matched"]
    assert chosen["untrained"] == chosen["receiver"]
    assert chosen["self"] not in (chosen["matched"], chosen["receiver"])
    assert result["systems"]["again"] == result["systems"]["matched"]


def test_a_fuser_that_changed_under_its_name_is_evaluated_anew(fuser, data, tmp_path):
    other = open_fusers(C2CModel.from_pretrained(fuser), scale=3.0)
    other.save_pretrained(tmp_path / "other")
    made = config(fuser, data, systems=("matched", "x"), fusers={"x": fuser}, output_dir=str(tmp_path / "out"))
    evaluate(made)
    evaluate(replace(made, fusers={"x": str(tmp_path / "other")}))
    names = [json.loads(line)["system"] for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()[1:]]
    assert sorted(names.count(name) for name in set(names)) == [11, 11, 11]


def test_timed_items_have_costs(fuser, data, tmp_path):
    made = config(
        fuser,
        data,
        "a.jsonl",
        "b.jsonl",
        systems=("receiver", "sharer", "matched", "text", "deranged"),
        timed=2,
        max_new_tokens=3,
        message_tokens=4,
        output_dir=str(tmp_path),
    )
    result = evaluate(made)
    systems = result["systems"]
    assert "seconds" not in systems["deranged"]  # a control costs what matched does
    for name in ("receiver", "sharer", "matched", "text"):
        assert systems[name]["timed"] == 4
        stages = sum(systems[name].get(stage, 0) for stage in STAGES)
        assert 0 < stages <= systems[name]["seconds"] * 1.001
        assert systems[name]["first_token"] <= systems[name]["seconds"]
    assert systems["receiver"]["bytes"] == systems["sharer"]["bytes"] == 0
    assert systems["matched"]["bytes"] > systems["text"]["bytes"] > 0
    assert systems["text"]["tokens"] <= 3 + 4
    assert result["speed"]["text"]["ratio"] > 0
    assert result["sources"]["b.jsonl"]["systems"]["matched"]["timed"] == 2
    lines = (tmp_path / "items.jsonl").read_text()
    assert evaluate(made)["systems"] == systems  # costs are read back, not measured again
    assert (tmp_path / "items.jsonl").read_text() == lines


def test_router_and_abstention_are_fitted_on_dev(fuser, data):
    made = config(
        fuser,
        data,
        systems=("receiver", "sharer", "matched", "router", "abstain"),
        dev=[DataSource("b.jsonl")],
        routed=0.4,
    )
    result = evaluate(made)
    assert set(result["systems"]) == set(made.systems)
    assert result["n"] == 11
    assert 0 <= result["router"]["share_routed"] <= 1
    curve = result["abstain"]["curve"]
    assert curve[0]["accuracy"] == pytest.approx(result["systems"]["receiver"]["accuracy"], abs=1e-3)
    assert curve[-1]["accuracy"] == pytest.approx(result["systems"]["matched"]["accuracy"], abs=1e-3)
    everything = evaluate(replace(made, routed=1.0))["systems"]
    assert everything["router"]["accuracy"] == everything["sharer"]["accuracy"]
    nothing = evaluate(replace(made, routed=0.0))["systems"]
    assert nothing["router"]["accuracy"] == nothing["receiver"]["accuracy"]


def test_abstention_uses_the_fused_cache_where_dev_says_it_helps():
    """Where it is surer the fused cache is right, elsewhere wrong: the rule must find that."""

    def records(chosen, best):
        pairs = zip(chosen, best, strict=True)
        return [{"id": str(i), "answer": 0, "chosen": c, "scores": [b, -9.0]} for i, (c, b) in enumerate(pairs)]

    receiver = records([0, 0, 1, 1], [-1.0, -1.0, -1.0, -1.0])
    matched = records([1, 1, 0, 0], [-2.0, -1.5, -0.5, -0.1])
    made = abstain({"receiver": receiver, "matched": matched}, {"receiver": receiver, "matched": matched})
    assert [record["used"] for record in made.records] == ["receiver", "receiver", "matched", "matched"]
    assert all(record["chosen"] == record["answer"] for record in made.records)
    assert made.facts["margin"] == 0.5
    never = abstain({"receiver": matched[2:], "matched": receiver[2:]}, {"receiver": receiver, "matched": matched})
    assert [record["used"] for record in never.records] == ["receiver"] * 4


def test_router_learns_which_questions_the_sharer_knows(fuser, data):
    """Questions about one word go to the sharer, those about another to the receiver."""
    model = C2CModel.from_pretrained(fuser).receiver

    def rows(start):
        words = ["sea sea sea sea sea", "dog dog dog dog dog"]
        return [letter_form(f"{words[i % 2]} {i}", ["a", "b"], 0) for i in range(start, start + 12)]

    def answered():
        right = [{"id": str(i), "answer": 0, "chosen": 0} for i in range(12)]
        wrong = [record | {"chosen": 1} for record in right]
        mixed = [(right, wrong)[i % 2][i] for i in range(12)]
        return {"sharer": mixed, "receiver": [(wrong, right)[i % 2][i] for i in range(12)]}

    made = route(model, answered(), rows(0), answered(), rows(20), 0.5)
    assert [record["used"] for record in made.records] == ["sharer", "receiver"] * 6
    assert made.facts["share_routed"] == 0.5


@pytest.mark.parametrize("seed", range(4))
def test_the_router_sends_the_asked_share_of_new_questions_too(monkeypatch, seed):
    """More dimensions than questions, and nothing to learn in them: still half of new questions go to the sharer."""
    draw = np.random.default_rng(seed)
    monkeypatch.setattr(derived, "_embed", lambda model, rows: draw.normal(size=(len(rows), 576)))

    def answered(count):
        """The sharer is right in most cases, so that the median gain is far from the mean one."""
        right = {"sharer": draw.random(count) < 0.8, "receiver": draw.random(count) < 0.2}
        return {name: [{"id": str(i), "answer": 0, "chosen": int(not hit)} for i, hit in enumerate(hits)]
                for name, hits in right.items()}  # fmt: skip

    made = route(None, answered(180), [None] * 180, answered(400), [None] * 400, 0.5)
    assert made.facts["share_routed"] == 0.5


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
    with pytest.raises(EvaluationError, match="do not share"):
        config(fuser, data, mode="nll")
    with pytest.raises(EvaluationError, match="dev data"):
        config(fuser, data, systems=("receiver", "sharer", "router"))
    with pytest.raises(EvaluationError, match="made of receiver and matched"):
        config(fuser, data, systems=("matched", "abstain"), dev=[DataSource("b.jsonl")])
    with pytest.raises(EvaluationError, match="needs the folder of an adapter"):
        config(fuser, data, systems=("adapter",))
    with pytest.raises(EvaluationError, match="can't have the name of a system"):
        config(fuser, data, fusers={"sharer": "x"})
    with pytest.raises(EvaluationError, match="unknown systems"):
        config(fuser, data, systems=("linear",))
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


def test_a_configuration_file_with_tasks(fuser, data, tmp_path):
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "test.jsonl").write_text((data / "a.jsonl").read_text())
    path = tmp_path / "eval.yaml"
    path.write_text("systems: [receiver, matched]\ndata:\n- {task: arc_easy, limit: 6}\n")
    run = CliRunner().invoke(app, ["eval", str(path), "--fuser", fuser, "--data-dir", str(tmp_path), "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout.strip().splitlines()[-1])["n"] == 6
    loaded = load_eval_config(path, fuser=fuser, limit=4, data_dir=str(tmp_path))
    hub = load_eval_config(path, fuser=fuser, data_dir=str(data)).data[0]  # no such file there
    assert (hub.dataset, hub.subset, hub.split, hub.limit) == ("allenai/ai2_arc", "ARC-Easy", "test", 6)
    assert loaded.data == [DataSource("arc_easy/test.jsonl", limit=6)]
    assert loaded.limit == 4
    for text, message in (
        ("data: [{task: arc_hard}]", "task 'arc_hard'; expected one of openbookqa"),
        ("data: [arc_easy]\nsystem: [matched]", "unknown keys \\['system'\\]"),
        ("data: [{task: arc_easy, path: x}]", "without a path of its own"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_eval_config(path, fuser=fuser)


def test_shipped_configs_load():
    configs = sorted((Path(__file__).parent.parent / "configs" / "eval").glob("*.yaml"))
    assert configs
    for path in configs:
        assert load_eval_config(path, fuser="zoo/x").systems


def test_command_takes_further_fusers(fuser, data):
    question = str(data / "a.jsonl")
    arguments = ["eval", "--fuser", fuser, "--data", question, "--systems", "matched,twin", "--json", "--limit", "4"]
    run = CliRunner().invoke(app, [*arguments, "--other", f"twin={fuser}"])
    assert run.exit_code == 0, run.output
    systems = json.loads(run.stdout.strip().splitlines()[-1])["systems"]
    assert systems["twin"] == systems["matched"]
    assert CliRunner().invoke(app, [*arguments, "--other", "twin"]).exit_code == 2


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
    assert "D" not in result
    scores = {"receiver": [0, 0, 1, 1], "deranged": [1, 1, 1, 0]}
    assert summarise(scores, seed=0)["D"] == 25  # a wrong message lifts the receiver
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)
    assert mcnemar(5, 5) == 1
    assert 0 < mcnemar(900, 700) < 1e-5


def test_interval_covers_a_known_mean():
    values = torch.rand(400, generator=torch.Generator().manual_seed(0)).lt(0.3).float().tolist()
    low, high = summarise({"matched": values}, seed=0)["systems"]["matched"]["ci95"]
    assert low < 30 < high
    assert high - low < 12
