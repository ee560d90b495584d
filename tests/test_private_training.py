"""Training for private context, on tiny models."""

from __future__ import annotations

import json
import re
from itertools import islice

import pytest
import torch

from c2c import C2CModel
from c2c.config import ConfigError
from c2c.data.config import DataSource
from c2c.data.formats import load_rows, private_question
from c2c.data.synthetic.relay import relay
from c2c.data.synthetic.skeleton import skeleton
from c2c.fusers import MemoryFuser
from c2c.fusers.base import load_fuser
from c2c.language_model import Receiver, Sharer
from c2c.training import TrainConfig, train
from c2c.training.config import load_config
from c2c.training.drafts import with_drafts
from c2c.training.prepared import fill, prepare
from c2c.training.private import PrivateTraining, asked, build_private_examples
from c2c.training.store import PrefillStore
from c2c.training.warm_start import observe, warm_start
from tiny import build, pair_folders, tokenizer

PASSAGES = [
    "The fox sleeps in a red house by the sea.",
    "A dog and a cat went to the market, and bought three fish and a loaf of bread.",
    "Rain fell for a week.",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return pair_folders(tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passages")
    rows = [
        {
            "id": f"{i}",
            "context": PASSAGES[i % 3],
            "question": f"Who was number {i}?",
            "answer": ["fox", "dog", "rain"][i % 3],
        }
        for i in range(12)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folders, data, tmp_path, **changes) -> TrainConfig:
    source = DataSource("a.jsonl", kind="private_question")
    settings = {
        "receiver": folders[0],
        "sharer": folders[1],
        "train": [source],
        "dev": [source],
        "data_dir": str(data),
        "output_dir": str(tmp_path / "run"),
        "family": "memory",
        "fuser_options": {"rank": 8},
        "epochs": 2.0,
        "batch_size": 4,
        "warmup_steps": 0,
        "calibration": 12,
    }
    return TrainConfig(**(settings | changes))


@pytest.mark.parametrize("slots", [None, 3])
def test_a_training_batch_predicts_what_the_public_path_does(folders, data, tmp_path, slots):
    prepared = prepare(config(folders, data, tmp_path, fuser_options={"rank": 8, "slots": slots}))
    training = prepared.training.eval()
    training.fuser.config.training = {"config": "random"}
    torch.nn.init.normal_(training.fuser.weight, std=0.3)
    torch.nn.init.normal_(training.fuser.up, std=0.3)
    batch = training.collate(prepared.train[:4])
    with torch.no_grad():
        matched = training.logits(batch, "matched", width=1)[:, 0]
        alone = training.logits(batch, "none", width=1)[:, 0]
        deranged = training.logits(batch, "deranged", width=1)[:, 0]
    model = training.model
    passages = [example.row.sharer_messages for example in batch.examples]
    for row, example in enumerate(batch.examples):
        for predicted, passage in ((matched, passages[row]), (deranged, passages[(row + 1) % 4])):
            fused = model.prefill(example.row.messages, sharer_messages=passage)
            expected = model.receiver.next_logits(fused.tokens, fused.cache)[0]
            # the store keeps bfloat16
            assert float((predicted[row] - expected).norm() / expected.norm()) < 0.03
        tokens = model.receiver.encode(example.row.messages)
        expected = model.receiver.next_logits(tokens, model.receiver.prefill(tokens, tokens.length - 1))[0]
        assert float((alone[row] - expected).norm() / expected.norm()) < 0.03


def test_each_passage_is_read_once(folders, data, tmp_path):
    prepared = prepare(config(folders, data, tmp_path))
    for start in range(0, 12, 4):
        prepared.training.collate(prepared.train[start : start + 4])
    assert prepared.sharer_store.computed <= 3 + 4  # the first batch may ask for one passage several times
    assert len({tuple(example.sharer_ids) for example in prepared.train}) == 3


def test_warm_start_finds_the_receivers_own_entries():
    """With the receiver itself as the sharer the entries can be predicted without error, and are."""
    own = build("llama", 1)
    receiver, sharer = Receiver(own, tokenizer("chatml"), "r"), Sharer(own, tokenizer("chatml"), "s")
    model = C2CModel.from_models(receiver, sharer, fuser="memory", fuser_options={"rank": 8})
    rows = [private_question(row, DataSource("x")) for row in islice(relay("train", 0), 40)]
    examples, _ = build_private_examples(model, rows, 512, 64)
    training = PrivateTraining(model, *(PrefillStore(m, range(m.geometry.layers)) for m in (receiver, sharer)))
    fuser = model.fusers[0]
    assert warm_start(fuser, training, examples[:30], ridge=1e-6) > 100
    unseen = examples[35]
    _, own_entries = observe(fuser, training, unseen)
    with torch.no_grad():
        made = fuser(training.entries(training.collate([unseen])))
    found = torch.stack([torch.cat([x.transpose(1, 2).flatten(2)[0] for x in pair], dim=-1) for pair in made])
    found = found[:, : own_entries.shape[1]]  # the template after the text was not fitted
    assert float((found - own_entries).norm() / (own_entries - own_entries.mean(1, keepdim=True)).norm()) < 0.1


def test_a_run_learns_and_what_it_keeps_answers(folders, data, tmp_path):
    summary = train(config(folders, data, tmp_path, epochs=40.0, learning_rate=0.01, eval_steps=30))
    dev = summary["dev"]
    assert dev["matched"] > dev["deranged"]
    assert dev["matched"] > 60
    assert "0" in json.loads((tmp_path / "run" / "dev.json").read_text())  # the ridge map was scored first
    fuser = load_fuser(summary["fuser"])
    assert isinstance(fuser, MemoryFuser)
    model = C2CModel.from_pretrained(summary["fuser"])
    answer = model.generate("Who was it?", sharer_messages=PASSAGES[0], max_new_tokens=2)
    assert answer.report.memory_slots > 0


def test_a_stopped_run_goes_on_to_the_same_weights(folders, data, tmp_path):
    whole = train(config(folders, data, tmp_path, output_dir=str(tmp_path / "whole"), save_steps=2))
    part = config(folders, data, tmp_path, output_dir=str(tmp_path / "part"), save_steps=2)

    class Stopped(Exception):
        pass

    def stop(stage, done, total):
        if stage == "training" and done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        train(part, progress=stop)
    resumed = train(part)
    first, second = load_fuser(whole["fuser"]), load_fuser(resumed["fuser"])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_reconstruction_learns_the_passage(folders, data, tmp_path):
    prepared = prepare(config(folders, data, tmp_path))
    example = prepared.train[0].reconstructing()
    words = prepared.training.model.receiver.tokenizer
    assert words.decode(example.response_ids).strip() == example.row.sharer_messages[-1]["content"]
    prepared.training.reconstructing = True
    assert float(prepared.training(prepared.train[:4])["loss"].detach()) > 0


def test_guard(folders, data, tmp_path):
    prepared = prepare(config(folders, data, tmp_path, guard_weight=1.0))
    examples = prepared.train[:4]
    with_guard = float(prepared.training(examples)["loss"].detach())
    prepared.training.guard_weight = 0.0
    assert with_guard >= float(prepared.training(examples)["loss"].detach())


def test_rows_without_private_context_are_dropped_and_counted(folders, data, tmp_path):
    shared = DataSource("a.jsonl", kind="context_question")
    with pytest.raises(ConfigError, match="no examples are left"):
        prepare(config(folders, data, tmp_path, train=[shared]))


def test_relay_rows():
    made = [DataSource(synthetic=name, kind="private_question", limit=50) for name in ("relay", "relay_test")]
    train_rows, test_rows = (load_rows([source], ".", 0)[0] for source in made)
    assert len(train_rows) == len(test_rows) == 50
    assert not {row.response for row in train_rows} & {row.response for row in test_rows}
    for row in (*train_rows, *test_rows):
        assert row.response in row.sharer_messages[-1]["content"]
        assert row.response not in row.messages[-1]["content"]
    assert load_rows([made[0]], ".", 0)[0] == train_rows
    assert load_rows([made[0]], ".", 1)[0] != train_rows
    with pytest.raises(ConfigError, match="how many rows"):
        load_rows([DataSource(synthetic="relay", kind="private_question")], ".", 0)


def test_skeleton_rows():
    """Which element a text belongs into stands in the page alone, and those of the test are not asked in training."""
    made = [DataSource(synthetic=name, kind="private_question", limit=80) for name in ("skeleton", "skeleton_test")]
    openings = []
    for rows in (load_rows([source], ".", 0)[0] for source in made):
        openings.append({row.response.split(">")[0] for row in rows})
        for row in rows:
            opening, rest = row.response.split(">", 1)
            assert row.sharer_messages[-1]["content"].count(opening) == 1
            assert opening not in row.messages[-1]["content"]
            assert row.messages[-1]["content"].endswith(rest.split("<")[0])
    assert not openings[0] & openings[1]


def test_a_skeleton_names_the_topic_before_its_element():
    """The sharer's cache of an element's tokens has read only what stands before them."""
    for row in islice(skeleton("train", 0), 40):
        topic = re.search(r"for the (.+?), with this text", row["question"])[1]
        opening = row["answer"].split(">")[0] + ">"
        assert f"<!-- {topic} --> {opening}</" in row["context"]
        assert row["context"].count(f"<!-- {topic} -->") == 1


def test_channels_of_padding_do_not_matter(folders, data, tmp_path):
    """A row's loss is the same alone and in a batch of longer passages."""
    training = prepare(config(folders, data, tmp_path)).training.eval()
    torch.nn.init.normal_(training.fuser.weight, std=0.3)
    examples = prepare(config(folders, data, tmp_path)).train[:5]
    with torch.no_grad():
        together = training.losses(training.collate(examples), "matched")
        for row, example in enumerate(examples):
            alone = training.losses(training.collate([example]), "matched")
            torch.testing.assert_close(together[row], alone[0], rtol=1e-3, atol=1e-3)


def test_a_draft_is_what_the_asked_sharer_hands_over(folders, data, tmp_path):
    source = DataSource("a.jsonl", kind="private_question", draft=5)
    run = config(folders, data, tmp_path, train=[source], dev=[source], store_dir=str(tmp_path / "store"))
    prepared = prepare(run)
    before = {example.row.id: example for example in prepared.train}
    fill(prepared)
    model = C2CModel.from_models(*folders, fuser="memory", fuser_options={"rank": 8})
    for example in [*prepared.train, *prepared.dev]:
        handoff = model.sharers[0].read(asked(example.row), draft_tokens=5)
        assert example.sharer_ids == handoff.ids.tolist()
        assert example.kept == handoff.kept.tolist()
        old = before[example.row.id]
        assert example.sharer_ids[: len(old.sharer_ids)] == old.sharer_ids
        assert 1 <= len(example.sharer_ids) - len(old.sharer_ids) <= 5
        assert example.receiver_ids == old.receiver_ids, "the receiver reads the question alone"


@pytest.mark.parametrize("ends", [False, True])
def test_what_writing_a_draft_leaves_is_not_read_again(folders, data, tmp_path, ends):
    source = DataSource("a.jsonl", kind="private_question", draft=5)
    prepared = prepare(config(folders, data, tmp_path, train=[source], dev=[source]))
    store, sharer = prepared.sharer_store, prepared.training.model.sharers[0]
    if ends:  # some drafts shall end before the others
        handoff = sharer.read(asked(prepared.train[0].row), draft_tokens=3)
        sharer.model.generation_config.eos_token_id = int(handoff.ids[-2])
    drafted = [example.sharer_ids for example in with_drafts(prepared.train, prepared.training)]
    counts = {len(new) - len(old.sharer_ids) for new, old in zip(drafted, prepared.train, strict=True)}
    assert min(counts) < 5 if ends else counts == {5}
    assert all(ids in store for ids in drafted)
    fresh = PrefillStore(sharer, store.kept)
    for kept, read in zip(store.get(drafted), fresh.get(drafted), strict=True):
        for layer in store.kept:
            for ours, theirs in zip(kept.layers[layer], read.layers[layer], strict=True):
                torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.02)
    assert store.computed == 0


def test_drafts_are_written_once(folders, data, tmp_path, monkeypatch):
    source = DataSource("a.jsonl", kind="private_question", draft=5)
    run = config(folders, data, tmp_path, train=[source], dev=[source], store_dir=str(tmp_path / "store"))
    first = prepare(run)
    fill(first)
    assert "number 3?" in str(asked(next(e.row for e in first.train if e.row.id == "3")))
    monkeypatch.setattr("c2c.training.drafts.write_drafts", None)  # it would fail if it were called
    again = prepare(run)
    fill(again)
    assert [example.sharer_ids for example in again.train] == [example.sharer_ids for example in first.train]


def test_a_run_with_drafts_learns(folders, data, tmp_path):
    sources = [DataSource("a.jsonl", kind="private_question", draft=5), DataSource("a.jsonl", kind="private_question")]
    summary = train(config(folders, data, tmp_path, train=sources, dev=sources[:1], learning_rate=1e-2, epochs=6.0))
    scores = json.loads((tmp_path / "run" / "dev.json").read_text())
    assert summary["dev"]["value"] > scores["0"]["value"]


def test_impossible_drafts_are_refused(folders, data, tmp_path):
    with pytest.raises(ConfigError, match="draft is 5 for rows of kind 'question'"):
        DataSource("a.jsonl", kind="question", draft=5)
    with pytest.raises(ConfigError, match="draft is -1"):
        DataSource("a.jsonl", kind="private_question", draft=-1)
    path = tmp_path / "config.yaml"
    source = "[{path: a.jsonl, kind: private_question, draft: 5}]"
    path.write_text(f"receiver: a\nsharer: b\noutput_dir: c\nfill: training\ntrain: {source}\ndev: {source}")
    with pytest.raises(ConfigError, match="draft needs fill: ahead"):
        load_config(path)
