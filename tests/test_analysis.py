"""Analyses on tiny models: what they compute, what they refuse, and the files that they write."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from c2c import C2CModel, kv_cache
from c2c.analysis import AnalysisError, Settings, effective_rank
from c2c.analysis.entries import layer_entries
from c2c.analysis.gates import measure_gates
from c2c.analysis.inputs import Subject, parts
from c2c.analysis.layers import measure_layers, mixed, thirds, variants
from c2c.analysis.maps import compare, draw_cache_map, linear_cka, principal_axes, shared_variance
from c2c.analysis.precision import crossed, measure_precision
from c2c.analysis.progressive import FRACTIONS, measure_progressive, part_of, partly_fused
from c2c.analysis.rank import Grams, measure_ranks
from c2c.analysis.scores import difference, right_answers
from c2c.cli.app import app
from c2c.config import ConfigError
from c2c.prompting import RenderOptions
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
def untrained(tmp_path_factory):
    receiver, sharer = pair_folders(tmp_path_factory.mktemp)
    folder = tmp_path_factory.mktemp("untrained")
    C2CModel.from_models(receiver, sharer).save_pretrained(folder)
    return str(folder)


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
def subject(fuser, data):
    return Subject.open(Settings(fuser, data, batch_size=4))


@pytest.fixture(scope="module")
def batch(subject):
    return subject.training.collate(subject.examples[:4])


def same(one, other) -> bool:
    pairs = zip(kv_cache.layers(one), kv_cache.layers(other), strict=True)
    return all(torch.equal(a, b) for first, second in pairs for a, b in zip(first, second, strict=True))


# -- inputs ----------------------------------------------------------------------------------------------------------


def test_no_batch_has_a_single_item():
    sizes = [len(part) for part in parts(list(range(9)), 4)]
    assert sizes == [4, 5]
    assert [list(part) for part in parts(list(range(4)), 2)] == [[0, 1], [2, 3]]
    assert [len(part) for part in parts(list(range(2)), 8)] == [2]


@pytest.mark.parametrize("change", [{"limit": 1}, {"batch_size": 1}])
def test_fewer_than_two_items_are_refused(fuser, data, change):
    with pytest.raises(AnalysisError, match="at least 2"):
        Settings(fuser, data, **change)


def test_missing_data_is_refused_before_models_are_loaded(tmp_path):
    with pytest.raises(AnalysisError, match="no such data file"):
        Subject.open(Settings("no/fuser/at/all", str(tmp_path / "none.jsonl")))


def test_an_unknown_form_is_refused(fuser, data):
    with pytest.raises(ConfigError, match="unknown form 'poem'"):
        Subject.open(Settings(fuser, data, form="poem"))


def test_too_few_readable_items_are_refused(fuser, data, tmp_path):
    short = tmp_path / "one.jsonl"
    short.write_text(Path(data).read_text().splitlines()[0])
    with pytest.raises(AnalysisError, match="1 items are left"):
        Subject.open(Settings(fuser, str(short)))


def test_several_sharers_are_refused(data, tmp_path):
    receiver, sharer = pair_folders(lambda name: (tmp_path / name).mkdir() or tmp_path / name)
    C2CModel.from_models(receiver, [sharer, sharer]).save_pretrained(tmp_path / "fusers")
    with pytest.raises(AnalysisError, match="has 2 sharers"):
        Subject.open(Settings(str(tmp_path / "fusers"), data))


def test_side_memory_is_refused(data, tmp_path):
    receiver, sharer = pair_folders(lambda name: (tmp_path / name).mkdir() or tmp_path / name)
    C2CModel.from_models(receiver, sharer, fuser="memory").save_pretrained(tmp_path / "fuser")
    with pytest.raises(AnalysisError, match="is for private context"):
        Subject.open(Settings(str(tmp_path / "fuser"), data))


def test_the_sharer_is_given_back_where_its_prefills_are_stored(fuser, data, tmp_path):
    settings = Settings(fuser, data, store_dir=str(tmp_path), limit=4)
    first = measure_progressive(settings)
    assert Subject.open(settings).model.sharers[0].released
    again = measure_progressive(settings)  # from stored prefills alone
    assert again["latter"] == first["latter"]
    assert not Subject.open(replace(settings, limit=9)).model.sharers[0].released


# -- effective rank --------------------------------------------------------------------------------------------------


def test_effective_rank_of_known_matrices():
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(7, 4)) == pytest.approx(1, abs=1e-3)
    # singular values 2, 1, 1: entropy of 1/2, 1/4, 1/4 is 1.5 ln 2
    assert effective_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(2**1.5)
    assert effective_rank(torch.zeros(3, 3)) == 0


def test_effective_rank_is_that_of_the_singular_values():
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = torch.linalg.svdvals(x)
    p = p / p.sum()
    assert effective_rank(x) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-6)
    turned = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    assert effective_rank(x @ turned * 3) == pytest.approx(effective_rank(x), rel=1e-6)


def test_ranks_are_summed_over_batches_as_of_one_matrix(subject):
    grams, seen = Grams(), []
    for part in subject.batches("reading"):
        for entries in layer_entries(subject, part, [2]):
            grams.add(entries)
            seen.append(entries)
    whole = {side: torch.cat([getattr(entries, side).values for entries in seen]) for side in ("receiver", "fused")}
    ranks = grams.ranks()[2]["values"]
    assert ranks["receiver"] == pytest.approx(effective_rank(whole["receiver"]), abs=0.01)
    assert ranks["fused"] == pytest.approx(effective_rank(whole["fused"]), abs=0.01)
    assert ranks["fused"] != ranks["receiver"]
    assert grams.tokens == len(whole["receiver"])
    read = torch.cat([entries.sharer.values[entries.first] for entries in seen])
    assert len(read) == grams.sharer_tokens < grams.tokens  # the closing template reads one entry several times
    assert ranks["sharer"] == pytest.approx(effective_rank(read), abs=0.01)


def test_ranks_of_an_untrained_fuser_are_the_receivers(untrained, data):
    result = measure_ranks(Settings(untrained, data))
    for layer in result["layers"]:
        for kind in ("keys", "keys_unrotated", "values"):
            assert layer[kind]["fused"] == layer[kind]["receiver"] <= result["widths"]["receiver"]
            assert 1 <= layer[kind]["sharer"] <= result["widths"]["sharer"]
    assert [layer["layer"] for layer in result["layers"]] == [0, 1, 2, 3, 4]
    expected = sum(layer["values"]["receiver"] for layer in result["layers"]) / 5
    assert result["mean"]["values"]["receiver"] == pytest.approx(expected, abs=0.01)


# -- entries ---------------------------------------------------------------------------------------------------------


def test_entries_are_the_caches_at_aligned_positions(subject, batch):
    alignment = batch.matched
    (entries,) = layer_entries(subject, batch, [3])
    source = subject.fuser.config.layer_map[3]
    clean, theirs = kv_cache.layer(batch.receiver_cache, 3), kv_cache.layer(batch.sharer_cache, source)
    fused = kv_cache.layer(subject.training.fused(batch, "matched"), 3)
    for pair in (0, len(alignment) // 2, len(alignment) - 1):
        row, ours, other = (int(x[pair]) for x in (alignment.rows, alignment.receiver, alignment.sharer))
        assert torch.equal(entries.receiver.keys[pair], clean[0][row, :, ours].flatten().float())
        assert torch.equal(entries.sharer.values[pair], theirs[1][row, :, other].flatten().float())
        assert torch.allclose(entries.fused.values[pair], fused[1][row, :, ours].flatten().float(), atol=1e-6)


def test_unrotated_keys_of_one_token_agree_at_all_positions(subject, batch):
    """In the first layer a key depends on its token and position only."""
    (entries,) = layer_entries(subject, batch, [0])
    ids = batch.receiver.ids[batch.matched.rows, batch.matched.receiver]
    token = ids.mode().values
    where = (ids == token).nonzero().flatten()
    assert len(where) > 4
    bare, cached = entries.receiver.unrotated[where], entries.receiver.keys[where]
    assert torch.allclose(bare, bare[:1].expand_as(bare), atol=0.05)  # the store keeps bfloat16
    assert not torch.allclose(cached, cached[:1].expand_as(cached), atol=0.5)


# -- cache map -------------------------------------------------------------------------------------------------------


def test_shared_variance_of_known_subspaces():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, generator=draw, dtype=torch.float64)
    inside = torch.nn.functional.pad(x, (0, 2))
    outside = torch.nn.functional.pad(x, (2, 0))
    assert shared_variance(inside, inside) == pytest.approx(1)
    assert shared_variance(inside, outside) == pytest.approx(0, abs=1e-9)
    assert shared_variance(torch.cat([x, x], 1), inside) == pytest.approx(0.5)
    assert shared_variance(inside, torch.ones(300, 4, dtype=torch.float64)) is None


def test_cka_does_not_see_rotation_and_width():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=draw, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=draw, dtype=torch.float64))[0]
    assert linear_cka(x, torch.nn.functional.pad(5 * x @ turn, (0, 4))) == pytest.approx(1)
    assert linear_cka(x, torch.randn(400, 5, generator=draw, dtype=torch.float64)) < 0.1
    assert linear_cka(x, torch.zeros(400, 2, dtype=torch.float64)) is None


def test_principal_axes_find_the_directions_of_variance():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=draw) * torch.tensor([0.1, 3.0, 0.1, 1.0]) + 7
    at, shares = principal_axes(x)
    assert abs(torch.corrcoef(torch.stack([at[:, 0], x[:, 1].double()]))[0, 1]) > 0.99
    assert shares[0] == pytest.approx(9 / 10, abs=0.03)
    assert torch.allclose(at.mean(0), torch.zeros(2, dtype=at.dtype), atol=1e-6)


def test_compare_measures_what_was_added():
    draw = torch.Generator().manual_seed(0)
    receiver, sharer = torch.randn(200, 6, generator=draw), torch.randn(200, 4, generator=draw)
    same_as = compare({"sharer": sharer, "receiver": receiver, "fused": receiver})
    assert same_as["change"] == 0
    assert same_as["cosine"] == same_as["fused_in_receiver"] == 1
    assert same_as["cka_sharer_added"] is None
    message = torch.nn.functional.pad(sharer, (0, 2))
    told = compare({"sharer": sharer, "receiver": receiver, "fused": receiver + message})
    assert told["cka_sharer_added"] == 1
    assert told["cka_sharer_fused"] > told["cka_sharer_receiver"] + 0.1
    doubled = compare({"sharer": sharer, "receiver": receiver, "fused": 2 * receiver})
    assert doubled["change"] == pytest.approx(1)


def test_cache_map_draws_the_middle_and_the_last_layer(fuser, data, tmp_path):
    result = draw_cache_map(Settings(fuser, data, output_dir=str(tmp_path)), points=20)
    assert [layer["layer"] for layer in result["layers"]] == [2, 4]
    assert result["points"] == 20 < result["tokens"]
    assert all(layer[kind]["change"] > 0 for layer in result["layers"] for kind in ("keys", "values"))
    svg = (tmp_path / "cache-map.svg").read_text()
    assert "Layer 2, keys" in svg
    assert "Layer 4, values" in svg


def test_cache_map_by_tsne(fuser, data, tmp_path):
    pytest.importorskip("sklearn")
    draw_cache_map(Settings(fuser, data, output_dir=str(tmp_path), limit=3), layers=[1], method="tsne", points=12)
    assert "t-SNE 1" in (tmp_path / "cache-map.svg").read_text()


def test_cache_map_refuses(fuser, data, monkeypatch):
    with pytest.raises(AnalysisError, match=r"layers \[9\] are not fused; choose from \[0, 1, 2, 3, 4\]"):
        draw_cache_map(Settings(fuser, data), layers=[1, 9])
    with pytest.raises(AnalysisError, match="unknown method 'umap'"):
        draw_cache_map(Settings(fuser, data), method="umap")
    hide(monkeypatch, "sklearn")
    with pytest.raises(AnalysisError, match="pip install scikit-learn"):
        draw_cache_map(Settings(fuser, data), method="tsne")


# -- gates -----------------------------------------------------------------------------------------------------------


def test_gates_and_sizes(fuser, data):
    result = measure_gates(Settings(fuser, data))
    model = C2CModel.from_pretrained(fuser)
    expected = model.fusers[0].gates().tolist()
    found = [[layer["gate"]["keys"], layer["gate"]["values"]] for layer in result["layers"]]
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-4)
    assert all(len(layer["relative"]["keys"]) == 3 for layer in result["layers"])
    assert all(size > 0 for layer in result["layers"] for kind in ("keys", "values") for size in layer["added"][kind])


def test_sizes_are_those_of_the_entries(fuser, data, subject):
    result = measure_gates(Settings(fuser, data, batch_size=4))
    added, own = [], []
    for part in subject.batches("reading"):
        (entries,) = layer_entries(subject, part, [1])
        added.append((entries.fused.values - entries.receiver.values).view(-1, 3, 8)[:, 2].norm(dim=-1))
        own.append(entries.receiver.values.view(-1, 3, 8)[:, 2].norm(dim=-1))
    layer = result["layers"][1]
    assert layer["added"]["values"][2] == pytest.approx(float(torch.cat(added).mean()), rel=1e-3)
    ratio = float(torch.cat(added).mean() / torch.cat(own).mean())
    assert layer["relative"]["values"][2] == pytest.approx(ratio, rel=1e-3)


def test_an_untrained_fuser_adds_nothing(untrained, data):
    result = measure_gates(Settings(untrained, data))
    assert result["mean_relative"] == {"keys": 0, "values": 0}
    assert result["mean_gate"] == {"keys": 0.5, "values": 0.5}
    assert result["open"] is None  # soft gates


def test_hard_gates_are_counted(data, tmp_path):
    receiver, sharer = pair_folders(lambda name: (tmp_path / name).mkdir() or tmp_path / name)
    model = C2CModel.from_models(
        receiver, sharer, fuser="c2c", fuser_options={"hidden_dim": 16, "intermediate_dim": 16}
    )
    with torch.no_grad():
        model.fusers[0].layers[0].key_gate_logit.fill_(1.0)
        model.fusers[0].layers[3].value_gate_logit.fill_(1.0)
    model.save_pretrained(tmp_path / "fuser")
    result = measure_gates(Settings(str(tmp_path / "fuser"), data))
    assert result["open"] == 20
    sizes = [[max(layer["added"][kind]) > 0 for kind in ("keys", "values")] for layer in result["layers"]]
    assert sizes == [[True, False], [False, False], [False, False], [False, True], [False, False]]


# -- precision -------------------------------------------------------------------------------------------------------


def test_what_crosses_is_rounded_and_the_rest_is_not_there(batch):
    cache, read = batch.sharer_cache, batch.matched
    exact = crossed(cache, read, "bfloat16")  # as it is stored
    for (keys, values), (sent, also) in zip(kv_cache.layers(cache), kv_cache.layers(exact), strict=True):
        if not keys.shape[1]:
            assert sent.shape == keys.shape
            continue
        there = torch.zeros(keys.shape[0], keys.shape[2], dtype=torch.bool)
        there[read.rows, read.sharer] = True
        for whole, arrived in ((keys, sent), (values, also)):
            whole, arrived = whole.transpose(1, 2), arrived.transpose(1, 2)
            assert torch.equal(arrived[there], whole[there])
            assert not arrived[~there].any()
    rough = crossed(cache, read, "int8")
    errors = [
        float((a - b).norm() / b.norm())
        for x, y in zip(kv_cache.layers(rough), kv_cache.layers(exact), strict=True)
        for a, b in zip(x, y, strict=True)
        if b.shape[1]
    ]
    assert 0 < max(errors) < 0.02


def test_the_first_row_of_precisions_is_what_the_others_are_measured_by(fuser, data, subject):
    progressive = measure_progressive(Settings(fuser, data, batch_size=4))
    result = measure_precision(Settings(fuser, data, batch_size=4))
    first, *fewer = result["precisions"]
    assert (first["precision"], first["cost"]["points"], first["differ"]) == ("bfloat16", 0, 0)
    assert first["accuracy"] == progressive["former"][-1]["accuracy"]
    assert [one["precision"] for one in fewer] == ["int8", "float8"]
    assert fewer[0]["bytes"] == fewer[1]["bytes"] < first["bytes"]
    assert result["receiver"]["accuracy"] == progressive["former"][0]["accuracy"]


def test_entries_in_the_sharers_own_type_are_read_again(fuser, data, tmp_path):
    settings = Settings(fuser, data, batch_size=4, store_dir=str(tmp_path))
    measure_precision(settings)  # all are stored now
    names = [one["precision"] for one in measure_precision(settings, unrounded=True)["precisions"]]
    assert names == ["float32", "bfloat16", "int8", "float8"]


# -- progressive fusion ----------------------------------------------------------------------------------------------


def test_no_position_fused_is_the_receiver_bit_for_bit(subject, batch):
    for order in ("former", "latter"):
        assert same(partly_fused(subject.training, batch, 0.0, order), batch.receiver_cache)


def test_all_positions_fused_is_matched_bit_for_bit(subject, batch):
    matched = subject.training.fused(batch, "matched")
    assert not same(matched, batch.receiver_cache)
    for order in ("former", "latter"):
        assert same(partly_fused(subject.training, batch, 1.0, order), matched)


@pytest.mark.parametrize("order", ["former", "latter"])
def test_a_part_of_the_positions_is_fused(subject, batch, order):
    """Only the first, or last, aligned positions of each row differ from the clean cache, as in the whole fusion."""
    part = partly_fused(subject.training, batch, 0.5, order)
    matched = subject.training.fused(batch, "matched")
    mine, whole, clean = (kv_cache.layer(cache, 2)[1] for cache in (part, matched, batch.receiver_cache))
    for row in range(len(batch.examples)):
        columns = batch.matched.receiver[batch.matched.rows == row].sort().values
        count = len(columns) // 2
        fused = columns[:count] if order == "former" else columns[len(columns) - count :]
        rest = [column for column in range(mine.shape[2]) if column not in fused.tolist()]
        assert torch.allclose(mine[row, :, fused], whole[row, :, fused], atol=1e-5)
        assert torch.equal(mine[row, :, rest], clean[row, :, rest])


def test_parts_are_counted_in_pairs_of_each_row(batch):
    whole = batch.matched
    for fraction in FRACTIONS:
        part = part_of(whole, fraction, "latter")
        for row in range(len(batch.examples)):
            assert int((part.rows == row).sum()) == int(fraction * int((whole.rows == row).sum()))


def test_progressive_ends_are_the_evaluations_systems(fuser, data, subject):
    result = measure_progressive(Settings(fuser, data, batch_size=4))
    right = {"none": [], "matched": []}
    for part in subject.batches("answering"):
        for message, found in right.items():
            logits = subject.training.logits(part, message)
            for row, example in enumerate(part.examples):
                best = int(logits[row, example.decisive, example.choice_ids].argmax())
                found.append(best == example.row.answer)
    for order in ("former", "latter"):
        curve = result[order]
        assert [point["fraction"] for point in curve] == list(FRACTIONS)
        assert curve[0]["accuracy"] == pytest.approx(100 * sum(right["none"]) / 9, abs=1e-3)
        assert curve[-1]["accuracy"] == pytest.approx(100 * sum(right["matched"]) / 9, abs=1e-3)
    expected = 100 * (sum(right["matched"]) - sum(right["none"])) / 9
    assert result["G"]["points"] == pytest.approx(expected, abs=1e-3)


def test_answers_are_those_of_the_public_path(subject, batch):
    """The option chosen from a prepared cache is what the model gives a user."""
    found = right_answers(subject.training, batch, subject.training.fused(batch, "matched"))
    model, agree = subject.model, 0
    for example, right in zip(batch.examples, found, strict=True):
        fused = model.prefill(example.row.messages, options=RenderOptions(answer_prefix=example.row.answer_prefix))
        logits = model.receiver.next_logits(fused.tokens, fused.cache)
        agree += (int(logits[0, example.choice_ids].argmax()) == example.row.answer) == bool(right)
    assert agree >= len(found) - 1  # the store keeps bfloat16


def test_answering_leaves_the_cache_as_it_is(subject, batch):
    cache = subject.training.fused(batch, "matched")
    before = kv_cache.copy(cache)
    right_answers(subject.training, batch, cache)
    assert same(cache, before)


def test_difference_is_paired():
    gain = difference([1, 1, 0, 1], [0, 1, 0, 1], seed=0)
    assert gain["points"] == 25
    assert gain["ci95"][0] >= 0  # never worse on any item


# -- layers ----------------------------------------------------------------------------------------------------------


def test_all_layers_are_matched_and_none_is_the_receiver(subject, batch):
    clean, fused = batch.receiver_cache, subject.training.fused(batch, "matched")
    every = subject.fuser.config.fused_layers
    assert same(mixed(clean, fused, every, every), fused)
    assert same(mixed(clean, fused, [], []), clean)


def test_one_layer_is_what_a_layer_map_with_one_layer_gives(fuser, data, batch):
    """Mixing caches is fusing these layers only: the fuser with its other layers closed gives the same cache."""
    alone = Subject.open(Settings(fuser, data, batch_size=4))
    own = alone.training.collate(alone.examples[:4])
    whole = alone.training.fused(own, "matched")
    with torch.no_grad():
        for name in ("up", "up_bias"):
            closed = [index for index in range(5) if index != 3]
            alone.fuser.get_parameter(name)[closed] = 0
    assert same(mixed(own.receiver_cache, whole, [3], [3]), alone.training.fused(own, "matched"))


def test_keys_and_values_are_mixed_apart(subject, batch):
    clean, fused = batch.receiver_cache, subject.training.fused(batch, "matched")
    keys = mixed(clean, fused, [1], [])
    assert torch.equal(kv_cache.layer(keys, 1)[0], kv_cache.layer(fused, 1)[0])
    assert torch.equal(kv_cache.layer(keys, 1)[1], kv_cache.layer(clean, 1)[1])
    assert not torch.equal(kv_cache.layer(keys, 1)[0], kv_cache.layer(clean, 1)[0])


def test_thirds_and_variants():
    assert thirds(range(7)) == {"early": [0, 1, 2], "middle": [3, 4], "late": [5, 6]}
    assert thirds([4, 6]) == {"early": [4], "middle": [6]}
    found = variants([0, 1, 2])
    assert found["without middle third"] == ([0, 2], [0, 2])
    assert found["keys only"] == ([0, 1, 2], [])
    assert found["layer 1"] == ([1], [1])


def test_layers_result(fuser, data):
    result = measure_layers(Settings(fuser, data, batch_size=4))
    progressive = measure_progressive(Settings(fuser, data, batch_size=4))
    assert result["systems"]["matched"] == {k: progressive["former"][-1][k] for k in ("accuracy", "ci95")}
    assert result["systems"]["receiver"] == {k: progressive["former"][0][k] for k in ("accuracy", "ci95")}
    assert [one["layer"] for one in result["single"]] == [0, 1, 2, 3, 4]
    receiver = result["systems"]["receiver"]["accuracy"]
    for one in result["single"]:
        assert one["gain"]["points"] == pytest.approx(one["accuracy"] - receiver, abs=2e-3)


# -- files and commands ----------------------------------------------------------------------------------------------


def hide(monkeypatch, package):
    """Make imports of a package fail, as if it were not installed."""
    real = builtins.__import__

    def guarded(name, *arguments, **keywords):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", guarded)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setitem(__import__("sys").modules, f"{package}.manifold", None)


COMMANDS = ["effective-rank", "cache-map", "gates", "progressive", "precision", "layers"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_write_numbers_and_plot(fuser, data, tmp_path, command):
    arguments = ["analyze", command, "--fuser", fuser, "--data", data, "--limit", "4"]
    run = CliRunner().invoke(app, [*arguments, "--output-dir", str(tmp_path / "out"), "--json"])
    assert run.exit_code == 0, run.output
    printed = json.loads(run.stdout.strip().splitlines()[-1])
    kept = json.loads((tmp_path / "out" / f"{command}.json").read_text())
    assert kept == printed
    assert kept["n"] == 4
    about = kept["provenance"]
    assert set(about["data"]) == {"/".join(data.split("/")[-2:])}
    assert about["config"]["limit"] == 4
    assert about["receiver"]["weights"]
    svg = (tmp_path / "out" / f"{command}.svg").read_text()
    assert svg.startswith("<svg")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{command}.json", f"{command}.svg"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert any(word in shown.output for word in ("layer", "fused", "precision"))


def test_the_key_tells_analyses_apart(fuser, data, tmp_path):
    one, again, other = (
        measure_gates(settings)["provenance"]["key"]
        for settings in (
            Settings(fuser, data, limit=3),
            Settings(fuser, data, limit=3, store_dir=str(tmp_path)),
            Settings(fuser, data, limit=4),
        )
    )
    assert one == again != other


@pytest.mark.parametrize("command", [*COMMANDS, "enrichment", "scaling"])
def test_help_shows_examples(command):
    result = CliRunner().invoke(app, ["analyze", command, "--help"])
    assert result.exit_code == 0
    assert "Examples" in result.output
    assert f"c2c analyze {command}" in " ".join(result.output.split())


def test_plots_without_matplotlib_are_refused_at_once(monkeypatch, data, tmp_path):
    hide(monkeypatch, "matplotlib")
    settings = Settings("no/fuser/at/all", data, output_dir=str(tmp_path / "out"))
    with pytest.raises(AnalysisError, match=r"pip install 'matplotlib"):
        measure_gates(settings)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file_is_refused(data):
    with pytest.raises(AnalysisError, match="is a file"):
        measure_gates(Settings("no/fuser/at/all", data, output_dir=data))


def test_wrong_layers_are_wrong_usage(fuser, data):
    run = CliRunner().invoke(app, ["analyze", "cache-map", "--fuser", fuser, "--data", data, "--layers", "x"])
    assert run.exit_code == 2
