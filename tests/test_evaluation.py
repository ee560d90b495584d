"""Evaluation on tiny models: systems, numbers, resuming and reuse, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from c2c import C2CModel
from c2c.cli.app import app
from c2c.config import ConfigError
from c2c.data.config import DataSource
from c2c.data.formats import letter_form
from c2c.data.sources import load_rows
from c2c.evaluation import EvalConfig, evaluate, load_eval_config
from c2c.evaluation.config import STAGES, EvaluationError
from c2c.evaluation.journal import Journal
from c2c.evaluation.metrics import read_letter
from c2c.evaluation.router import embed, route
from c2c.evaluation.statistics import mcnemar, speed, summarise
from c2c.language_model import LanguageModel
from c2c.prompting import RenderOptions
from c2c.sharer import Sharer
from c2c.systems import SystemOptions, make_system
from c2c.training.lora import new_adapter, save_adapter
from tiny import build, open_fusers, pair_folders, saved_fuser


@pytest.fixture(scope="module")
def fuser(tmp_path_factory):
    return saved_fuser(tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def other_fuser(fuser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    open_fusers(C2CModel.from_pretrained(fuser), scale=3.0).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    words = ["fox", "dog", "sun", "sea", "sky"]
    rows = [
        {"id": str(i), "question": f"Which is number {i}?", "choices": words[: 2 + i % 4], "answer": i % 2}
        for i in range(7)
    ]
    opens = [{"id": str(i), "question": f"Say {i}", "answer": f"it is {i}"} for i in range(5)]
    for name, part in (("a", rows), ("b", rows[:3]), ("open", opens)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def config(fuser, data, *files, **changes) -> EvalConfig:
    sources = [DataSource(name, **changes.pop("source", {})) for name in files or ("a.jsonl",)]
    return EvalConfig(fuser, sources, data_dir=str(data), batch_size=changes.pop("batch_size", 4), **changes)


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "items.jsonl").read_text().splitlines()[1:]]


def test_every_system_answers_every_item(fuser, data):
    result = evaluate(config(fuser, data, "a.jsonl", "b.jsonl"))
    assert {name: part["n"] for name, part in result["sources"].items()} == {"a.jsonl": 7, "b.jsonl": 3}
    assert result["n"] == 10
    assert set(result["systems"]) == {"receiver", "sharer", "matched", "deranged", "zero"}
    matched, other = result["systems"]["matched"]["accuracy"], result["systems"]["deranged"]["accuracy"]
    assert result["P"] == pytest.approx(matched - other, abs=1e-3)
    assert result["P_ci95"][0] <= result["P"] <= result["P_ci95"][1]


@pytest.mark.parametrize("form", ["letter", "sentence"])
def test_scores_are_those_of_the_systems(fuser, data, tmp_path, form):
    """The option with the largest logit after the prompt and the words before the letter, as one prompt at a time."""
    names = ("receiver", "sharer", "matched")
    evaluate(config(fuser, data, systems=names, source={"form": form}, output_dir=str(tmp_path)))
    chosen = {(item["id"], item["system"]): item["chosen"] for item in records(tmp_path)}
    model = C2CModel.from_pretrained(fuser)
    rows = load_rows([DataSource("a.jsonl", form=form)], data, 0)[0]
    for name in names:
        system, agree = make_system(name, model), 0
        for row in rows:
            prompt = system.prefill(row.messages, options=RenderOptions(answer_prefix=row.answer_prefix + row.lead))
            scores = prompt.model.next_logits(prompt.tokens, prompt.cache)[0]
            letters = [prompt.model.tokenizer.encode(choice, add_special_tokens=False)[0] for choice in row.choices]
            agree += int(scores[letters].argmax()) == chosen[row.id, name]
        assert agree >= len(rows) - 2, name  # stored prefills are bfloat16, and words of the answer are not fused


@pytest.mark.parametrize("form", ["published", "sentence"])
def test_letters_are_read_from_generated_answers(fuser, data, form):
    made = config(fuser, data, source={"form": form}, mode="generate", max_new_tokens=3, limit=4)
    assert evaluate(made)["n"] == 4


def test_nll_of_open_answers(fuser, data):
    systems = ("receiver", "matched", "deranged", "untrained")
    result = evaluate(config(fuser, data, "open.jsonl", source={"kind": "question"}, mode="nll", systems=systems))
    assert result["unit"] == "nats per token"
    means = {name: system["mean"] for name, system in result["systems"].items()}
    assert means["untrained"] == pytest.approx(means["receiver"], abs=1e-3)
    model = C2CModel.from_pretrained(fuser).receiver
    losses = []
    for row in load_rows([DataSource("open.jsonl", kind="question")], data, 0)[0]:
        prompt = model.encode(row.messages).ids[0].tolist()
        response = model.tokenizer.encode(row.response, add_special_tokens=False)
        response += [model.tokenizer.eos_token_id]
        logits = model.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(response))))
    assert means["receiver"] == pytest.approx(np.mean(losses), abs=0.05)  # bfloat16


def test_items_can_be_judged_by_a_reader(fuser, data, tmp_path):
    systems, options = ("receiver", "matched"), {"max_new_tokens": 2}
    evaluate(config(fuser, data, systems=systems, output_dir=str(tmp_path / "choice")))
    for item in records(tmp_path / "choice"):
        asked = int(item["id"])
        assert f"Which is number {asked}?" in item["prompt"]
        assert item["choices"] == ["fox", "dog", "sun", "sea", "sky"][: 2 + asked % 4]
        assert item["answer"] == asked % 2
        assert item["references"] == [item["choices"][item["answer"]]]
        assert 0 <= item["chosen"] < len(item["choices"])
    for mode, given in (("answers", "text"), ("nll", "nll")):
        source = {"kind": "question"}
        made = {"mode": mode, "source": source, "output_dir": str(tmp_path / mode), "systems": systems}
        evaluate(config(fuser, data, "open.jsonl", **made, **options))
        for item in records(tmp_path / mode):
            assert (item["prompt"], item["answer"]) == (f"Say {item['id']}", f"it is {item['id']}")
            assert item["references"] == [item["answer"]]
            assert given in item


@pytest.mark.parametrize("mode", ["logits", "answers"])
def test_records_of_earlier_versions_are_completed_or_refused(fuser, data, tmp_path, mode):
    """They have neither prompt nor references; where they were read otherwise, they are not mixed with new ones."""
    name, source = ("a.jsonl", {}) if mode == "logits" else ("open.jsonl", {"kind": "question"})
    systems = ("receiver", "matched")
    made = config(
        fuser, data, name, source=source, mode=mode, systems=systems, max_new_tokens=2, output_dir=str(tmp_path)
    )
    evaluate(made)
    new = records(tmp_path)
    items = tmp_path / "items.jsonl"
    header = items.read_text().splitlines()[0]

    def old(**changes):
        kept = [{key: one[key] for key in one if key not in ("prompt", "references", "choices")} for one in new]
        kept = [one | ({} if mode == "logits" else {"answer": -1}) | changes for one in kept[:6]]
        items.write_text("".join(f"{line}\n" for line in [header, *map(json.dumps, kept)]))

    old()
    evaluate(made)
    assert sorted(records(tmp_path), key=str) == sorted(new, key=str)
    old(**({"answer": 7} if mode == "logits" else {"exact": 1.0}))
    with pytest.raises(EvaluationError, match="read the data otherwise"):
        evaluate(made)


# -- resuming and reuse ------------------------------------------------------------------------------------------------


def test_an_interrupted_run_resumes_to_the_same_numbers(fuser, data, tmp_path):
    whole = evaluate(config(fuser, data, "a.jsonl", "b.jsonl", output_dir=str(tmp_path / "whole")))

    class Killed(Exception):
        pass

    def kill(stage, done, total):
        if done >= 7:
            raise Killed

    part = config(fuser, data, "a.jsonl", "b.jsonl", output_dir=str(tmp_path / "part"))
    with pytest.raises(Killed):
        evaluate(part, kill)
    journal = tmp_path / "part" / "items.jsonl"
    journal.write_text(journal.read_text()[:-20])  # the last line was cut
    seen = []
    resumed = evaluate(part, lambda stage, done, total: seen.append((stage, done)))
    assert seen[0] == ("a.jsonl", 7)  # the incomplete batch was done again, the first one was not
    assert resumed["systems"] == whole["systems"]
    whole_lines, part_lines = ((tmp_path / name / "items.jsonl").read_text() for name in ("whole", "part"))
    assert sorted(part_lines.splitlines()) == sorted(whole_lines.splitlines())
    with pytest.raises(EvaluationError, match="another evaluation"):
        evaluate(replace(part, seed=1))


def test_systems_are_added_to_a_finished_evaluation(fuser, other_fuser, data, tmp_path):
    first = config(fuser, data, output_dir=str(tmp_path), systems=("matched", "x"), fusers={"x": fuser})
    evaluate(first)
    before = (tmp_path / "items.jsonl").read_text()
    evaluate(replace(first, systems=("receiver", "matched", "x"), fusers={"x": other_fuser}))
    assert (tmp_path / "items.jsonl").read_text().startswith(before)  # nothing was answered twice
    names = [record["system"] for record in records(tmp_path)]
    assert sorted(names.count(name) for name in set(names)) == [7, 7, 7, 7], "another fuser under the name x is new"


def test_answers_without_a_fuser_are_reused(fuser, other_fuser, data, tmp_path):
    systems = ("receiver", "sharer", "matched", "text", "x")
    settings = {"systems": systems, "fusers": {"x": fuser}, "message_tokens": 4, "output_dir": str(tmp_path / "1")}
    first = config(fuser, data, "a.jsonl", "b.jsonl", **settings)
    evaluate(first)
    fresh = evaluate(replace(first, fuser=other_fuser, output_dir=None))
    second = replace(first, fuser=other_fuser, output_dir=str(tmp_path / "2"), reuse=str(tmp_path / "1"))
    reused = evaluate(second)
    assert reused["systems"] == fresh["systems"]
    assert set(reused["provenance"]["reused"]) == {"receiver", "sharer", "text", "x"}
    again = evaluate(replace(second, reuse=None))  # read from what was written
    assert again["provenance"]["reused"] == reused["provenance"]["reused"]
    assert [sum("reused" in record for record in records(tmp_path / name)) for name in "12"] == [0, 4 * 10]


def test_answers_of_another_evaluation_are_not_reused(fuser, other_fuser, data, tmp_path):
    first = config(fuser, data, systems=("receiver", "matched"), output_dir=str(tmp_path / "1"))
    evaluate(first)
    second = replace(first, fuser=other_fuser, output_dir=str(tmp_path / "2"), reuse=str(tmp_path / "1"))
    for change, message in (
        ({"limit": 5}, r"config\.limit was None, is 5"),
        ({"data": [DataSource("b.jsonl")]}, r"data\..*a\.jsonl was .*, is None"),
    ):
        with pytest.raises(EvaluationError, match=message):
            evaluate(replace(second, **change))
    assert not (tmp_path / "2" / "items.jsonl").exists()
    items = tmp_path / "1" / "items.jsonl"
    items.write_text(items.read_text().replace('"id": "3"', '"id": "x"'))
    with pytest.raises(EvaluationError, match="items of"):
        evaluate(second)
    items.unlink()
    with pytest.raises(EvaluationError, match=r"no items\.jsonl"):
        evaluate(second)


def test_a_journal_reads_back_any_text(tmp_path):
    text = "one\u2028two\x85three\r\nfour"  # some of these end a line for Python, none for JSON
    Journal(str(tmp_path), "key", 2).add("a", "text", [{"id": "1", "message": text}])
    assert Journal(str(tmp_path), "key", 2).records("a", "text") == [{"id": "1", "message": text}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_a_clear_error(tmp_path):
    journal = Journal(str(tmp_path), "key", 2)
    journal.path.unlink()
    journal.path.symlink_to("/dev/full")
    with pytest.raises(EvaluationError, match=r"could not write .*No space left"):
        journal.add("a", "matched", [{"id": "1"}])


# -- further systems ---------------------------------------------------------------------------------------------------


def test_text_to_text_in_batches_is_that_of_single_prompts(fuser, data, tmp_path):
    systems, settings = ("text", "text_published"), {"mode": "generate", "message_tokens": 6, "max_new_tokens": 4}
    evaluate(config(fuser, data, systems=systems, output_dir=str(tmp_path), **settings))
    model = C2CModel.from_pretrained(fuser)
    rows = {row.id: row for row in load_rows([DataSource("a.jsonl")], data, 0)[0]}
    items = records(tmp_path)
    assert len(items) == 2 * len(rows)
    for item in items:
        row = rows[item["id"]]
        alone = make_system(item["system"], model, SystemOptions(message_tokens=6)).generate(
            row.messages, options=RenderOptions(answer_prefix=row.answer_prefix), max_new_tokens=4, do_sample=False
        )
        assert (item["message"], item["text"]) == (alone.message.text, alone.text)


def test_systems_share_the_prefills_of_a_batch(fuser, data, monkeypatch):
    """Both models' prompts are read once, whatever the number of systems; and not through the store's own hook."""
    rows = {"receiver": 0, "sharer": 0}
    decoder = LanguageModel.prefill

    def count(self, batch, stop=None, cache=None):
        made = self.stored.store.computed if self.stored else 0
        result = decoder(self, batch, stop, cache)
        rows[self.role] += (self.stored.store.computed if self.stored else 0) - made
        return result

    monkeypatch.setattr(LanguageModel, "prefill", count)
    evaluate(config(fuser, data, systems=("receiver", "sharer", "matched", "deranged", "zero", "untrained")))
    assert rows == {"receiver": 7, "sharer": 7}


def test_further_fusers_an_untrained_one_and_an_adapter(fuser, data, tmp_path):
    """A fuser under another name is itself; one with the receiver as its sharer reads the receiver's own cache."""
    model = C2CModel.from_pretrained(fuser)
    receiver = model.receiver
    own = open_fusers(C2CModel.from_models(receiver, Sharer(receiver.model, receiver.tokenizer, receiver.name)))
    own.fusers[0].config.training = {"config": "random"}
    own.save_pretrained(tmp_path / "self")
    save_adapter(new_adapter(receiver, 2), receiver, tmp_path / "adapter")
    fusers = {"again": fuser, "self": str(tmp_path / "self")}
    systems = ("receiver", "matched", "untrained", "adapter", *fusers)
    settings = {"fusers": fusers, "adapter": str(tmp_path / "adapter"), "output_dir": str(tmp_path / "out")}
    result = evaluate(config(fuser, data, systems=systems, **settings))
    chosen = {}
    for item in records(tmp_path / "out"):
        chosen.setdefault(item["system"].partition("@")[0], []).append((item["chosen"], item["scores"]))
    assert chosen["again"] == chosen["matched"]
    assert chosen["untrained"] == chosen["receiver"]
    assert chosen["self"] not in (chosen["matched"], chosen["receiver"])
    assert [one for one, _ in chosen["adapter"]] == [one for one, _ in chosen["receiver"]], "it is new"
    assert result["systems"]["again"] == result["systems"]["matched"]
    with pytest.raises(EvaluationError, match="holds no adapter"):
        evaluate(config(fuser, data, systems=("adapter",), adapter=str(tmp_path)))


def test_a_fuser_of_another_sharer_brings_its_model(fuser, data, tmp_path):
    model = C2CModel.from_pretrained(fuser)
    build("qwen3").save_pretrained(tmp_path / "third")
    model.sharers[0].tokenizer.save_pretrained(tmp_path / "third")
    third = C2CModel.from_models(model.receiver, str(tmp_path / "third"), fuser_options={"rank": 4})
    third.save_pretrained(tmp_path / "other")
    made = config(fuser, data, systems=("receiver", "matched", "third"), fusers={"third": str(tmp_path / "other")})
    systems = evaluate(made)["systems"]
    assert systems["third"] == systems["receiver"], "it is untrained"
    settings = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings | {"sharer": None}))
    with pytest.raises(EvaluationError, match="which sharer"):
        evaluate(made)


def test_timed_items_have_costs(fuser, data, tmp_path):
    systems = ("receiver", "sharer", "matched", "text", "deranged")
    settings = {"timed": 2, "max_new_tokens": 3, "message_tokens": 4, "output_dir": str(tmp_path)}
    made = config(fuser, data, "a.jsonl", "b.jsonl", systems=systems, **settings)
    result = evaluate(made)
    costs = result["systems"]
    assert "seconds" not in costs["deranged"]  # a control costs what matched does
    for name in ("receiver", "sharer", "matched", "text"):
        assert costs[name]["timed"] == 4
        stages = sum(costs[name].get(stage, 0) for stage in STAGES)
        assert 0 < stages <= costs[name]["seconds"] + 1e-4 * len(STAGES)  # each is rounded by itself
        assert costs[name]["first_token"] <= costs[name]["seconds"]
    assert costs["receiver"]["bytes"] == costs["sharer"]["bytes"] == 0
    assert costs["matched"]["bytes"] > costs["text"]["bytes"] > 0
    assert costs["text"]["tokens"] <= 3 + 4
    assert result["speed"]["text"]["ratio"] > 0
    assert result["sources"]["b.jsonl"]["systems"]["matched"]["timed"] == 2
    assert evaluate(made)["systems"] == costs  # read back, not measured again


def test_the_router_is_fitted_on_dev(fuser, data):
    made = config(fuser, data, systems=("receiver", "sharer", "router"), dev=[DataSource("b.jsonl")], routed=0.4)
    result = evaluate(made)
    assert result["n"] == 7
    assert 0 <= result["router"]["share_routed"] <= 1
    for share, name in ((1.0, "sharer"), (0.0, "receiver")):
        systems = evaluate(replace(made, routed=share))["systems"]
        assert systems["router"]["accuracy"] == systems[name]["accuracy"]


def test_the_router_learns_which_questions_the_sharer_can_answer(fuser):
    model = C2CModel.from_pretrained(fuser).receiver

    def features(start):
        words = ["sea sea sea sea sea", "dog dog dog dog dog"]
        return embed(model, [letter_form(f"{words[i % 2]} {i}", ["a", "b"], 0) for i in range(start, start + 12)])

    found, facts = route(np.array([1.0, -1.0] * 6), features(0), features(20), 0.5)
    assert found == ["sharer", "receiver"] * 6
    assert facts["share_routed"] == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_the_router_sends_the_asked_share_of_new_questions_too(seed):
    """More dimensions than questions, and nothing to learn in them: still half of new questions go to the sharer."""
    draw = np.random.default_rng(seed)
    better = np.sign(draw.normal(size=180))
    _, facts = route(better, draw.normal(size=(180, 576)), draw.normal(size=(400, 576)), 0.5)
    assert facts["share_routed"] == 0.5


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ("receivr",)}, "unknown systems.*mean 'receiver'"),
        ({"systems": ("abstain",)}, "no longer"),
        ({"systems": ()}, "no system"),
        ({"mode": "guess"}, "unknown mode"),
        ({"mode": "nll"}, "do not share"),
        ({"systems": ("receiver", "sharer", "router")}, "dev data"),
        ({"systems": ("matched", "router"), "dev": [DataSource("b.jsonl")]}, "add receiver, sharer"),
        ({"systems": ("adapter",)}, "folder of an adapter"),
        ({"fusers": {"sharer": "x"}}, "name of a system"),
        ({"batch_size": 1}, "at least 2"),
        ({"limit": 1}, "at least 2"),
        ({"routed": 2.0}, "a share"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(EvaluationError, match=message):
        config("fuser", "data", **changes)


def test_items_that_do_not_suit_are_refused_before_anything_is_written(fuser, data, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "seven", "question": "q", "choices": ["a", "b"], "answer": 2}))
    receiver, sharer = pair_folders(lambda name: (tmp_path / name).mkdir() or tmp_path / name)
    C2CModel.from_models(receiver, [sharer, sharer]).save_pretrained(tmp_path / "two")
    question, out = {"kind": "question"}, {"output_dir": str(tmp_path / "out")}
    for made, error, message in (
        (config(fuser, data, "nothing.jsonl", **out), ConfigError, "no such data file"),
        (config(fuser, tmp_path, "x.jsonl", **out), ConfigError, "seven.*'answer' is 2"),
        (config(fuser, data, "open.jsonl", source=dict(question), **out), EvaluationError, "multiple-choice"),
        (config(fuser, data, mode="answers", **out), EvaluationError, "reference"),
        (config(fuser, data, source={"skip": 6}, **out), EvaluationError, "1 items"),
        (config(str(tmp_path / "two"), data, **out), EvaluationError, "2 sharers"),
    ):
        with pytest.raises(error, match=message):
            evaluate(made)
    with pytest.raises(EvaluationError, match="data"):
        EvalConfig(fuser, [])
    assert not (tmp_path / "out").exists()


# -- command and configuration -----------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_the_command_ends_with_one_json_object(fuser, data):
    systems = ("--systems", "receiver,matched,deranged,twin", "--other", f"twin={fuser}", "--limit", 5)
    done = run("--fuser", fuser, "--data", data / "a.jsonl", *systems, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["n"] == 5
    assert {"systems", "G", "P", "P_ci95"} <= set(result)
    assert result["systems"]["twin"] == result["systems"]["matched"]
    assert run("--fuser", fuser, "--data", data / "a.jsonl", "--other", "twin").exit_code == 2


def test_the_command_prints_tables(fuser, data, tmp_path):
    long = {"id": "long", "question": "long " * 600, "choices": ["a", "b"], "answer": 0}
    (tmp_path / "a.jsonl").write_text((data / "a.jsonl").read_text() + json.dumps(long) + "\n")
    systems = ("--systems", "receiver,matched,deranged", "--max-new-tokens", 2)
    for timed in (0, 1):
        done = run("--fuser", fuser, "--data", tmp_path / "a.jsonl", *systems, "--timed", timed)
        assert done.exit_code == 0, done.output
        assert "matched - deranged" in done.stdout
        assert ("first token" in done.stdout) == bool(timed)
        assert "prompt too long" in done.stderr


def test_a_configuration_file_with_tasks(fuser, data, tmp_path):
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "test.jsonl").write_text((data / "a.jsonl").read_text())
    path = tmp_path / "eval.yaml"
    path.write_text("systems: [receiver, matched]\ndata:\n- {task: arc_easy, limit: 6}\n")
    done = run(path, "--fuser", fuser, "--data-dir", tmp_path, "--json")
    assert json.loads(done.stdout.strip().splitlines()[-1])["n"] == 6
    loaded = load_eval_config(path, fuser=fuser, limit=4, data_dir=str(tmp_path))
    assert (loaded.data, loaded.limit) == ([DataSource("arc_easy/test.jsonl", limit=6)], 4)
    hub = load_eval_config(path, fuser=fuser, data_dir=str(data)).data[0]  # no such file there
    assert (hub.dataset, hub.subset, hub.split, hub.limit) == ("allenai/ai2_arc", "ARC-Easy", "test", 6)
    for text, message in (
        ("data: [{task: arc_hard}]", "task 'arc_hard'.*mean 'arc_"),
        ("data: [arc_eazy]", "mean 'arc_easy'"),
        ("data: [arc_easy]\nsystem: [matched]", "unknown keys \\['system'\\]"),
        ("data: [{task: arc_easy, path: x}]", "without a path of its own"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_eval_config(path, fuser=fuser)


def test_shipped_configurations_load():
    configs = sorted((Path(__file__).parent.parent / "configs" / "eval").glob("*.yaml"))
    assert configs
    for path in configs:
        assert load_eval_config(path, fuser="zoo/x").systems


# -- numbers -----------------------------------------------------------------------------------------------------------


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


def test_differences_and_their_tests():
    result = summarise({"receiver": [0, 0, 1, 1], "matched": [1, 1, 1, 0], "sharer": [1, 1, 1, 1]}, seed=0)
    assert (result["G"], result["mended"], result["spoiled"], result["gap_recovered"]) == (25, 50, 25, 50)
    assert "D" not in result
    assert summarise({"receiver": [0, 0, 1, 1], "deranged": [1, 1, 1, 0]}, seed=0)["D"] == 25
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)
    assert mcnemar(5, 5) == mcnemar(0, 0) == 1
    assert 0 < mcnemar(900, 700) < 1e-5


def test_intervals():
    values = torch.rand(400, generator=torch.Generator().manual_seed(0)).lt(0.3).float().tolist()
    low, high = summarise({"matched": values}, seed=0)["systems"]["matched"]["ci95"]
    assert low < 30 < high < low + 12
    costs = {"matched": [{"seconds": 1.0}, {"seconds": 2.0}], "text": [{"seconds": 3.0}, {"seconds": 6.0}]}
    assert speed(costs, seed=0)["speed"]["text"] == {"ratio": 3, "ci95": [3, 3]}
    single = {name: part[:1] for name, part in costs.items()}
    assert speed(single, seed=0)["speed"]["text"]["ci95"] == [3, 3]
