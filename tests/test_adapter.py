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
    save_adapter,
    trainable,
)
from c2c.training import adapter as adapters
from c2c.training.adapter import AdapterTraining, Tokenizers, pieces, prepare_adapter, score
from c2c.training.config import TrainConfig, load_config
from c2c.training.prepared import prepare
from c2c.training.run import train
from c2c.training.step import FuserTraining
from tiny import build, pair_folders, tokenizer

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny receiver and sharer, and questions whose answer hangs on their number."""
    made = pair_folders(tmp_path_factory.mktemp)
    data = tmp_path_factory.mktemp("data")
    for split, start, count in (("train", 0, 24), ("dev", 100, 6), ("test", 3, 2)):
        rows = [
            {
                "id": str(i),
                "question": f"Which is number {i}?",
                "choices": ["fox", "dog", "sun", "sea"],
                "answer": i % 4,
            }
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
        "train": [DataSource("train.jsonl"), DataSource("train.jsonl", form="sentence", limit=8)],
        "dev": [DataSource("dev.jsonl")],
        "output_dir": str(output),
        "family": "adapter",
        "fuser_options": {"rank": 16},
        "max_steps": 6,
        "batch_size": 4,
        "eval_steps": 2,
    }
    return TrainConfig(**(values | changes))


def open_adapter(adapter) -> None:
    """Let a new adapter change its receiver."""
    draw = torch.Generator().manual_seed(1)
    for parameter in trainable(adapter):
        torch.nn.init.normal_(parameter, std=0.1, generator=draw)


def predictions(training, examples):
    return training.logits(training.collate(examples))


def losses(training, examples):
    batch = training.collate(examples)
    return training.losses(training.logits(batch), batch)


def tiny_receiver(family="llama", seed=1) -> Receiver:
    return Receiver(build(family, seed), tokenizer("chatml"), family)


def test_a_new_adapter_leaves_the_receiver_bit_for_bit_as_it_is(folders, tmp_path):
    prepared = prepare_adapter(config(folders, tmp_path))
    training, examples = prepared.training, prepared.train[:4]
    with torch.no_grad():
        new = predictions(training, examples)
        with training.adapter.disable_adapter():
            assert torch.equal(new, predictions(training, examples))
        open_adapter(training.adapter)
        assert not torch.allclose(new, predictions(training, examples), atol=0.1)


def test_the_loss_is_that_of_the_receivers_own_next_token(folders, tmp_path):
    prepared = prepare_adapter(config(folders, tmp_path))
    example = next(example for example in prepared.train if example.row.answer_prefix)
    receiver = Receiver.from_pretrained(folders[0])
    tokens = receiver.encode(example.row.messages, RenderOptions(answer_prefix=example.row.answer_prefix))
    own = receiver.next_logits(tokens, kv_cache.empty_cache())
    with torch.no_grad():
        assert torch.allclose(predictions(prepared.training, [example])[:, 0], own, atol=1e-4)
        nats = -predictions(prepared.training, [example])[0].log_softmax(-1)
        weighted = [w * nats[i, t] for i, (w, t) in enumerate(zip(example.weights, example.response_ids, strict=True))]
        assert float(losses(prepared.training, [example])) == pytest.approx(float(sum(weighted)), rel=1e-4)


def test_a_padded_batch_has_the_losses_and_gradients_of_its_examples(folders, tmp_path):
    prepared = prepare_adapter(config(folders, tmp_path))
    training = prepared.training
    open_adapter(training.adapter)
    examples = [prepared.train[0], prepared.train[20], *prepared.train[-2:]]
    assert len({len(e.receiver_ids) for e in examples}) > 1
    assert len({len(e.response_ids) for e in examples}) > 1
    results = []
    for size in (4, 1):
        training.zero_grad()
        found = [losses(training, piece) for piece in pieces(examples, size)]
        torch.cat(found).mean().backward()
        results.append((torch.cat(found).detach(), [p.grad.clone() for p in trainable(training.adapter)]))
    (together, padded), (alone, single) = results
    assert torch.allclose(together, alone, atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(padded, single, strict=True))
    assert any(float(gradient.abs().max()) > 1e-2 for gradient in single)


def test_gradients_reach_the_adapter_and_nothing_else(folders, tmp_path):
    prepared = prepare_adapter(config(folders, tmp_path))
    open_adapter(prepared.training.adapter)
    prepared.training(prepared.train[:4])["loss"].backward()
    with_gradient = {name for name, p in prepared.training.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all(".lora_" in name for name in with_gradient)
    assert len(with_gradient) == 2 * len(linear_layers(build("llama")))


def test_rows_and_batches_are_those_of_a_fuser_run(folders, tmp_path):
    longest = max(len(example.receiver_ids) for example in prepare_adapter(config(folders, tmp_path)).train)
    changes = {"exclude": ["test.jsonl"], "max_prompt_tokens": longest - 1, "max_steps": 8, "eval_steps": 8}
    ours = config(folders, tmp_path / "adapter", **changes)
    theirs = config(folders, tmp_path / "fuser", **changes, family="bottleneck", calibration=0)
    adapter, fuser = prepare_adapter(ours), prepare(theirs)
    assert adapter.dropped == fuser.dropped
    assert set(adapter.dropped) == {"question is in an excluded file", "prompt too long"}
    assert [e.row for e in adapter.dev] == [e.row for e in fuser.dev]
    for mine, other in zip(adapter.train, fuser.train, strict=True):
        assert (mine.row, mine.receiver_ids, mine.response_ids) == (other.row, other.receiver_ids, other.response_ids)
        assert (mine.weights, mine.decisive, mine.choice_ids) == (other.weights, other.decisive, other.choice_ids)
    seen = {"adapter": [], "fuser": []}

    def note(name, examples):
        seen[name].append(sorted(example.row.id for example in examples))

    step, forward = adapters.AdapterTrainer.training_step, FuserTraining.forward

    def noted_step(self, model, inputs, *rest):
        note("adapter", inputs["examples"])
        return step(self, model, inputs, *rest)

    def noted_forward(self, examples):
        note("fuser", examples)
        return forward(self, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters.AdapterTrainer, "training_step", noted_step)
        patch.setattr(FuserTraining, "forward", noted_forward)
        train(ours)
        train(theirs)
    assert len(seen["adapter"]) == 8
    assert seen["adapter"] == seen["fuser"]


def test_prompts_that_only_the_sharer_finds_too_long_are_dropped_here_too(folders, tmp_path):
    changes = {"train": [DataSource("train.jsonl"), DataSource("train.jsonl", form="published")]}
    everything = prepare_adapter(config(folders, tmp_path, max_prompt_tokens=512, **changes))
    longest = max(len(e.receiver_ids) for e in everything.train)
    too_long = sum(len(e.sharer_ids) > longest for e in everything.train)
    fewer = prepare_adapter(config(folders, tmp_path, max_prompt_tokens=longest, **changes))
    assert too_long > 0
    assert fewer.dropped["prompt too long"] == too_long


def test_the_sharers_weights_are_not_in_memory(folders, tmp_path, monkeypatch):
    seen = []
    original = adapters.read_examples
    monkeypatch.setattr(adapters, "read_examples", lambda c, pair, build: seen.append(pair) or original(c, pair, build))
    prepare_adapter(config(folders, tmp_path))
    assert isinstance(seen[0], Tokenizers)
    assert all(parameter.is_meta for parameter in seen[0].sharers[0].model.parameters())


@pytest.mark.parametrize(
    ("family", "options"), [("bottleneck", {"rank": 16}), ("c2c", {"hidden_dim": 16, "intermediate_dim": 16})]
)
def test_the_adapter_has_the_size_of_the_fuser_within_a_rank(folders, tmp_path, family, options):
    changes = {"fuser_options": options, "layer_map": "terminal"}
    adapter = prepare_adapter(config(folders, tmp_path, adapter_of=family, **changes))
    fuser = prepare(config(folders, tmp_path, family=family, **changes)).training.fuser
    wanted = sum(p.numel() for p in fuser.parameters())
    assert adapter.matched == {"family": family, "parameters": wanted}
    assert adapter.parameters == adapter.rank * parameters_per_rank(Receiver.from_pretrained(folders[0]).model)
    assert adapter.rank > 1
    assert abs(adapter.parameters - wanted) <= adapter.parameters / adapter.rank / 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_all_layers_of_attention_and_mlp_are_adapted_and_the_head_is_not(family):
    receiver = tiny_receiver(family)
    count = len(linear_layers(receiver.model))
    assert count == 7 * receiver.geometry.layers
    adapter = new_adapter(receiver, 2)
    wrapped = [name for name, module in adapter.named_modules() if hasattr(module, "lora_A")]
    assert len(wrapped) == count
    assert all("self_attn" in name or "mlp" in name for name in wrapped)


def test_nearest_rank_is_nearest():
    model = build("llama")
    cost = parameters_per_rank(model)
    assert [nearest_rank(model, n) for n in (1, cost, int(2.4 * cost), int(2.6 * cost))] == [1, 1, 2, 3]
    with pytest.raises(AdapterError, match="at least one"):
        nearest_rank(model, 0)


def test_training_fits_a_small_set_and_keeps_the_most_accurate(folders, tmp_path):
    changes = {"train": [DataSource("train.jsonl", limit=8)], "dev": [DataSource("train.jsonl", limit=8)]}
    summary = train(
        config(folders, tmp_path, max_steps=60, eval_steps=20, adapter_learning_rate=1e-2, **changes),
    )
    scores = json.loads((tmp_path / "dev.json").read_text())
    assert list(scores) == ["20", "40", "60"]
    assert summary["dev"]["adapter"] == max(entry["adapter"] for entry in scores.values())
    assert summary["dev"]["adapter"] >= summary["dev"]["receiver"] + 40
    assert scores["60"]["loss"] < 0.5 * scores["20"]["loss"]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert describe(summary["adapter"])["training"]["step"] == summary["step"]


def test_dev_scores_are_the_receivers_letters(folders, tmp_path):
    prepared = prepare_adapter(config(folders, tmp_path))
    alone = score(prepared.training, prepared.dev, 1, alone=True)
    open_adapter(prepared.training.adapter)
    assert score(prepared.training, prepared.dev, 1, alone=True) == alone
    right = 0
    for example in prepared.dev:
        logits = predictions(prepared.training, [example])[0, example.decisive, example.choice_ids]
        right += int(logits.argmax()) == example.row.answer
    accuracy, loss = score(prepared.training, prepared.dev, 4)
    assert accuracy == pytest.approx(100 * right / len(prepared.dev))
    assert loss != pytest.approx(alone[1], rel=1e-2)


def test_the_receivers_own_weights_are_not_changed(folders, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        kept = []
        original = adapters.prepare_adapter
        patch.setattr(adapters, "prepare_adapter", lambda c: kept.append(original(c)) or kept[0])
        train(config(folders, tmp_path, adapter_learning_rate=1e-2))
    trained = {
        name.replace(".base_layer", ""): p for name, p in kept[0].training.adapter.get_base_model().named_parameters()
    }
    own = dict(Receiver.from_pretrained(folders[0]).model.named_parameters())
    assert all(torch.equal(trained[name], weight) for name, weight in own.items())
    changed = [p for name, p in trained.items() if "lora_B" in name and bool(p.any())]
    assert len(changed) == len(linear_layers(build("llama")))


def test_a_run_that_was_stopped_gives_the_result_of_one_that_was_not(folders, tmp_path):
    whole = train(config(folders, tmp_path / "whole", save_steps=2, max_steps=12))

    class Killed(Exception):
        pass

    original = adapters.AdapterSelection.on_step_end

    def stop_at_9(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 9:  # in the second epoch
            raise Killed

    half = config(folders, tmp_path / "parts", save_steps=2, max_steps=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters.AdapterSelection, "on_step_end", stop_at_9)
        with pytest.raises(Killed):
            train(half)
    seen = []
    parts = train(half, progress=lambda stage, done, total: seen.append((stage, done, total)))
    assert seen == [("training", step, 12) for step in range(9, 13)]
    assert parts["dev"] == pytest.approx(whole["dev"], rel=1e-4)
    for name in ("best", "checkpoint-12"):
        models = [load_adapter(tmp_path / run / name) for run in ("whole", "parts")]
        for a, b in zip(*(model.model.parameters() for model in models), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    scores = [json.loads((tmp_path / run / "dev.json").read_text()) for run in ("whole", "parts")]
    assert list(scores[0]) == list(scores[1])


def test_a_loaded_adapter_is_the_trained_one_merged(folders, tmp_path):
    prepared = prepare_adapter(config(folders, tmp_path))
    open_adapter(prepared.training.adapter)
    prepared.keep(tmp_path, {"step": 1})
    own = Receiver.from_pretrained(folders[0])
    before = [p.clone() for p in own.model.parameters()]
    example = prepared.train[0]
    options = RenderOptions(answer_prefix=example.row.answer_prefix)
    for receiver in (None, folders[0], own):
        merged = load_adapter(tmp_path / "best", receiver)
        with torch.no_grad():
            expected = predictions(prepared.training, [example])[:, 0]
        logits = merged.next_logits(merged.encode(example.row.messages, options), kv_cache.empty_cache())
        assert torch.allclose(logits, expected, atol=1e-3)
        assert not any("lora" in name for name, _ in merged.model.named_parameters())
        assert not any(p.requires_grad for p in merged.model.parameters())
        assert merged.identity.weights != own.identity.weights
        assert merged.answer("Which is number 3?", max_new_tokens=2).new_tokens >= 1
    # a model that was handed in stays what it was
    assert all(torch.equal(a, b) for a, b in zip(before, own.model.parameters(), strict=True))


def test_an_untrained_adapter_loads_as_the_receiver(tmp_path):
    receiver = tiny_receiver()
    own = [p.clone() for p in receiver.model.parameters()]
    save_adapter(new_adapter(receiver, 3), receiver, tmp_path)
    merged = load_adapter(tmp_path, tiny_receiver())
    assert all(torch.equal(a, b) for a, b in zip(own, merged.model.parameters(), strict=True))


def test_half_precision_is_what_was_asked_for(tmp_path):
    receiver = tiny_receiver()
    save_adapter(new_adapter(receiver, 3), receiver, tmp_path)
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


@pytest.mark.parametrize("rank", [0, -4, 2.5, "8", True])
def test_an_impossible_rank_is_refused(folders, tmp_path, rank):
    with pytest.raises(AdapterError, match="rank is"):
        prepare_adapter(config(folders, tmp_path, adapter_rank=rank))


def test_a_fuser_of_private_context_has_no_control(folders, tmp_path):
    with pytest.raises(ConfigError, match="private context"):
        prepare_adapter(config(folders, tmp_path, adapter_of="memory"))


def test_the_folder_of_a_fusers_run_is_left_alone(folders, tmp_path):
    train(config(folders, tmp_path, family="bottleneck", max_steps=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="output_dir"):
        train(config(folders, tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_given_rank_is_taken(folders, tmp_path):
    assert prepare_adapter(config(folders, tmp_path, adapter_rank=3)).rank == 3


def test_an_impossible_learning_rate_is_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="adapter_learning_rate"):
        train(config(folders, tmp_path, adapter_learning_rate=0.0))


def test_the_adapters_learning_rate_is_its_own(folders, tmp_path):
    train(config(folders, tmp_path, learning_rate=1.0, adapter_learning_rate=1e-3, warmup_steps=0, logging_steps=1))
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert rates[0] == pytest.approx(1e-3)


def test_the_folder_has_no_pickle_and_no_place_of_this_machine(folders, tmp_path):
    train(config(folders, tmp_path / "run"))
    best = tmp_path / "run" / "best"
    assert {path.name for path in best.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", MANIFEST}
    manifest = describe(best)
    assert manifest["receiver"] == Receiver.from_pretrained(folders[0]).identity.to_dict()
    assert manifest["training"]["config"]["adapter_of"] == "bottleneck"
    assert not {"data_dir", "output_dir", "store_dir"} & set(manifest["training"]["config"])
    assert manifest["training"]["examples"] == 32
    assert str(tmp_path) not in (best / "adapter_config.json").read_text()


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


def test_weights_of_another_rank_are_refused(tmp_path):
    receiver, other = tiny_receiver(), tiny_receiver()
    save_adapter(new_adapter(receiver, 2), receiver, tmp_path / "two")
    with pytest.raises(AdapterError, match="does not fit"):
        adapters.restore_adapter(new_adapter(other, 3), tmp_path / "two")


def test_without_peft_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AdapterError, match="pip install 'peft"):
        new_adapter(tiny_receiver(), 2)


def test_the_receiver_stays_in_eval_mode_while_training(folders, tmp_path):
    training: AdapterTraining = prepare_adapter(config(folders, tmp_path)).training
    training.train()
    assert training.training
    assert not any(module.training for module in training.adapter.modules())


@pytest.fixture
def written(folders, tmp_path):
    """The config of a fuser, as a file."""
    path = tmp_path / "config.yaml"
    path.write_text(
        json.dumps(
            {
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
        )
    )
    return path


def test_the_command_trains_the_control_of_the_files_fuser(written):
    assert load_config(written).adapter_of == "bottleneck"
    assert load_config(written, family="adapter").adapter_of == "c2c"
    assert load_config(written, family="adapter", adapter_of="linear").adapter_of == "linear"
    run = CliRunner().invoke(app, ["train", str(written), "--family", "adapter", "--json"])
    assert run.exit_code == 0, run.output
    summary = json.loads(run.stdout.splitlines()[-1])
    assert summary["matched"]["family"] == "c2c"
    assert summary["dev"]["n"] == 6
    shown = CliRunner().invoke(app, ["train", str(written), "--family", "adapter"])
    assert "dev accuracy" in shown.stdout
    assert f"rank {summary['rank']}" in shown.stdout


def test_prefilling_for_an_adapter_is_refused(written, tmp_path):
    written.write_text(written.read_text().replace('"c2c"', '"adapter"').replace('"terminal"', '"depth"'))
    run = CliRunner().invoke(app, ["prefill", str(written), "--store-dir", str(tmp_path / "store")])
    assert run.exit_code != 0
    assert "no prefill can be stored" in run.output + str(run.exception)
