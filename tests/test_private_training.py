"""Training for private context, on tiny models."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch

from c2c import C2CModel
from c2c.config import ConfigError
from c2c.data.config import DataSource
from c2c.data.formats import private_question
from c2c.data.prompts import passage_with_question
from c2c.data.synthetic import relay
from c2c.fusers import MemoryFuser
from c2c.fusers.base import load_fuser
from c2c.language_model import Receiver
from c2c.sharer import Sharer
from c2c.training import train
from c2c.training.examples import build_examples
from c2c.training.prefill_store import PrefillStore
from c2c.training.private_context import PrivateContextObjective
from c2c.training.run import fill, prepare
from c2c.training.sharer_outputs import with_drafts
from tiny import build, tokenizer
from training_rig import PASSAGES, Stopped, make_folders, open_fuser, private_config, stop_at

DRAFTED = DataSource("private.jsonl", kind="private_question", draft=5)
DRAFTS = {"train": [DRAFTED], "dev": [DRAFTED]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp)


def apart(one, other) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("slots", [None, 3])
def test_a_training_batch_predicts_what_the_public_path_does(folders, tmp_path, slots):
    run = prepare(private_config(folders, tmp_path, fuser_options={"rank": 8, "slots": slots}))
    objective, model = run.objective.eval(), run.objective.model
    objective.fuser.config.training = {"config": "random"}
    open_fuser(run)
    batch = objective.collate(run.train[:4])
    with torch.no_grad():
        found = {m: objective.logits(batch, m)[:, 0] for m in ("matched", "deranged", "zero", "none")}
    passages = [example.row.sharer_messages for example in batch.examples]
    for row, example in enumerate(batch.examples):
        for message, passage in (("matched", passages[row]), ("deranged", passages[(row + 1) % 4])):
            fused = model.prefill(example.row.messages, sharer_messages=passage)
            expected = model.receiver.next_logits(fused.tokens, fused.cache)[0]
            assert apart(found[message][row], expected) < 0.03  # the store keeps bfloat16
        tokens = model.receiver.encode(example.row.messages)
        expected = model.receiver.next_logits(tokens, model.receiver.prefill(tokens, tokens.length - 1))[0]
        assert apart(found["none"][row], expected) < 0.03
    assert apart(found["zero"], found["matched"]) > 0.03


def test_a_fuser_without_slots_hands_nothing_over(folders, tmp_path):
    run = prepare(private_config(folders, tmp_path, fuser_options={"rank": 8, "slots": 0}))
    batch = run.objective.collate(run.train[:2])
    with torch.no_grad():
        assert torch.equal(run.objective.logits(batch, "matched"), run.objective.logits(batch, "none"))


def test_each_passage_is_read_once(folders, tmp_path):
    run = prepare(private_config(folders, tmp_path))
    run.objective.collate(run.train)
    assert run.objective.sharer_store.computed == 3


def test_the_initial_map_finds_the_receivers_own_entries():
    """With the receiver itself as the sharer the entries can be predicted without error, and are."""
    own = build("llama", 1)
    receiver, sharer = Receiver(own, tokenizer("chatml"), "r"), Sharer(own, tokenizer("chatml"), "s")
    model = C2CModel.from_models(receiver, sharer, fuser="memory", fuser_options={"rank": 8})
    rows = [private_question(row, DataSource("x")) for row in islice(relay("train", 0), 40)]
    examples, _ = build_examples(model, rows, 512, 64)
    objective = PrivateContextObjective(model, *(PrefillStore(m, range(m.geometry.layers)) for m in (receiver, sharer)))
    assert model.fusers[0].initialise_from_data(objective.observe(examples[:30]))
    [unseen] = objective.observe([examples[35]])
    with torch.no_grad():
        made = model.fusers[0](unseen.sharer)
    found = torch.stack([torch.cat([x.transpose(1, 2).flatten(2)[0] for x in pair], dim=-1) for pair in made])
    expected = unseen.receiver.channels()
    assert float((found - expected).norm() / (expected - expected.mean(1, keepdim=True)).norm()) < 0.2


def test_a_run_learns_and_what_it_keeps_answers(folders, tmp_path):
    changes = {"epochs": 40.0, "learning_rate": 0.01, "eval_steps": 30}
    summary = train(private_config(folders, tmp_path, **changes))
    dev = summary["dev"]
    assert dev["matched"] > dev["deranged"]
    assert dev["matched"] > 60
    assert "0" in json.loads((tmp_path / "dev.json").read_text()), "the ridge map was scored first"
    assert isinstance(load_fuser(summary["fuser"]), MemoryFuser)
    model = C2CModel.from_pretrained(summary["fuser"])
    answer = model.generate("Who was it?", sharer_messages=PASSAGES[0], max_new_tokens=2)
    assert answer.report.memory_slots > 0


def test_a_stopped_run_goes_on_to_the_same_weights(folders, tmp_path):
    whole = train(private_config(folders, tmp_path / "whole", save_steps=2))
    part = private_config(folders, tmp_path / "part", save_steps=2)
    with pytest.raises(Stopped):
        train(part, progress=stop_at(3))
    first, second = load_fuser(whole["fuser"]), load_fuser(train(part)["fuser"])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_rows_without_private_context_are_dropped_and_counted(folders, tmp_path):
    with pytest.raises(ConfigError, match="no examples are left"):
        prepare(private_config(folders, tmp_path, train=[DataSource("private.jsonl", kind="context_question")]))


# -- drafts ----------------------------------------------------------------------------------------------------------


def test_a_draft_is_what_the_sharer_hands_over_and_is_written_once(folders, tmp_path, monkeypatch):
    settings = private_config(folders, tmp_path, store_dir=str(tmp_path / "store"), **DRAFTS)
    run = prepare(settings)
    before = {example.row.id: example for example in run.train}
    fill(run)
    model = C2CModel.from_models(*folders[:2], fuser="memory", fuser_options={"rank": 8})
    for example in [*run.train, *run.dev]:
        handoff = model.sharers[0].read(passage_with_question(example.row), draft_tokens=5)
        assert example.sharer_ids == handoff.ids.tolist()
        assert example.kept == handoff.kept.tolist()
        old = before[example.row.id]
        assert example.sharer_ids[: len(old.sharer_ids)] == old.sharer_ids
        assert 1 <= len(example.sharer_ids) - len(old.sharer_ids) <= 5
        assert example.receiver_ids == old.receiver_ids, "the receiver reads the question alone"
        assert example.row.question in str(passage_with_question(example.row))
    monkeypatch.setattr("c2c.training.sharer_outputs.generate_drafts", None)  # it would fail if it were called
    again = prepare(settings)
    fill(again)
    assert [example.sharer_ids for example in again.train] == [example.sharer_ids for example in run.train]


@pytest.mark.parametrize("ends", [False, True])
def test_the_cache_of_a_draft_is_stored_and_not_computed_again(folders, tmp_path, ends):
    run = prepare(private_config(folders, tmp_path, **DRAFTS))
    store, sharer = run.objective.sharer_store, run.objective.model.sharers[0]
    if ends:  # some drafts end before the others
        handoff = sharer.read(passage_with_question(run.train[0].row), draft_tokens=3)
        sharer.model.generation_config.eos_token_id = int(handoff.ids[-2])
    drafted = [example.sharer_ids for example in with_drafts(run.train, sharer, store)]
    counts = {len(new) - len(old.sharer_ids) for new, old in zip(drafted, run.train, strict=True)}
    assert min(counts) < 5 if ends else counts == {5}
    fresh = PrefillStore(sharer, store.kept)
    for kept, read in zip(store.get(drafted), fresh.get(drafted), strict=True):
        for layer in store.kept:
            for ours, theirs in zip(kept.layers[layer], read.layers[layer], strict=True):
                torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.02)
    assert store.computed == 0


def test_a_run_with_drafts_learns(folders, tmp_path):
    sources = {"train": [DRAFTED, replace(DRAFTED, draft=0)], "dev": [DRAFTED]}
    summary = train(private_config(folders, tmp_path, learning_rate=1e-2, epochs=6.0, **sources))
    assert summary["dev"]["value"] > json.loads((tmp_path / "dev.json").read_text())["0"]["value"]
