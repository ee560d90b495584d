"""Training on tiny models: the store, the step, selection, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from c2c import C2CModel, kv_cache
from c2c.alignment.base import derange_columns
from c2c.config import ConfigError
from c2c.data.config import DataSource
from c2c.data.formats import load_rows, multiple_choice, questions
from c2c.errors import CacheError, FuserError, ModelLoadError
from c2c.fusers.base import fuser_hash
from c2c.language_model import Receiver
from c2c.prompting import RenderOptions
from c2c.training.config import TrainConfig, load_config
from c2c.training.examples import build_examples
from c2c.training.order import GroupedOrder
from c2c.training.prepared import fill, prepare
from c2c.training.run import train
from c2c.training.selection import DevSet
from c2c.training.step import FuserTraining
from c2c.training.store import PrefillStore
from tiny import pair_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny receiver and sharer, and a folder with questions whose answer only the words give away."""
    made = pair_folders(tmp_path_factory.mktemp)
    data = tmp_path_factory.mktemp("data")
    words = ["fox", "dog", "sun", "sea"]
    for split, start, count in (("train", 0, 24), ("dev", 100, 6), ("test", 3, 2)):
        rows = [
            {"id": str(i), "question": f"Which is number {i}?", "choices": words, "answer": i % 4}
            for i in range(start, start + count)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made[0], made[1], str(data)


def config(folders, output, **changes) -> TrainConfig:
    receiver, sharer, data = folders
    values = {
        "receiver": receiver,
        "sharer": sharer,
        "data_dir": data,
        "train": [DataSource("train.jsonl")],
        "dev": [DataSource("dev.jsonl")],
        "output_dir": str(output),
        "fuser_options": {"rank": 8},
        "max_steps": 6,
        "batch_size": 4,
        "eval_steps": 2,
        "calibration": 8,
    }
    return TrainConfig(**(values | changes))


def open_fuser(model: C2CModel) -> None:
    torch.nn.init.normal_(model.fusers[0].up, std=0.5, generator=torch.Generator().manual_seed(1))


def test_loss_from_stored_caches_equals_the_loss_through_the_public_path(folders, tmp_path):
    prepared = prepare(config(folders, tmp_path))
    model, training = prepared.training.model, prepared.training
    open_fuser(model)
    example = prepared.train[0]
    stored = float(training.token_losses(training.collate([example]), "matched")[0, 0].detach())
    fused = model.prefill(example.row.messages, options=RenderOptions(answer_prefix=example.row.answer_prefix))
    logits = model.receiver.next_logits(fused.tokens, fused.cache)
    direct = float(torch.nn.functional.cross_entropy(logits, torch.tensor(example.response_ids[:1])))
    assert stored == pytest.approx(direct, abs=0.02)  # the store keeps bfloat16


def test_a_batch_has_the_losses_of_its_examples(folders, tmp_path):
    prepared = prepare(config(folders, tmp_path))
    training = prepared.training
    open_fuser(training.model)
    together = training.losses(training.collate(prepared.train[:4]), "matched")
    alone = torch.cat([training.losses(training.collate([e]), "matched") for e in prepared.train[:4]])
    assert torch.allclose(together, alone, atol=1e-4)


def test_gradients_reach_the_fuser_and_nothing_else(folders, tmp_path):
    prepared = prepare(config(folders, tmp_path))
    training = prepared.training
    training(prepared.train[:4])["loss"].backward()
    assert training.fuser.up.grad.abs().sum() > 0
    model = training.model
    assert all(p.grad is None for m in (model.receiver, model.sharers[0]) for p in m.model.parameters())
    assert {id(p) for p in training.parameters()} == {id(p) for p in training.fuser.parameters()}


def test_the_stored_caches_are_not_changed_by_a_step(folders, tmp_path):
    prepared = prepare(config(folders, tmp_path))
    training = prepared.training
    open_fuser(training.model)
    batch = training.collate(prepared.train[:4])
    before = [keys.clone() for keys, _ in kv_cache.layers(batch.receiver_cache)]
    for message in ("matched", "deranged", "zero", "none"):
        with torch.no_grad():
            training.losses(batch, message)
    assert all(torch.equal(a, b) for a, (b, _) in zip(before, kv_cache.layers(batch.receiver_cache), strict=True))


def test_messages_differ_and_none_is_the_receiver_alone(folders, tmp_path):
    prepared = prepare(config(folders, tmp_path))
    training = prepared.training
    open_fuser(training.model)
    batch = training.collate(prepared.train[:4])
    with torch.no_grad():
        logits = {m: training.logits(batch, m) for m in ("matched", "deranged", "zero", "none")}
        torch.nn.init.zeros_(training.fuser.up)
        assert torch.equal(training.logits(batch, "matched"), logits["none"])
    assert not torch.allclose(logits["matched"], logits["deranged"])
    assert not torch.allclose(logits["matched"], logits["zero"])


def test_guard_adds_what_a_wrong_message_gains_over_the_receiver(folders, tmp_path):
    prepared = prepare(config(folders, tmp_path, guard_weight=2.0))
    training = prepared.training
    open_fuser(training.model)
    batch = training.collate(prepared.train[:4])
    with torch.no_grad():
        gained = torch.relu(training.losses(batch, "none") - training.losses(batch, "deranged")).mean()
        expected = training.losses(batch, "matched").mean() + 2.0 * gained
        assert torch.allclose(training(prepared.train[:4])["loss"], expected)


def test_deranged_columns_keep_order_and_the_last_position():
    assert derange_columns([0, 1, 2, 3, 9, 9], [5, 6, 20, 20, 20]) == [5, 5, 6, 6, 20, 20]
    assert derange_columns([0, 0, 0], [4, 7]) == [7, 7, 7]


@pytest.mark.parametrize("on_disk", [False, True])
def test_store_computes_each_prompt_once(folders, tmp_path, on_disk):
    model = C2CModel.from_models(folders[0], folders[1])
    folder = tmp_path if on_disk else None
    store = PrefillStore(model.receiver, [0, 2], folder=folder, batch=2)
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7, 8, 9]]
    assert sum(store.fill(prompts)) == 3
    first = store.get(prompts)
    assert store.computed == 3
    assert set(first[0].layers) == {0, 2}
    if on_disk:
        again = PrefillStore(model.receiver, [0, 2], folder=folder)
        second = again.get(prompts)
        assert again.computed == 0
        assert all(torch.equal(a.layers[0][0], b.layers[0][0]) for a, b in zip(first, second, strict=True))


def test_store_entries_are_the_models_own_prefill(folders):
    model = C2CModel.from_models(folders[0], folders[1])
    store = PrefillStore(model.receiver, range(model.receiver.geometry.layers), batch=2)
    entries = store.get([[5, 6, 7], [8, 9]])
    for ids, entry in zip([[5, 6, 7], [8, 9]], entries, strict=True):
        from c2c.tokens import left_pad

        own = model.receiver.prefill(left_pad([ids], 0))
        for layer, (keys, values) in enumerate(kv_cache.layers(own)):
            assert torch.allclose(entry.layers[layer][0].float(), keys, atol=0.02)
            assert torch.allclose(entry.layers[layer][1].float(), values, atol=0.02)


def test_a_stale_entry_is_impossible(folders, tmp_path):
    """Other weights under the same path, or other layers, are not found in the old store."""
    model = C2CModel.from_models(folders[0], folders[1])
    list(PrefillStore(model.receiver, [0], folder=tmp_path).fill([[5, 6]]))
    assert [5, 6] not in PrefillStore(model.receiver, [0, 1], folder=tmp_path)
    changed = C2CModel.from_models(folders[0], folders[1])
    with torch.no_grad():
        for parameter in changed.receiver.model.parameters():
            parameter.mul_(1.5)
    other = Receiver(changed.receiver.model, changed.receiver.tokenizer, name=model.receiver.name)
    assert [5, 6] not in PrefillStore(other, [0], folder=tmp_path)
    assert [5, 6] in PrefillStore(model.receiver, [0], folder=tmp_path)


def test_store_keeps_to_its_budget(folders):
    model = C2CModel.from_models(folders[0], folders[1])
    store = PrefillStore(model.receiver, range(3), budget=1)
    assert len(store.get([[5, 6]])) == 1
    assert store.used == 0
    store.get([[5, 6]])
    assert store.computed == 2


def test_train_chooses_on_dev_and_writes_a_fuser_that_loads(folders, tmp_path):
    summary = train(config(folders, tmp_path / "run"))
    scores = json.loads((tmp_path / "run" / "dev.json").read_text())
    assert set(scores) == {"2", "4", "6"}
    assert summary["dev"]["value"] == max(entry["value"] for entry in scores.values())
    model = C2CModel.from_pretrained(summary["fuser"])
    assert model.trained
    assert model.fusers[0].config.training["step"] == summary["step"]
    assert model.generate("Which is number 3?", max_new_tokens=2).report.trained


def test_a_trained_fuser_is_trained_on(folders, tmp_path):
    first = train(config(folders, tmp_path / "first"))
    run = config(folders, tmp_path / "second", start_from=first["fuser"], learning_rate=0.0, max_steps=2)
    second = train(run)
    scores = json.loads((tmp_path / "second" / "dev.json").read_text())
    assert scores["0"] == first["dev"], "it is what training must beat"
    kept = C2CModel.from_pretrained(second["fuser"]).fusers[0]
    assert kept.config.training["started_from"] == fuser_hash(first["fuser"])
    assert kept.config.training["step"] == 0
    before = C2CModel.from_pretrained(first["fuser"]).fusers[0]
    for (name, a), (_, b) in zip(before.named_parameters(), kept.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_fuser_of_another_family_or_pair_is_not_trained_on(folders, tmp_path):
    first = train(config(folders, tmp_path / "first"))
    other = config(folders, tmp_path / "second", start_from=first["fuser"], family="c2c", fuser_options={})
    with pytest.raises(ConfigError, match="holds bottleneck; expected one fuser of family 'c2c'"):
        train(other)
    with pytest.raises(FuserError):
        train(config((folders[1], folders[0], folders[2]), tmp_path / "third", start_from=first["fuser"]))
    with pytest.raises(ModelLoadError, match="nowhere"):
        train(config(folders, tmp_path / "fourth", start_from="nowhere/at/all"))


def test_a_run_that_was_stopped_gives_the_result_of_one_that_was_not(folders, tmp_path):
    train(config(folders, tmp_path / "whole", save_steps=2))
    half = config(folders, tmp_path / "parts", save_steps=2)

    class Killed(Exception):
        pass

    def kill(*arguments, **kwargs):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        from c2c.training import trainer

        original = trainer.Selection.on_step_end

        def stop_at_5(self, args, state, control, **kwargs):
            original(self, args, state, control, **kwargs)
            if state.global_step == 5:
                kill()

        patch.setattr(trainer.Selection, "on_step_end", stop_at_5)
        with pytest.raises(Killed):
            train(half)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("c2c.training.run.calibrate", kill)  # it may take long, and the checkpoint has what it found
        train(half)
    weights = [
        C2CModel.from_pretrained(tmp_path / name / "checkpoint-6", receiver=folders[0], sharer=folders[1]).fusers[0]
        for name in ("whole", "parts")
    ]
    for (name, a), (_, b) in zip(weights[0].named_parameters(), weights[1].named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_score_counts_every_example_once(folders, tmp_path):
    prepared = prepare(config(folders, tmp_path))
    whole = DevSet(prepared.dev, batch_size=6).score(prepared.training)
    parts = DevSet(prepared.dev[:5], batch_size=4).score(prepared.training)
    assert whole.n == 6
    assert parts.n == 5
    assert 0 <= parts.matched <= 100
    assert whole.matched == whole.receiver  # untrained


def test_questions_of_excluded_files_are_dropped_and_counted(folders):
    data = Path(folders[2])
    rows, dropped = load_rows([DataSource("train.jsonl")], data, 0, questions([data / "test.jsonl"]))
    assert len(rows) == 22
    assert sum(dropped.values()) == 2


def test_long_prompts_are_dropped_and_counted(folders, tmp_path):
    prepared = prepare(config(folders, tmp_path))
    model = prepared.training.model
    row = multiple_choice({"id": 1, "question": "long " * 500, "choices": ["a", "b"], "answer": 1}, DataSource())
    examples, dropped = build_examples(model, [row], 512, 16)
    assert examples == []
    assert dropped == {"prompt too long": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "receiver: a\nsharer: b\noutput_dir: c\ntrain: [{path: x}]\ndev: [{path: x}]\nlearning_rte: 1",
            "learning_rte",
        ),
        ("receiver: a\ntrain: [{path: x}]\ndev: [{path: x}]", "missing keys"),
        ("receiver: a\nsharer: b\noutput_dir: c\ntrain: []\ndev: []", "at least one entry"),
        (
            "receiver: a\nsharer: b\noutput_dir: c\ntrain: [{path: x}]\ndev: [{path: x}]\nguard_weight: -1",
            "guard_weight is -1",
        ),
        (
            "receiver: a\nsharer: b\noutput_dir: c\ntrain: [{path: x}]\ndev: [{path: x}]\n"
            "family: linear\nstart_from: d",
            "start_from is for fusers that are trained",
        ),
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
    path.write_text(
        "receiver: a\nsharer: b\noutput_dir: c\ntrain: [{path: x}]\ndev: [{path: x}]\n"
        "family: bottleneck\nfuser_options: {rank: 8}"
    )
    assert load_config(path).fuser_options == {"rank": 8}
    assert load_config(path, family="bottleneck").fuser_options == {"rank": 8}
    assert load_config(path, family="adapter").fuser_options == {"rank": 8}  # the size to match
    assert load_config(path, family="linear").fuser_options == {}


def test_soft_targets_are_the_sharers_centred_answers(folders, tmp_path):
    run = config(folders, tmp_path, soft_targets=0.5, soft_temperature=1.0, store_dir=str(tmp_path / "store"))
    prepared = prepare(run)
    model = prepared.training.model
    rows = [example.row for example in prepared.train]
    sharer = model.sharers[0]
    raw = []
    for row in rows:
        tokens = sharer.encode(row.messages, RenderOptions(answer_prefix=row.answer_prefix))
        ids = [sharer.tokenizer.encode(choice, add_special_tokens=False)[0] for choice in row.choices]
        raw.append(sharer.next_logits(tokens, sharer.prefill(tokens, tokens.length - 1))[0, ids].log_softmax(-1))
    table = torch.stack(raw)
    expected = ((table - table.mean(0)) / (table - table.mean(0)).std()).softmax(-1)
    fill(prepared)
    assert sharer.released
    found = torch.tensor([example.beliefs for example in prepared.train])
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)  # the store keeps bfloat16
    assert not any(example.beliefs for example in prepared.dev)
    again = prepare(run)
    fill(again)  # read back, since the weights are not asked again
    assert [example.beliefs for example in again.train] == [example.beliefs for example in prepared.train]


def test_a_cue_goes_with_the_fuser(folders, tmp_path):
    run = config(folders, tmp_path, train=[DataSource("train.jsonl", form="published")], sharer_cue="The answer is")
    prepared = prepare(run)
    plain = prepare(config(folders, tmp_path, train=[DataSource("train.jsonl", form="published")]))
    assert len(prepared.train[0].sharer_ids) > len(plain.train[0].sharer_ids)
    assert prepared.train[0].receiver_ids == plain.train[0].receiver_ids
    prepared.keep(tmp_path, {})
    assert C2CModel.from_pretrained(tmp_path / "best").aligner.cue == "The answer is"


def test_soft_targets_mix_with_the_right_answer(folders, tmp_path):
    prepared = prepare(config(folders, tmp_path, soft_targets=0.25))
    fill(prepared)
    training, examples = prepared.training, prepared.train[:3]
    open_fuser(training.model)
    batch = training.collate(examples)
    mixed = training.losses(batch, "matched")
    training.soft_targets = 0.0
    hard = training.losses(batch, "matched")
    logits = training.logits(batch, "matched")
    for row, example in enumerate(examples):
        scores = logits[row, example.decisive].log_softmax(-1)[example.choice_ids]
        right, soft = -scores[example.row.answer], -(torch.tensor(example.beliefs) * scores).sum()
        torch.testing.assert_close(mixed[row], hard[row] + 0.25 * (soft - right))


def test_impossible_soft_targets_are_refused(tmp_path):
    text = "receiver: a\nsharer: b\noutput_dir: c\ntrain: [{path: x}]\ndev: [{path: x}]\n"
    for more, message in (("soft_targets: 2", "a share"), ("soft_targets: 0.5\nfill: training", "fill: ahead")):
        (tmp_path / "a.yaml").write_text(text + more)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / "a.yaml")


def test_shipped_configs_load():
    configs = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert configs
    for path in configs:
        load_config(path)


def test_missing_data_file_says_where_paths_start(folders, tmp_path):
    with pytest.raises(ConfigError, match="data_dir"):
        prepare(config(folders, tmp_path, train=[DataSource("nothing.jsonl")]))


def test_fuser_training_is_what_the_trainer_saves(folders, tmp_path):
    training = prepare(config(folders, tmp_path)).training
    assert isinstance(training, FuserTraining)
    assert all(name.startswith("fuser.") for name in training.state_dict())


def test_dev_scores_and_loss_go_to_tensorboard(folders, tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(config(folders, tmp_path / "run", report_to="tensorboard", logging_steps=1))
    events = reader.EventAccumulator(str(tmp_path / "board")).Reload()
    tags = events.Tags()["scalars"]
    assert "train/loss" in tags
    assert {"train/dev_matched", "train/dev_P"} <= set(tags)
    assert len(events.Scalars("train/loss")) == 6


def test_filling_while_training_gives_the_same_fuser(folders, tmp_path):
    ahead = train(config(folders, tmp_path / "ahead"))
    along = train(config(folders, tmp_path / "along", fill="training"))
    assert along["dev"] == pytest.approx(ahead["dev"], rel=1e-4)


def test_reconstruction_learns_to_repeat_the_message_first(folders, tmp_path):
    prepared = prepare(config(folders, tmp_path))
    training = prepared.training
    open_fuser(training.model)
    example = prepared.train[0]
    words = training.model.receiver.tokenizer
    assert words.decode(example.passage_ids) == example.row.messages[-1]["content"]
    repeated = training.token_losses(training.collate([example.reconstructing()]), "matched")
    assert repeated.shape == (1, len(example.passage_ids))
    training.reconstructing = True
    assert float(training([example])["loss"].detach()) == pytest.approx(float(repeated.mean().detach()), rel=1e-4)


def test_reconstruction_ends_after_its_steps(folders, tmp_path):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = FuserTraining.forward

        def note(self, examples):
            seen.append(self.reconstructing)
            return original(self, examples)

        patch.setattr(FuserTraining, "forward", note)
        train(config(folders, tmp_path, reconstruction_steps=2, max_steps=4))
    assert seen == [True, True, False, False]


def test_the_published_fuser_follows_its_temperature_schedule(folders, tmp_path):
    summary = train(
        config(
            folders,
            tmp_path,
            family="c2c",
            fuser_options={"hidden_dim": 16, "intermediate_dim": 16},
            layer_map="terminal",
            max_steps=4,
            eval_steps=2,
        )
    )
    last = json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())
    assert last["anneal_steps"] == 4
    assert last["gate_temperature"] == pytest.approx(0.001 ** (3 / 4))
    assert summary["dev"]["n"] == 6


def test_a_batch_that_processes_cannot_share_is_refused(folders, tmp_path):
    from c2c.training import trainer

    class Arguments:
        world_size, process_index = 3, 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "TrainingArguments", lambda **kwargs: Arguments())
        with pytest.raises(ConfigError, match="batch_size 4 can't be shared by 3"):
            train(config(folders, tmp_path))


def test_fewer_examples_than_a_batch_are_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="3 examples to train are less than one batch of 4"):
        train(config(folders, tmp_path, train=[DataSource("train.jsonl", limit=3)]))


def test_a_linear_fuser_is_solved_for_and_its_blend_chosen(folders, tmp_path):
    summary = train(config(folders, tmp_path, family="linear", fuser_options={"ridge": 0.1}, linear_weight="attention"))
    model = C2CModel.from_pretrained(summary["fuser"])
    record = model.fusers[0].config.training
    assert model.trained
    assert float(model.fusers[0].gates().max()) == pytest.approx(summary["blend"])
    assert len(record["blends"]) == 10
    assert summary["dev"]["value"] == max(record["blends"].values())


def test_stored_caches_stay_clean_with_a_fuser_that_needs_no_gradient(folders, tmp_path):
    prepared = prepare(config(folders, tmp_path))
    training = prepared.training
    open_fuser(training.model)
    training.fuser.requires_grad_(False)
    batch = training.collate(prepared.train[:4])
    before = [keys.clone() for keys, _ in kv_cache.layers(batch.receiver_cache)]
    training.losses(batch, "matched")
    assert all(torch.equal(a, b) for a, (b, _) in zip(before, kv_cache.layers(batch.receiver_cache), strict=True))


def test_order_groups_responses_of_similar_length_and_repeats_itself():
    lengths = [2] * 90 + [100] * 10
    order = GroupedOrder(lengths, batch=4, seed=0)
    first = list(order)
    assert sorted(first) == list(range(100))
    batches = [[lengths[i] for i in first[start : start + 4]] for start in range(0, 100, 4)]
    assert sum(len(set(batch)) > 1 for batch in batches) <= 2
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    assert list(GroupedOrder(lengths, batch=4, seed=1)) != first


def test_every_epoch_has_its_own_order_also_after_a_resume(folders, tmp_path):
    seen = {"whole": [], "parts": []}

    def note(name):
        original = FuserTraining.forward

        def forward(self, examples):
            seen[name].append([example.row.id for example in examples])
            return original(self, examples)

        return forward

    for name, stops in (("whole", [12]), ("parts", [8, 12])):
        for steps in stops:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(FuserTraining, "forward", note(name))
                train(config(folders, tmp_path / name, max_steps=steps, save_steps=4))
    assert seen["parts"] == seen["whole"]
    assert seen["whole"][:6] != seen["whole"][6:]


def test_the_sharer_is_given_back_once_its_prefills_are_stored(folders, tmp_path):
    prepared = prepare(config(folders, tmp_path))
    before = float(prepared.training(prepared.train[:4])["loss"].detach())
    fill(prepared)
    sharer = prepared.training.model.sharers[0]
    assert sum(parameter.numel() for parameter in sharer.model.parameters()) == 0
    after = float(prepared.training(prepared.train[:4])["loss"].detach())
    assert after == pytest.approx(before, rel=1e-4)
    with pytest.raises(CacheError, match="were given back"):
        prepared.sharer_store.get([[1, 2, 3]])


def test_a_budget_that_does_not_hold_all_keeps_the_sharer(folders, tmp_path):
    prepared = prepare(config(folders, tmp_path, store_budget_gb=1e-6))
    fill(prepared)
    assert not prepared.training.model.sharers[0].released
    prepared.training(prepared.train[:4])
