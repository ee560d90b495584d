"""The receiver-only adapter: same rows and size as a fuser, frozen receiver, resumable, refused for others."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from c2c import kv_cache
from c2c.cli.app import app
from c2c.config import ConfigError
from c2c.data.config import DataSource
from c2c.errors import MismatchError
from c2c.language_model import Receiver
from c2c.prompting import RenderOptions
from c2c.systems.lora import (
    MANIFEST,
    AdapterError,
    describe,
    linear_layers,
    load_adapter,
    nearest_rank,
    new_adapter,
    parameters_per_rank,
    restore_adapter,
    save_adapter,
    trainable,
)
from c2c.training import train
from c2c.training.dev_set import DevSet
from c2c.training.lora import load_adapter_pair
from c2c.training.objective import Objective
from c2c.training.run import prepare
from tiny import build, tokenizer
from training_rig import Stopped, adapter_config, config, make_folders, stop_at

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp)


def open_adapter(adapter) -> None:
    """Let a new adapter change its receiver."""
    draw = torch.Generator().manual_seed(1)
    for parameter in trainable(adapter):
        torch.nn.init.normal_(parameter, std=0.1, generator=draw)


def predictions(objective, examples):
    return objective.logits(objective.collate(examples))


def losses(objective, examples):
    return objective.losses(objective.collate(examples), "matched")


def tiny_receiver(family="llama", seed=1) -> Receiver:
    return Receiver(build(family, seed), tokenizer("chatml"), family)


def test_a_new_adapter_leaves_the_receiver_bit_for_bit_as_it_is(folders, tmp_path):
    run = prepare(adapter_config(folders, tmp_path))
    training, batch = run.objective, run.objective.collate(run.train[:4])
    with torch.no_grad():
        new = training.logits(batch)
        assert torch.equal(new, training.logits(batch, "none"))
        open_adapter(training.adapter)
        assert not torch.allclose(new, training.logits(batch), atol=0.1)
        assert torch.equal(new, training.logits(batch, "none"))


def test_the_loss_is_that_of_the_receivers_own_next_token(folders, tmp_path):
    run = prepare(adapter_config(folders, tmp_path))
    example = next(example for example in run.train if example.row.answer_prefix)
    receiver = Receiver.from_pretrained(folders[0])
    tokens = receiver.encode(example.row.messages, RenderOptions(answer_prefix=example.row.answer_prefix))
    own = receiver.next_logits(tokens, kv_cache.empty_cache())
    with torch.no_grad():
        assert torch.allclose(predictions(run.objective, [example])[:, 0], own, atol=1e-4)
        nats = -predictions(run.objective, [example])[0].log_softmax(-1)
        weighted = [w * nats[i, t] for i, (w, t) in enumerate(zip(example.weights, example.response_ids, strict=True))]
        assert float(losses(run.objective, [example])) == pytest.approx(float(sum(weighted)), rel=1e-4)


def test_gradients_reach_the_adapter_and_nothing_else(folders, tmp_path):
    run = prepare(adapter_config(folders, tmp_path))
    open_adapter(run.objective.adapter)
    run.objective.train()
    run.objective(run.train[:4])["loss"].backward()
    with_gradient = {name for name, p in run.objective.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in run.objective.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in with_gradient)
    assert len(with_gradient) == 2 * len(linear_layers(build("llama")))
    assert run.objective.training
    assert not any(module.training for module in run.objective.adapter.modules()), "it is in eval() beside a fuser too"


def test_a_padded_batch_has_the_losses_and_gradients_of_its_examples(folders, tmp_path):
    run = prepare(adapter_config(folders, tmp_path))
    objective, examples = run.objective, [run.train[0], run.train[20], *run.train[-2:]]
    open_adapter(objective.adapter)
    assert len({len(e.receiver_ids) for e in examples}) > 1
    assert len({len(e.response_ids) for e in examples}) > 1
    parts = objective.micro_batches(examples)
    assert [len(part) for part in parts] == [1] * 4, "on a CPU the activations of one are in memory at a time"
    results = []
    for batches in ([[e for part in parts for e in part]], parts):
        objective.zero_grad()
        found = torch.cat([losses(objective, batch) for batch in batches])
        found.mean().backward()
        results.append((found.detach(), [p.grad.clone() for p in trainable(objective.adapter)]))
    (together, padded), (alone, single) = results
    assert torch.allclose(together, alone, atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(padded, single, strict=True))
    assert any(float(gradient.abs().max()) > 1e-2 for gradient in single)


def test_rows_and_batches_are_those_of_a_fuser_run(folders, tmp_path, monkeypatch):
    both = {"train": [DataSource("train.jsonl"), DataSource("train.jsonl", form="sentence", limit=8)]}
    longest = max(len(example.receiver_ids) for example in prepare(adapter_config(folders, tmp_path)).train)
    both |= {"exclude": ["test.jsonl"], "max_prompt_tokens": longest - 1, "max_steps": 8, "eval_steps": 8}
    ours = adapter_config(folders, tmp_path / "adapter", **both)
    theirs = config(folders, tmp_path / "fuser", **both, fuser_options={"rank": 16}, calibration=0)
    adapter, fuser = prepare(ours), prepare(theirs)
    assert adapter.dropped == fuser.dropped
    assert set(adapter.dropped) == {"question is in an excluded file", "prompt too long"}
    for mine, other in zip([*adapter.train, *adapter.dev], [*fuser.train, *fuser.dev], strict=True):
        assert (mine.row, mine.receiver_ids, mine.response_ids) == (other.row, other.receiver_ids, other.response_ids)
        assert (mine.weights, mine.decisive, mine.choice_ids) == (other.weights, other.decisive, other.choice_ids)
    seen = []
    original = Objective.forward

    def record(self, examples, share=1.0):
        seen.extend(example.row.id for example in examples)
        return original(self, examples, share)

    monkeypatch.setattr(Objective, "forward", record)
    batches = []
    for settings in (ours, theirs):
        seen.clear()
        train(settings)
        batches.append([sorted(seen[start : start + 4]) for start in range(0, len(seen), 4)])
    assert len(batches[0]) == 8
    assert batches[0] == batches[1]


def test_prompts_that_only_the_sharer_finds_too_long_are_dropped_here_too(folders, tmp_path):
    changes = {"train": [DataSource("train.jsonl"), DataSource("train.jsonl", form="published")]}
    everything = prepare(adapter_config(folders, tmp_path, max_prompt_tokens=512, **changes))
    longest = max(len(e.receiver_ids) for e in everything.train)
    too_long = sum(len(e.sharer_ids) > longest for e in everything.train)
    fewer = prepare(adapter_config(folders, tmp_path, max_prompt_tokens=longest, **changes))
    assert too_long > 0
    assert fewer.dropped["prompt too long"] == too_long
    [sharer] = load_adapter_pair(adapter_config(folders, tmp_path)).sharers
    assert all(parameter.is_meta for parameter in sharer.model.parameters()), "only its tokenizer is needed"


@pytest.mark.parametrize(
    ("family", "options"), [("bottleneck", {"rank": 16}), ("c2c", {"hidden_dim": 16, "intermediate_dim": 16})]
)
def test_the_adapter_has_the_size_of_the_fuser_within_a_rank(folders, tmp_path, family, options):
    changes = {"fuser_options": options, "layer_map": "terminal"}
    size = prepare(adapter_config(folders, tmp_path, adapter_of=family, **changes)).objective.summary()
    fuser = prepare(config(folders, tmp_path, family=family, **changes)).objective.fuser
    parameters = sum(p.numel() for p in fuser.parameters())
    assert size["matched"] == {"family": family, "parameters": parameters}
    assert size["parameters"] == size["rank"] * parameters_per_rank(Receiver.from_pretrained(folders[0]).model)
    assert size["rank"] > 1
    assert abs(size["parameters"] - parameters) <= size["parameters"] / size["rank"] / 2
    given = prepare(adapter_config(folders, tmp_path, adapter_rank=3)).objective
    assert given.summary()["rank"] == 3


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_all_layers_of_attention_and_mlp_are_adapted_and_the_head_is_not(family):
    receiver = tiny_receiver(family)
    count = len(linear_layers(receiver.model))
    assert count == 7 * receiver.geometry.layers
    adapter = new_adapter(receiver, 2)
    wrapped = [name for name, module in adapter.named_modules() if hasattr(module, "lora_A")]
    assert len(wrapped) == count
    assert all("self_attn" in name or "mlp" in name for name in wrapped)


def test_nearest_rank_is_nearest_and_an_impossible_one_is_refused():
    model = build("llama")
    cost = parameters_per_rank(model)
    assert [nearest_rank(model, n) for n in (1, cost, int(2.4 * cost), int(2.6 * cost))] == [1, 1, 2, 3]
    with pytest.raises(AdapterError, match="at least one"):
        nearest_rank(model, 0)
    for rank in (0, 2.5, "8", True):
        with pytest.raises(AdapterError, match="rank is"):
            new_adapter(tiny_receiver(), rank)


def test_training_fits_a_small_set_and_keeps_the_most_accurate(folders, tmp_path):
    rows = {name: [DataSource("train.jsonl", limit=8)] for name in ("train", "dev")}
    changes = {"max_steps": 60, "eval_steps": 20, "adapter_learning_rate": 1e-2}
    summary = train(adapter_config(folders, tmp_path, **changes, **rows))
    scores = json.loads((tmp_path / "dev.json").read_text())
    assert list(scores) == ["20", "40", "60"]
    assert summary["dev"]["adapter"] == max(entry["adapter"] for entry in scores.values())
    assert summary["dev"]["adapter"] >= summary["dev"]["receiver"] + 40
    assert scores["60"]["loss"] < 0.5 * scores["20"]["loss"]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert describe(summary["adapter"])["training"]["step"] == summary["step"]


def test_dev_scores_are_the_receivers_letters(folders, tmp_path):
    run = prepare(adapter_config(folders, tmp_path))
    dev = DevSet(run.dev, 4)
    alone = dev.score(run.objective)
    open_adapter(run.objective.adapter)
    right = 0
    for example in run.dev:
        logits = predictions(run.objective, [example])[0, example.decisive, example.choice_ids]
        right += int(logits.argmax()) == example.row.answer
    score = dev.score(run.objective)
    assert score["receiver"] == alone["receiver"] == alone["adapter"]
    assert score["adapter"] == pytest.approx(100 * right / len(run.dev))
    assert score["loss"] != pytest.approx(alone["loss"], rel=1e-2)
    assert score["G"] == score["adapter"] - score["receiver"]


def test_a_stopped_run_ends_as_one_that_was_not(folders, tmp_path):
    rates = {"learning_rate": 1.0, "adapter_learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1}
    whole = train(adapter_config(folders, tmp_path / "whole", save_steps=2, max_steps=12, **rates))
    half = adapter_config(folders, tmp_path / "parts", save_steps=2, max_steps=12, **rates)
    with pytest.raises(Stopped):
        train(half, progress=stop_at(9))  # in the second epoch
    parts = train(half)
    assert parts["dev"] == pytest.approx(whole["dev"], rel=1e-4)
    for name in ("best", "checkpoint-12"):
        models = [load_adapter(tmp_path / run / name) for run in ("whole", "parts")]
        for a, b in zip(*(model.model.parameters() for model in models), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    state = json.loads((tmp_path / "whole" / "checkpoint-12" / "trainer_state.json").read_text())
    logged = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert logged[0] == pytest.approx(1e-3), "the adapter's own"
    best = tmp_path / "whole" / "best"
    assert {path.name for path in best.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", MANIFEST}
    manifest = describe(best)
    assert manifest["receiver"] == Receiver.from_pretrained(folders[0]).identity.to_dict()
    assert not {"data_dir", "output_dir", "store_dir"} & set(manifest["training"]["config"])
    assert manifest["training"]["examples"] == 32
    assert str(tmp_path) not in (best / "adapter_config.json").read_text()


def test_a_loaded_adapter_is_the_trained_one_merged(folders, tmp_path):
    run = prepare(adapter_config(folders, tmp_path))
    open_adapter(run.objective.adapter)
    run.keep({"step": 1})
    own = Receiver.from_pretrained(folders[0])
    before = [p.clone() for p in own.model.parameters()]
    example = run.train[0]
    options = RenderOptions(answer_prefix=example.row.answer_prefix)
    for receiver in (None, folders[0], own):
        merged = load_adapter(tmp_path / "best", receiver)
        with torch.no_grad():
            expected = predictions(run.objective, [example])[:, 0]
        logits = merged.next_logits(merged.encode(example.row.messages, options), kv_cache.empty_cache())
        assert torch.allclose(logits, expected, atol=1e-3)
        assert not any("lora" in name for name, _ in merged.model.named_parameters())
        assert not any(p.requires_grad for p in merged.model.parameters())
        assert merged.identity.weights != own.identity.weights
        assert merged.answer("Which is number 3?", max_new_tokens=2).new_tokens >= 1
    # a model that was handed in stays what it was
    assert all(torch.equal(a, b) for a, b in zip(before, own.model.parameters(), strict=True))


def test_an_untrained_adapter_loads_as_the_receiver_in_the_requested_precision(tmp_path):
    receiver = tiny_receiver()
    own = [p.clone() for p in receiver.model.parameters()]
    save_adapter(new_adapter(receiver, 3), receiver, tmp_path)
    merged = load_adapter(tmp_path, tiny_receiver())
    assert all(torch.equal(a, b) for a, b in zip(own, merged.model.parameters(), strict=True))
    assert load_adapter(tmp_path, tiny_receiver(), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_another_receiver_is_refused_and_named(tmp_path):
    receiver = tiny_receiver()
    save_adapter(new_adapter(receiver, 2), receiver, tmp_path)
    with pytest.raises(
        MismatchError, match=r"this adapter does not fit(.|\n)*weights: the adapter was made for"
    ) as one:
        load_adapter(tmp_path, tiny_receiver(seed=2))
    assert len(one.value.differences) == 1
    assert load_adapter(tmp_path, tiny_receiver(seed=2), allow_mismatch=True).name == "llama with adapter"
    with pytest.raises(MismatchError, match="architecture"):
        load_adapter(tmp_path, tiny_receiver("qwen2"), allow_mismatch=True)


def test_what_has_no_control_is_refused_and_the_folder_of_a_fusers_run_left_alone(folders, tmp_path):
    with pytest.raises(ConfigError, match="private context"):
        prepare(adapter_config(folders, tmp_path, adapter_of="memory"))
    train(config(folders, tmp_path, max_steps=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="output_dir"):
        train(adapter_config(folders, tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_reads_the_folder(tmp_path):
    from peft import PeftModel

    receiver = tiny_receiver()
    adapter = new_adapter(receiver, 2)
    open_adapter(adapter)
    save_adapter(adapter, receiver, tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        read = PeftModel.from_pretrained(build("llama", 1), str(tmp_path))(input_ids=ids).logits
        assert torch.equal(read, adapter(input_ids=ids).logits)
        assert not torch.allclose(read, build("llama", 1)(input_ids=ids).logits, atol=0.1)


def test_a_broken_folder_is_refused(tmp_path):
    receiver = tiny_receiver()
    save_adapter(new_adapter(receiver, 2), receiver, tmp_path)
    with pytest.raises(AdapterError, match="does not fit"):
        restore_adapter(new_adapter(tiny_receiver(), 3), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AdapterError, match="not what"):
        load_adapter(tmp_path, tiny_receiver())
    weights.unlink()
    with pytest.raises(AdapterError, match="missing"):
        load_adapter(tmp_path, tiny_receiver())
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(AdapterError, match=MANIFEST):
        load_adapter(tmp_path, tiny_receiver())


def test_without_peft_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AdapterError, match="pip install 'peft"):
        new_adapter(tiny_receiver(), 2)


def test_the_command_trains_the_control_of_the_files_fuser(folders, tmp_path):
    values = {
        "receiver": folders[0],
        "sharer": folders[1],
        "data_dir": folders[2],
        "train": [{"path": "train.jsonl"}],
        "dev": [{"path": "dev.jsonl"}],
        "output_dir": str(tmp_path / "run"),
        "family": "c2c",
        "layer_map": "terminal",
        "fuser_options": {"hidden_dim": 16, "intermediate_dim": 16},
        "batch_size": 4,
        "max_steps": 2,
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values))
    run = CliRunner().invoke(app, ["train", str(path), "--family", "adapter", "--json"])
    assert run.exit_code == 0, run.output
    summary = json.loads(run.stdout.splitlines()[-1])
    assert summary["matched"]["family"] == "c2c"
    shown = CliRunner().invoke(app, ["train", str(path), "--family", "adapter"])
    assert "dev accuracy" in shown.stdout
    assert f"rank {summary['rank']}" in shown.stdout
    path.write_text(json.dumps(values | {"family": "adapter", "layer_map": "depth"}))
    refused = CliRunner().invoke(app, ["prefill", str(path), "--store-dir", str(tmp_path / "store")])
    assert refused.exit_code != 0
    assert "no prefill can be stored" in refused.output + str(refused.exception)
