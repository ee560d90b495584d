"""Analyses on tiny models: what they compute, what they refuse, and the files that they write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from c2c import C2CModel, kv_cache
from c2c.analysis.ablations import (
    FRACTIONS,
    measure_layers,
    measure_precision,
    measure_progressive,
    mix,
    part_of,
    quantize,
)
from c2c.analysis.config import AnalysisConfig, AnalysisError, CacheMapConfig, PrecisionConfig
from c2c.analysis.experiment import Experiment, difference
from c2c.analysis.measures import (
    compare,
    effective_rank,
    linear_cka,
    measure_cache_map,
    measure_effective_rank,
    measure_gates,
    shared_variance,
)
from c2c.analysis.plots import project
from c2c.cli.app import app
from c2c.config import ConfigError
from c2c.prompting import RenderOptions
from tiny import assert_equal_caches, open_fusers, pair_folders

KINDS = ("keys", "values")
LAYERS = [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes a fuser's folder between two tiny models; ``change`` is applied to the pair before it is saved."""
    receiver, sharer = pair_folders(tmp_path_factory.mktemp)

    def made(change=lambda model: None, sharers=1, **options) -> str:
        model = C2CModel.from_models(receiver, [sharer] * sharers, **options)
        change(model)
        folder = tmp_path_factory.mktemp("fuser")
        model.save_pretrained(folder)
        return str(folder)

    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    words = ["fox", "dog", "sun", "sea", "sky"]
    rows = [
        {"id": str(i), "question": f"Which is number {i}?", "choices": words[: 2 + i % 4], "answer": i % (2 + i % 4)}
        for i in range(9)
    ]
    path = tmp_path_factory.mktemp("questions") / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def fuser(make):
    return make(open_fusers, fuser_options={"rank": 8})


@pytest.fixture(scope="module")
def config(fuser, data):
    return AnalysisConfig(fuser=fuser, data=data, batch_size=4)


@pytest.fixture(scope="module")
def experiment(config):
    return Experiment(config)


@pytest.fixture(scope="module")
def batch(experiment):
    return next(experiment.batches("reading"))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("size", "sizes"), [(2, [2, 2, 2, 3]), (8, [9]), (3, [3, 3, 3])])
def test_no_batch_has_a_single_item(fuser, data, size, sizes):
    made = Experiment(AnalysisConfig(fuser=fuser, data=data, batch_size=size))
    assert [len(batch.examples) for batch in made.batches("reading")] == sizes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"limit": 1}, "limit is 1; expected 2"),
        ({"batch_size": 1}, "batch_size is 1; expected 2"),
        ({"points": 2}, "points is 2; expected 3"),
        ({"method": "umap"}, "umap"),
        ({"layers": "1,x"}, "layer numbers with commas"),
    ],
)
def test_impossible_settings_are_refused(change, words):
    with pytest.raises(AnalysisError, match=words):
        CacheMapConfig(fuser="f", data="d", **change)


def test_what_can_not_be_analysed_is_refused(make, fuser, data, tmp_path):
    with pytest.raises(AnalysisError, match="no such data file"):  # before models are loaded
        Experiment(AnalysisConfig(fuser="no/fuser/at/all", data=str(tmp_path / "none.jsonl")))
    with pytest.raises(ConfigError, match="unknown form 'poem'"):
        Experiment(AnalysisConfig(fuser=fuser, data=data, form="poem"))
    (tmp_path / "one.jsonl").write_text(Path(data).read_text().splitlines()[0])
    with pytest.raises(AnalysisError, match="1 items are left"):
        Experiment(AnalysisConfig(fuser=fuser, data=str(tmp_path / "one.jsonl")))
    with pytest.raises(AnalysisError, match="has 2 sharers"):
        Experiment(AnalysisConfig(fuser=make(sharers=2), data=data))
    with pytest.raises(AnalysisError, match="is for private context"):
        Experiment(AnalysisConfig(fuser=make(fuser="memory"), data=data))


def test_stored_prefills_replace_the_sharer(fuser, data, tmp_path):
    settings = {"fuser": fuser, "data": data, "store_dir": str(tmp_path)}
    first = measure_progressive(AnalysisConfig(**settings, limit=4))
    assert Experiment(AnalysisConfig(**settings, limit=4)).sharer.released
    again = measure_progressive(AnalysisConfig(**settings, store_budget_gb=10, limit=4))
    other = measure_progressive(AnalysisConfig(**settings, limit=3))
    assert again["latter"] == first["latter"]
    keys = [result["provenance"]["key"] for result in (first, again, other)]
    assert keys[0] == keys[1] != keys[2]  # where prefills are stored does not make another analysis
    assert not Experiment(AnalysisConfig(**settings, limit=9)).sharer.released
    entries = measure_precision(PrecisionConfig(**settings, limit=4, unrounded=True))["precisions"]
    assert [one["precision"] for one in entries] == ["float32", "bfloat16", "int8", "float8"]


def test_captures_are_the_caches_at_aligned_positions(experiment, batch):
    alignment = batch.matched
    capture = next(experiment.captures("reading", [3]))
    clean, shared = kv_cache.layer(batch.receiver_cache, 3), kv_cache.layer(batch.sharer_cache, capture.source)
    fused = kv_cache.layer(experiment.fuse(batch), 3)
    assert (capture.layer, capture.source) == (3, experiment.fuser.config.layer_map[3])
    for pair in (0, len(alignment) // 2, len(alignment) - 1):
        row, ours, theirs = (int(x[pair]) for x in (alignment.rows, alignment.receiver, alignment.sharer))
        assert torch.equal(capture.entries["receiver"]["keys"][pair], clean[0][row, :, ours].flatten().float())
        assert torch.equal(capture.entries["sharer"]["values"][pair], shared[1][row, :, theirs].flatten().float())
        assert torch.allclose(capture.entries["fused"]["values"][pair], fused[1][row, :, ours].flatten(), atol=1e-6)
    read = torch.stack([alignment.rows, alignment.sharer])
    assert int(capture.unique.sum()) == read.unique(dim=1).shape[1] < len(alignment)


def test_unrotated_keys_of_one_token_agree_at_all_positions(experiment, batch):
    """In the first layer a key depends on its token and position only."""
    capture = next(experiment.captures("reading", [0]))
    ids = batch.receiver.ids[batch.matched.rows, batch.matched.receiver]
    where = (ids == ids.mode().values).nonzero().flatten()
    unrotated, cached = (capture.entries["receiver"][kind][where] for kind in ("keys_unrotated", "keys"))
    assert len(where) > 4
    assert torch.allclose(unrotated, unrotated[:1].expand_as(unrotated), atol=0.05)  # the store keeps bfloat16
    assert not torch.allclose(cached, cached[:1].expand_as(cached), atol=0.5)


def test_effective_rank():
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(7, 4)) == pytest.approx(1, abs=1e-3)
    # singular values 2, 1, 1: entropy of 1/2, 1/4, 1/4 is 1.5 ln 2
    assert effective_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(2**1.5)
    assert effective_rank(torch.zeros(3, 3)) == 0


def test_ranks_and_norms_are_those_of_all_batches_together(config, experiment):
    ranks, gates = measure_effective_rank(config), measure_gates(config)
    captures = list(experiment.captures("reading", [2]))
    own, fused = (torch.cat([one.entries[side]["values"] for one in captures]) for side in ("receiver", "fused"))
    read = torch.cat([one.entries["sharer"]["values"][one.unique] for one in captures])
    for side, entries in (("receiver", own), ("fused", fused), ("sharer", read)):
        assert ranks["layers"][2]["values"][side] == pytest.approx(effective_rank(entries), abs=0.01)
    assert (ranks["tokens"], ranks["sharer_tokens"], gates["tokens"]) == (len(own), len(read), len(own))
    assert [layer["layer"] for layer in ranks["layers"]] == [layer["layer"] for layer in gates["layers"]] == LAYERS
    mean = sum(layer["values"]["receiver"] for layer in ranks["layers"]) / 5
    assert ranks["mean"]["values"]["receiver"] == pytest.approx(mean, abs=0.01)
    added, length = (x.view(-1, 3, 8)[:, 1].norm(dim=-1).mean() for x in (fused - own, own))
    assert gates["layers"][2]["added"]["values"][1] == pytest.approx(float(added), rel=1e-3)
    assert gates["layers"][2]["relative"]["values"][1] == pytest.approx(float(added / length), rel=1e-3)
    found = [[layer["gate"][kind] for kind in KINDS] for layer in gates["layers"]]
    assert torch.allclose(torch.tensor(found), experiment.fuser.gates(), atol=1e-4)


def test_an_untrained_fuser_changes_nothing(make, data):
    untrained = AnalysisConfig(fuser=make(), data=data)
    ranks, gates = measure_effective_rank(untrained), measure_gates(untrained)
    for layer in ranks["layers"]:
        for kind in ("keys", "keys_unrotated", "values"):
            assert layer[kind]["fused"] == layer[kind]["receiver"] <= ranks["widths"]["receiver"]
            assert 1 <= layer[kind]["sharer"] <= ranks["widths"]["sharer"]
    assert gates["mean_relative"] == {"keys": 0, "values": 0}
    assert gates["mean_gate"] == {"keys": 0.5, "values": 0.5}
    assert gates["open"] is None  # soft gates


def test_hard_gates_are_counted(make, data):
    def open_two(model):
        with torch.no_grad():
            model.fusers[0].layers[0].key_gate_logit.fill_(1.0)
            model.fusers[0].layers[3].value_gate_logit.fill_(1.0)

    folder = make(open_two, fuser="c2c", fuser_options={"hidden_dim": 16, "intermediate_dim": 16})
    result = measure_gates(AnalysisConfig(fuser=folder, data=data))
    assert result["open"] == 20
    changed = [(layer["layer"], kind) for layer in result["layers"] for kind in KINDS if max(layer["added"][kind]) > 0]
    assert changed == [(0, "keys"), (3, "values")]


def test_shared_variance_and_cka_of_known_subspaces():
    x, turn, still = normal(400, 2), torch.linalg.qr(normal(2, 2, seed=1))[0], torch.ones(400, 4, dtype=torch.float64)
    inside, outside = torch.nn.functional.pad(x, (0, 2)), torch.nn.functional.pad(x, (2, 0))
    assert shared_variance(inside, inside) == pytest.approx(1)
    assert shared_variance(inside, outside) == pytest.approx(0, abs=1e-9)
    assert shared_variance(torch.cat([x, x], 1), inside) == pytest.approx(0.5)
    assert linear_cka(x, torch.nn.functional.pad(5 * x @ turn, (0, 4))) == pytest.approx(1)
    assert linear_cka(x, normal(400, 5, seed=2)) < 0.1
    assert shared_variance(inside, still) is linear_cka(x, still) is None


def test_compare_measures_what_was_added():
    receiver, sharer = normal(200, 6), normal(200, 4, seed=1)
    same = compare({"sharer": sharer, "receiver": receiver, "fused": receiver})
    assert (same["change"], same["cosine"], same["fused_in_receiver"], same["cka_sharer_added"]) == (0, 1, 1, None)
    message = torch.nn.functional.pad(sharer, (0, 2))
    fused = compare({"sharer": sharer, "receiver": receiver, "fused": receiver + message})
    assert fused["cka_sharer_added"] == 1
    assert fused["cka_sharer_fused"] > fused["cka_sharer_receiver"] + 0.1
    assert compare({"sharer": sharer, "receiver": receiver, "fused": 2 * receiver})["change"] == pytest.approx(1)


def test_projections():
    x = normal(60, 4) * torch.tensor([0.1, 3.0, 0.1, 1.0]) + 7
    points, names = project(x)
    assert abs(torch.corrcoef(torch.stack([torch.tensor(points[:, 0]), x[:, 1]]))[0, 1]) > 0.99
    assert names[0].startswith("PC 1 (9")
    points, names = project(x[:12], "tsne")
    assert (points.shape, names) == ((12, 2), ("t-SNE 1", "t-SNE 2"))
    assert project(x[:1])[0].tolist() == [[0, 0]]


def test_cache_map(fuser, data, tmp_path):
    settings = {"fuser": fuser, "data": data, "limit": 4}
    result = measure_cache_map(CacheMapConfig(**settings, points=20, output_dir=str(tmp_path)))
    assert [layer["layer"] for layer in result["layers"]] == [2, 4]  # the middle and the last
    assert result["points"] == 20 < result["tokens"]
    assert all(layer[kind]["change"] > 0 for layer in result["layers"] for kind in KINDS)
    assert all(title in (tmp_path / "cache-map.svg").read_text() for title in ("Layer 2, keys", "Sharer layer"))
    with pytest.raises(AnalysisError, match=r"layers \[9\] are not fused; choose from \[0, 1, 2, 3, 4\]"):
        measure_cache_map(CacheMapConfig(**settings, layers="1,9"))


def test_answers_are_those_of_the_public_path(experiment, batch):
    """The option chosen from a fused cache is what the model gives a user; the cache stays as it is."""
    cache = experiment.fuse(batch)
    before = kv_cache.copy(cache)
    found = experiment.answer(batch, cache)
    assert_equal_caches(cache, before)
    model, agree = experiment.model, 0
    for example, right in zip(batch.examples, found, strict=True):
        fused = model.prefill(example.row.messages, options=RenderOptions(answer_prefix=example.row.answer_prefix))
        logits = model.receiver.next_logits(fused.tokens, fused.cache)
        agree += (int(logits[0, example.choice_ids].argmax()) == example.row.answer) == bool(right)
    assert agree >= len(found) - 1  # the store keeps bfloat16


@pytest.mark.parametrize("part", ["former", "latter"])
def test_a_part_of_the_positions_is_fused(experiment, batch, part):
    """Only the first, or last, aligned positions of each row differ from the clean cache, as in the whole fusion."""
    whole = batch.matched
    for fraction in FRACTIONS:
        counts = [int((part_of(whole, fraction, part).rows == row).sum()) for row in range(4)]
        assert counts == [int(fraction * int((whole.rows == row).sum())) for row in range(4)]
    half = experiment.fuse(batch, matched=part_of(whole, 0.5, part))
    caches = (half, experiment.fuse(batch), batch.receiver_cache)
    some, all_, none = (kv_cache.layer(cache, 2)[1] for cache in caches)
    for row in range(len(batch.examples)):
        columns = whole.receiver[whole.rows == row].sort().values
        count = len(columns) // 2
        fused = columns[:count] if part == "former" else columns[len(columns) - count :]
        rest = [column for column in range(some.shape[2]) if column not in fused.tolist()]
        assert torch.allclose(some[row, :, fused], all_[row, :, fused], atol=1e-5)
        assert torch.equal(some[row, :, rest], none[row, :, rest])


def test_accuracies_of_all_ablations_agree(config, data, experiment):
    """The ends of progressive fusion, the first precision and all layers are matched; each receiver is the same."""
    progressive, layers = measure_progressive(config), measure_layers(config)
    precision = measure_precision(PrecisionConfig(fuser=config.fuser, data=data, batch_size=4))
    first, *fewer = precision["precisions"]
    messages = ("none", "matched")
    right = experiment.score(lambda batch: ((message, experiment.fuse(batch, message)) for message in messages)).items
    receiver, matched = (100 * sum(right[message]) / 9 for message in messages)
    for points in (progressive["former"], progressive["latter"]):
        assert [point["fraction"] for point in points] == list(FRACTIONS)
        assert [points[end]["accuracy"] for end in (0, -1)] == pytest.approx([receiver, matched], abs=1e-3)
    assert layers["systems"]["matched"]["accuracy"] == first["accuracy"] == pytest.approx(matched, abs=1e-3)
    assert layers["systems"]["receiver"] == precision["receiver"]
    assert progressive["deranged"] == layers["systems"]["deranged"]
    assert difference([1, 1, 0, 1], [0, 1, 0, 1], seed=0)["ci95"][0] >= 0  # paired: never worse on any item
    for result in (progressive, layers, precision):
        assert result["G"]["points"] == pytest.approx(matched - receiver, abs=1e-3)
    assert (first["precision"], first["cost"]["points"], first["differ"]) == ("bfloat16", 0, 0)
    assert [one["precision"] for one in fewer] == ["int8", "float8"]
    assert fewer[0]["bytes"] == fewer[1]["bytes"] < first["bytes"]
    assert [one["layer"] for one in layers["single"]] == LAYERS
    for one in layers["single"]:
        assert one["gain"]["points"] == pytest.approx(one["accuracy"] - receiver, abs=2e-3)
    assert {"keys only", "values only", "without middle third"} <= layers["systems"].keys()


def test_mixing_caches_is_fusing_these_layers_only(config, experiment, batch):
    """A fuser whose other layers are closed gives the same cache."""
    clean, fused = batch.receiver_cache, experiment.fuse(batch)
    assert_equal_caches(mix(clean, fused, LAYERS, LAYERS), fused)
    assert_equal_caches(mix(clean, fused, [], []), clean)
    keys, values = kv_cache.layer(mix(clean, fused, [1], []), 1)
    assert torch.equal(keys, kv_cache.layer(fused, 1)[0])
    assert torch.equal(values, kv_cache.layer(clean, 1)[1])
    alone = Experiment(config)
    with torch.no_grad():
        for name in ("up", "up_bias"):
            alone.fuser.get_parameter(name)[[0, 1, 2, 4]] = 0
    assert_equal_caches(mix(clean, fused, [3], [3]), alone.fuse(batch))


def test_what_is_sent_is_rounded_and_other_columns_are_zero(experiment, batch):
    cache, read, layers = batch.sharer_cache, batch.matched, experiment.fuser.config.source_layers
    exact, exact_bytes = quantize(cache, read, "bfloat16", layers)  # as it is stored
    rough, rough_bytes = quantize(cache, read, "int8", layers)
    assert rough_bytes < exact_bytes
    sent = torch.zeros(len(batch.examples), kv_cache.length(exact), dtype=torch.bool)
    sent[read.rows, read.sharer] = True
    for layer in set(layers):
        for whole, arrived, near in zip(*(kv_cache.layer(one, layer) for one in (cache, exact, rough)), strict=True):
            whole, arrived, near = (x.transpose(1, 2) for x in (whole, arrived, near))
            assert torch.equal(arrived[sent], whole[sent])
            assert not arrived[~sent].any()
            assert 0 < float((near - arrived).norm() / arrived.norm()) < 0.02


@pytest.mark.parametrize("command", ["effective-rank", "cache-map", "gates", "progressive", "precision", "layers"])
def test_commands_write_numbers_and_plot(fuser, data, tmp_path, command):
    arguments = ["analyze", command, "--fuser", fuser, "--data", data, "--limit", "4"]
    run = CliRunner().invoke(app, [*arguments, "--output-dir", str(tmp_path / "out"), "--json"])
    assert run.exit_code == 0, run.output
    kept = json.loads((tmp_path / "out" / f"{command}.json").read_text())
    assert kept == json.loads(run.stdout.strip().splitlines()[-1])
    assert kept["n"] == 4
    assert set(kept["provenance"]["data"]) == {"/".join(data.split("/")[-2:])}
    assert kept["provenance"]["config"]["limit"] == 4
    assert "<svg" in (tmp_path / "out" / f"{command}.svg").read_text()
    assert len(list((tmp_path / "out").iterdir())) == 2
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert any(word in shown.output for word in ("layer", "fused", "precision"))


@pytest.mark.parametrize(("package", "name"), [("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")])
def test_plots_that_cannot_be_made_are_refused_at_once(monkeypatch, data, tmp_path, package, name):
    with pytest.raises(AnalysisError, match="is a file"):
        measure_gates(AnalysisConfig(fuser="no/fuser", data=data, output_dir=data))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AnalysisError, match=f"{name}.*pip install"):
        measure_gates(AnalysisConfig(fuser="no/fuser", data=data, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
