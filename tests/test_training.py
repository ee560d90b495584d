"""Training in shared context on tiny models: the step, selection, resuming, and the families' own ways to start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from c2c import C2CModel, kv_cache
from c2c.alignment.base import derange_columns
from c2c.config import ConfigError
from c2c.data.config import DataSource
from c2c.data.formats import multiple_choice
from c2c.errors import CacheError, FuserError, ModelLoadError
from c2c.fusers import BottleneckFuser
from c2c.fusers.base import fuser_hash
from c2c.prompting import RenderOptions
from c2c.training import load_config, train
from c2c.training.dev_set import DevSet
from c2c.training.examples import build_examples
from c2c.training.objective import FuserObjective, cross_entropy
from c2c.training.run import fill, initialise, prepare
from c2c.training.trainer import LengthGroupedSampler, make_arguments
from training_rig import Stopped, config, make_folders, open_fuser, private_config, stop_at

MINIMAL = "receiver: a\nsharer: b\noutput_dir: c\ntrain: [{path: x}]\ndev: [{path: x}]\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def ready(folders, tmp_path_factory):
    """A run whose fuser changes the cache; for tests that change nothing."""
    run = prepare(config(folders, tmp_path_factory.mktemp("ready")))
    open_fuser(run)
    return run


def scores_of(folder):
    return json.loads((folder / "dev.json").read_text())


# -- the step --------------------------------------------------------------------------------------------------------


def test_loss_from_stored_caches_equals_the_loss_through_the_public_path(ready):
    model, example = ready.objective.model, ready.train[0]
    batch = ready.objective.collate([example])
    stored = float(cross_entropy(ready.objective.logits(batch, "matched"), batch.responses)[0, 0].detach())
    fused = model.prefill(example.row.messages, options=RenderOptions(answer_prefix=example.row.answer_prefix))
    logits = model.receiver.next_logits(fused.tokens, fused.cache)
    direct = float(torch.nn.functional.cross_entropy(logits, torch.tensor(example.response_ids[:1])))
    assert stored == pytest.approx(direct, abs=0.02)  # the store keeps bfloat16


@pytest.mark.parametrize("make_config", [config, private_config])
def test_a_batch_has_the_losses_of_its_examples(folders, tmp_path, make_config):
    """Padding of prompts, passages and responses takes no part."""
    run = prepare(make_config(folders, tmp_path))
    open_fuser(run)
    objective, examples = run.objective.eval(), run.train[:5]
    with torch.no_grad():
        together = objective.losses(objective.collate(examples), "matched")
        alone = torch.cat([objective.losses(objective.collate([example]), "matched") for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_gradients_reach_the_fuser_and_nothing_else(folders, tmp_path):
    run = prepare(config(folders, tmp_path))
    run.objective(run.train[:4])["loss"].backward()
    fuser, model = run.objective.fuser, run.objective.model
    assert fuser.up.grad.abs().sum() > 0
    assert all(p.grad is None for m in (model.receiver, model.sharers[0]) for p in m.model.parameters())
    assert {id(p) for p in run.objective.parameters()} == {id(p) for p in fuser.parameters()}
    assert all(name.startswith("fuser.") for name in run.objective.state_dict())


@pytest.mark.parametrize("gradients", [False, True])
def test_messages_differ_and_leave_the_stored_caches_as_they_are(folders, tmp_path, gradients):
    run = prepare(config(folders, tmp_path))
    objective, batch = run.objective, run.objective.collate(run.train[:4])
    objective.fuser.requires_grad_(gradients)
    before = kv_cache.copy(batch.receiver_cache)
    assert torch.equal(objective.logits(batch, "matched"), objective.logits(batch, "none"))
    open_fuser(run)
    logits = {m: objective.logits(batch, m) for m in ("matched", "deranged", "zero", "none")}
    for other in ("deranged", "zero", "none"):
        assert not torch.allclose(logits["matched"], logits[other])
    for old, new in zip(kv_cache.layers(before), kv_cache.layers(batch.receiver_cache), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("make_config", [config, private_config])
def test_guard_adds_what_another_message_gains_over_the_receiver(folders, tmp_path, make_config):
    run = prepare(make_config(folders, tmp_path, guard_weight=2.0))
    open_fuser(run)
    objective, batch = run.objective.eval(), run.objective.collate(run.train[:4])
    with torch.no_grad():
        gained = torch.relu(objective.losses(batch, "none") - objective.losses(batch, "deranged")).mean()
        expected = objective.losses(batch, "matched").mean() + 2.0 * gained
        assert torch.allclose(objective(run.train[:4])["loss"], expected)


def test_deranged_columns_keep_order_and_the_last_position():
    assert derange_columns([0, 1, 2, 3, 9, 9], [5, 6, 20, 20, 20]) == [5, 5, 6, 6, 20, 20]
    assert derange_columns([0, 0, 0], [4, 7]) == [7, 7, 7]


@pytest.mark.parametrize("make_config", [config, private_config])
def test_reconstruction_learns_to_repeat_the_message_first(folders, tmp_path, make_config):
    run = prepare(make_config(folders, tmp_path, reconstruction_steps=2))
    open_fuser(run)
    objective, example = run.objective.eval(), run.train[0]
    message = (example.row.sharer_messages or example.row.messages)[-1]["content"]
    assert objective.model.receiver.tokenizer.decode(example.message_ids).strip() == message
    batches = {step: [example.reconstructing()] if step < 2 else [example] for step in (0, 1, 2)}
    for step, expected in batches.items():
        objective.on_step(step)
        loss = objective.losses(objective.collate(expected), "matched").mean()
        assert float(objective([example])["loss"].detach()) == pytest.approx(float(loss.detach()), rel=1e-4)


# -- soft targets ----------------------------------------------------------------------------------------------------


def test_soft_targets_are_the_sharers_centred_answers(folders, tmp_path):
    settings = config(folders, tmp_path, soft_targets=0.5, soft_temperature=1.0, store_dir=str(tmp_path / "store"))
    run = prepare(settings)
    sharer, raw = run.objective.model.sharers[0], []
    for example in run.train:
        tokens = sharer.encode(example.row.messages, RenderOptions(answer_prefix=example.row.answer_prefix))
        ids = [sharer.tokenizer.encode(choice, add_special_tokens=False)[0] for choice in example.row.choices]
        raw.append(sharer.next_logits(tokens, sharer.prefill(tokens, tokens.length - 1))[0, ids].log_softmax(-1))
    table = torch.stack(raw)
    expected = ((table - table.mean(0)) / (table - table.mean(0)).std()).softmax(-1)
    fill(run)
    assert sharer.released
    found = torch.tensor([example.soft_target for example in run.train])
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)  # the store keeps bfloat16
    assert not any(example.soft_target for example in run.dev)
    again = prepare(settings)
    fill(again)  # read back, since the sharer is not run again
    assert [example.soft_target for example in again.train] == [example.soft_target for example in run.train]


def test_soft_targets_mix_with_the_right_answer(folders, tmp_path):
    run = prepare(config(folders, tmp_path, soft_targets=0.25))
    fill(run)
    open_fuser(run)
    objective, examples = run.objective, run.train[:3]
    batch = objective.collate(examples)
    mixed = objective.losses(batch, "matched")
    objective.soft_targets = 0.0
    hard, logits = objective.losses(batch, "matched"), objective.logits(batch, "matched")
    for row, example in enumerate(examples):
        scores = logits[row, example.decisive].log_softmax(-1)[example.choice_ids]
        right, soft = -scores[example.row.answer], -(torch.tensor(example.soft_target) * scores).sum()
        torch.testing.assert_close(mixed[row], hard[row] + 0.25 * (soft - right))


# -- runs ------------------------------------------------------------------------------------------------------------


def test_train_selects_on_dev_and_writes_a_fuser_that_loads(folders, tmp_path):
    summary = train(config(folders, tmp_path))
    scores = scores_of(tmp_path)
    assert set(scores) == {"2", "4", "6"}
    assert summary["dev"]["value"] == max(entry["value"] for entry in scores.values())
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    model = C2CModel.from_pretrained(summary["fuser"])
    record = model.fusers[0].config.training
    assert model.trained
    assert record["step"] == summary["step"]
    assert not {"data_dir", "output_dir", "store_dir"} & set(record["config"])
    assert model.generate("Which is number 3?", max_new_tokens=2).report.trained
    again = train(config(folders, tmp_path, max_steps=4, learning_rate=0.0), resume=False)
    assert set(scores_of(tmp_path)) == {"2", "4"}, "scores of the earlier run do not count"
    assert again["step"] == 2


def test_a_trained_fuser_is_trained_on(folders, tmp_path):
    first = train(config(folders, tmp_path / "first"))
    changes = {"start_from": first["fuser"], "learning_rate": 0.0, "max_steps": 2}
    second = train(config(folders, tmp_path / "second", **changes))
    assert scores_of(tmp_path / "second")["0"] == first["dev"], "it is what training must beat"
    kept = C2CModel.from_pretrained(second["fuser"]).fusers[0]
    assert kept.config.training["started_from"] == fuser_hash(first["fuser"])
    assert kept.config.training["step"] == 0
    before = C2CModel.from_pretrained(first["fuser"]).fusers[0]
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), kept.parameters(), strict=True))
    with pytest.raises(ConfigError, match="holds bottleneck; expected one fuser of family 'c2c'"):
        train(config(folders, tmp_path / "a", start_from=first["fuser"], family="c2c", fuser_options={}))
    with pytest.raises(FuserError):
        train(config((folders[1], folders[0], folders[2]), tmp_path / "b", start_from=first["fuser"]))
    with pytest.raises(ModelLoadError, match="nowhere"):
        train(config(folders, tmp_path / "c", start_from="nowhere/at/all"))


def test_a_run_that_was_stopped_gives_the_result_of_one_that_was_not(folders, tmp_path, monkeypatch):
    train(config(folders, tmp_path / "whole", save_steps=2, max_steps=12))
    half = config(folders, tmp_path / "parts", save_steps=2, max_steps=12)
    with pytest.raises(Stopped):
        train(half, progress=stop_at(9))  # in the second epoch
    monkeypatch.setattr(BottleneckFuser, "initialise_from_data", None)  # the checkpoint has what it found
    seen = []
    train(half, progress=lambda *report: seen.append(report))
    assert [report for report in seen if report[0] == "training"] == [("training", n, 12) for n in range(9, 13)]
    for name in ("best", "checkpoint-12"):
        one, other = (C2CModel.from_pretrained(tmp_path / run / name).fusers[0] for run in ("whole", "parts"))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert scores_of(tmp_path / "whole").keys() == scores_of(tmp_path / "parts").keys()
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        train(config(folders, tmp_path / "parts", seed=1, save_steps=2, max_steps=12))


def test_every_epoch_has_its_own_order_also_after_a_resume(folders, tmp_path, monkeypatch):
    seen = []
    original = FuserObjective.forward

    def record(self, examples, share=1.0):
        seen.append([example.row.id for example in examples])
        return original(self, examples, share)

    monkeypatch.setattr(FuserObjective, "forward", record)
    train(config(folders, tmp_path / "whole", max_steps=12, save_steps=4))
    whole = list(seen)
    seen.clear()
    for steps in (8, 12):
        train(config(folders, tmp_path / "parts", max_steps=steps, save_steps=4))
    assert seen == whole
    assert whole[:6] != whole[6:]


def test_the_dev_score_counts_every_example_once(ready):
    whole = DevSet(ready.dev, batch_size=6).score(ready.objective)
    parts = DevSet(ready.dev[:5], batch_size=4).score(ready.objective)
    assert (whole["n"], parts["n"]) == (6, 5)
    right = [DevSet([example], 1).score(ready.objective)["matched"] for example in ready.dev]
    assert whole["matched"] == pytest.approx(sum(right) / 6)


def test_dev_scores_and_loss_go_to_tensorboard(folders, tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(config(folders, tmp_path / "run", report_to="tensorboard", logging_steps=1))
    events = reader.EventAccumulator(str(tmp_path / "board")).Reload()
    assert {"train/loss", "train/dev_matched", "train/dev_P"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/loss")) == 6


def test_filling_while_training_gives_the_same_fuser(folders, tmp_path):
    ahead = train(config(folders, tmp_path / "ahead"))
    along = train(config(folders, tmp_path / "along", fill="training"))
    assert along["dev"] == pytest.approx(ahead["dev"], rel=1e-4)


def test_the_sharer_is_released_once_its_prefills_are_stored(folders, tmp_path):
    run = prepare(config(folders, tmp_path))
    before = float(run.objective(run.train[:4])["loss"].detach())
    stages = {}
    fill(run, lambda stage, done, total: stages.setdefault(stage, []).append((done, total)))
    assert set(stages) == {"receiver prefill (tokens)", "sharer prefill (tokens)"}
    assert all(reports[-1][0] == reports[-1][1] for reports in stages.values())
    assert sum(parameter.numel() for parameter in run.objective.model.sharers[0].model.parameters()) == 0
    assert float(run.objective(run.train[:4])["loss"].detach()) == pytest.approx(before, rel=1e-4)
    with pytest.raises(CacheError, match="released"):
        run.objective.sharer_store.get([[1, 2, 3]])
    small = prepare(config(folders, tmp_path, store_budget_gb=1e-6))
    fill(small)
    assert not small.objective.model.sharers[0].released


# -- families --------------------------------------------------------------------------------------------------------


def test_the_published_fuser_follows_its_temperature_schedule(folders, tmp_path):
    options = {"fuser_options": {"hidden_dim": 16, "intermediate_dim": 16}, "layer_map": "terminal"}
    summary = train(config(folders, tmp_path, family="c2c", max_steps=4, **options))
    last = json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())
    assert last["gate_temperature"] == pytest.approx(0.001 ** (3 / 4))
    assert summary["dev"]["n"] == 6


def test_a_linear_fuser_is_fitted_and_its_blend_chosen(folders, tmp_path):
    summary = train(config(folders, tmp_path, family="linear", fuser_options={"ridge": 0.1}, linear_weight="attention"))
    model = C2CModel.from_pretrained(summary["fuser"])
    record = model.fusers[0].config.training
    assert model.trained
    assert float(model.fusers[0].gates().max()) == pytest.approx(summary["blend"])
    assert len(record["blends"]) == 10
    assert summary["dev"]["value"] == max(record["blends"].values())


def test_a_bottleneck_fuser_starts_with_the_statistics_of_its_channels(folders, tmp_path):
    run = prepare(config(folders, tmp_path))
    assert initialise(run) is False
    fuser = run.objective.fuser
    data = [item for start in (0, 4) for item in run.objective.observe(run.train[start : start + 4])]
    x = torch.cat([torch.cat([d.sharer.channels(), d.receiver.channels()], dim=-1) for d in data], dim=1)
    torch.testing.assert_close(fuser.mean, x.mean(1, keepdim=True), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fuser.scale, x.std(1, correction=0, keepdim=True).clamp_min(1e-4), rtol=1e-3, atol=1e-3)
    with pytest.raises(FuserError, match="no aligned entries"):
        fuser.initialise_from_data([])


def test_a_cue_goes_with_the_fuser(folders, tmp_path):
    source = {"train": [DataSource("train.jsonl", form="published")]}
    run = prepare(config(folders, tmp_path, sharer_cue="The answer is", **source))
    plain = prepare(config(folders, tmp_path, **source))
    assert len(run.train[0].sharer_ids) > len(plain.train[0].sharer_ids)
    assert run.train[0].receiver_ids == plain.train[0].receiver_ids
    run.keep({})
    assert C2CModel.from_pretrained(tmp_path / "best").aligner.cue == "The answer is"


# -- devices and order -----------------------------------------------------------------------------------------------


def test_training_stays_on_the_device_of_the_frozen_models_and_makes_no_replicas(folders, tmp_path, monkeypatch):
    """Without device_map they are on the CPU, also where there are GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    arguments = make_arguments(config(folders, tmp_path))
    assert (arguments.device.type, arguments.n_gpu, arguments.train_batch_size) == ("cpu", 1, 4)
    assert not arguments.place_model_on_device
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 3))
    with pytest.raises(ConfigError, match="batch_size 4 can't be shared by 3"):
        make_arguments(config(folders, tmp_path))


def test_the_sampler_groups_responses_of_similar_length_and_repeats_itself():
    lengths = [2] * 90 + [100] * 10
    sampler = LengthGroupedSampler(lengths, batch=4, seed=0)
    first = list(sampler)
    assert sorted(first) == list(range(100))
    batches = [[lengths[i] for i in first[start : start + 4]] for start in range(0, 100, 4)]
    assert sum(len(set(batch)) > 1 for batch in batches) <= 2
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGroupedSampler(lengths, batch=4, seed=1)) != first


# -- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "learning_rte: 1", "Did you mean 'learning_rate'"),
        (MINIMAL + "learning_rate: 2e-3", "a text in YAML"),
        (MINIMAL + "fill: later", "expected 'ahead' or 'training'"),
        ("receiver: a\ntrain: [{path: x}]\ndev: [{path: x}]", "missing keys"),
        ("receiver: a\nsharer: b\noutput_dir: c\ntrain: []\ndev: []", "at least one entry"),
        (MINIMAL + "guard_weight: -1", "guard_weight is -1"),
        (MINIMAL + "adapter_learning_rate: 0.0", "adapter_learning_rate"),
        (MINIMAL + "soft_targets: 2", "a share"),
        (MINIMAL + "soft_targets: 0.5\nfill: training", "fill: ahead"),
        (MINIMAL + "family: linear\nstart_from: d", "start_from is for fusers that are trained"),
        (MINIMAL.replace("x}", "x, kind: question, draft: 5}"), "draft is 5 for rows of kind 'question'"),
        (MINIMAL.replace("x}", "x, kind: private_question, draft: -1}"), "draft is -1"),
        (MINIMAL.replace("x}", "x, kind: private_question, draft: 5}") + "fill: training", "draft needs fill: ahead"),
        ("[1, 2]", "expected keys and values"),
        ("a: [", "not YAML"),
    ],
)
def test_config_errors_name_the_problem(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_another_family_does_not_get_the_options_of_the_files_family(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL + "family: c2c\nfuser_options: {hidden_dim: 8}")
    assert load_config(path, family="c2c").fuser_options == {"hidden_dim": 8}
    assert load_config(path, family="linear").fuser_options == {}
    control = load_config(path, family="adapter")
    assert (control.fuser_options, control.adapter_of) == ({"hidden_dim": 8}, "c2c")
    assert load_config(path, family="adapter", adapter_of="linear").adapter_of == "linear"


def test_shipped_configs_load():
    configs = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert configs
    for path in configs:
        load_config(path)


def test_rows_that_do_not_fit_are_dropped_and_counted_or_refused(ready, folders, tmp_path):
    row = multiple_choice({"id": 1, "question": "long " * 500, "choices": ["a", "b"], "answer": 1}, DataSource())
    assert build_examples(ready.objective.model, [row], 512, 16) == ([], {"prompt too long": 1})
    with pytest.raises(ConfigError, match="3 examples to train are less than one batch of 4"):
        train(config(folders, tmp_path, train=[DataSource("train.jsonl", limit=3)]))
    with pytest.raises(ConfigError, match="no examples are left"):
        train(config(folders, tmp_path, max_prompt_tokens=3))
