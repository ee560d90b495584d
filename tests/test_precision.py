"""Steps in bfloat16: near float32 in loss and gradients, with weights, prefills and dev scores as in float32."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from c2c.config import ConfigError
from c2c.fusers.base import load_fuser
from c2c.training.config import ADAPTER, load_config
from c2c.training.dev_set import DevSet
from c2c.training.run import fill, initialise, prepare, train
from tiny import assert_equal_caches
from training_rig import config as training_config
from training_rig import make_folders, private_config

FAMILIES = {
    "bottleneck": {"rank": 8},
    "c2c": {"hidden_dim": 32, "intermediate_dim": 48, "dropout": 0.0, "anneal_steps": 4},
    "memory": {"rank": 8},
}
NEEDS_PEFT = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
ALL = [*FAMILIES, pytest.param(ADAPTER, marks=NEEDS_PEFT)]
ADAPTED = pytest.param(ADAPTER, 0.0, marks=NEEDS_PEFT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp)


def config(folders, output, family="bottleneck", **changes):
    values = {"family": family, "fuser_options": FAMILIES.get(family, {"rank": 8}), "precision": "bfloat16"}
    values |= {"max_steps": 4, "epochs": 1.0, "eval_steps": 2, "save_steps": 2, "calibration": 4, "warmup_steps": 0}
    made = private_config if family == "memory" else training_config
    return made(folders, output, **(values | changes))


def prepared_for(folders, output, family, **changes):
    """A run before its first step whose trained part is not at its zero start, where half of the gradients vanish."""
    made = config(folders, output, family, **changes)
    run = prepare(made)
    initialise(run)
    generator = torch.Generator().manual_seed(3)
    for parameter in run.objective.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return run


def loss_and_gradients(run, precision):
    run.objective.precision = precision
    run.objective.train()
    run.objective.zero_grad()
    torch.manual_seed(5)  # the draws of the gates
    loss = run.objective(run.train[:4])["loss"]
    loss.backward()
    named = {name: p for name, p in run.objective.named_parameters() if p.requires_grad}
    return loss.detach(), {name: p.grad for name, p in named.items()}


def difference(one, other) -> float:
    """How far apart two lists of tensors are, relative to the second."""
    apart = sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True))
    return (apart / sum(float(b.square().sum()) for b in other)) ** 0.5


@pytest.mark.parametrize(("family", "guard"), [*((name, 0.0) for name in FAMILIES), ("bottleneck", 1.0), ADAPTED])
def test_loss_and_gradients_are_near_those_of_float32(folders, tmp_path, family, guard):
    """Random tiny models magnify a rounding by about ten; a forgotten or doubled term would be far outside."""
    run = prepared_for(folders, tmp_path, family, guard_weight=guard)
    exact_loss, exact = loss_and_gradients(run, "float32")
    loss, near = loss_and_gradients(run, "bfloat16")
    assert loss.dtype == torch.float32
    assert loss != exact_loss  # something is computed in bfloat16
    assert float(loss) == pytest.approx(float(exact_loss), rel=0.01)
    assert {gradient.dtype for gradient in near.values()} == {torch.float32}
    assert difference(near.values(), exact.values()) < 0.12
    for name, gradient in exact.items():
        assert difference([near[name]], [gradient]) < 0.3, name


@pytest.mark.parametrize("family", ALL)
def test_weights_optimizer_and_file_stay_in_float32(folders, tmp_path, family):
    train(config(folders, tmp_path, family))
    (weights,) = [*tmp_path.glob("checkpoint-4/*model.safetensors")]
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float32}
    state = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert {value.dtype for slot in state.values() for value in slot.values()} == {torch.float32}


def test_what_is_stored_does_not_depend_on_the_precision(folders, tmp_path):
    """Prompts that are prefilled within a step (``fill: training``) are found by runs of any precision."""
    runs = [
        prepare(config(folders, tmp_path, store_dir=str(tmp_path / name), fill="training", precision=name))
        for name in ("float32", "bfloat16")
    ]
    for run in runs:
        run.objective(run.train[:4])["loss"].backward()
    caches = [run.objective.collate(run.train[:4]) for run in runs]
    for side in ("receiver_cache", "sharer_cache"):
        assert_equal_caches(*(getattr(cache, side) for cache in caches))
    assert runs[1].objective.receiver_store.computed == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_dev_scores_are_those_of_float32(folders, tmp_path, family):
    run = prepared_for(folders, tmp_path, family)
    fill(run)
    score = DevSet(run.dev, 4).score(run.objective)
    run.objective.precision = "float32"
    assert DevSet(run.dev, 4).score(run.objective) == score


@pytest.mark.parametrize("family", ALL)
def test_a_run_goes_on_bit_for_bit(folders, tmp_path, family):
    options = FAMILIES["c2c"] | {"dropout": 0.1} if family == "c2c" else FAMILIES.get(family, {"rank": 8})
    same = {"fuser_options": options, "schedule": "constant"}  # whose other schedules depend on max_steps
    train(config(folders, tmp_path / "whole", family, **same))
    train(config(folders, tmp_path / "parts", family, max_steps=2, **same))
    train(config(folders, tmp_path / "parts", family, **same))
    (one,), (other,) = ([*(tmp_path / name).glob("checkpoint-4/*model.safetensors")] for name in ("whole", "parts"))
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_precision_is_recorded_and_a_run_is_not_resumed_in_another(folders, tmp_path):
    summary = train(config(folders, tmp_path))
    assert load_fuser(summary["fuser"]).config.training["config"]["precision"] == "bfloat16"
    with pytest.raises(ConfigError, match="precision was 'bfloat16', is 'float32'"):
        train(config(folders, tmp_path, precision="float32"))


def test_other_precisions_are_refused(tmp_path):
    text = "receiver: a\nsharer: b\noutput_dir: c\ntrain: [{path: x}]\ndev: [{path: x}]\n"
    (tmp_path / "a.yaml").write_text(text)
    assert load_config(tmp_path / "a.yaml").precision == "float32"
    (tmp_path / "a.yaml").write_text(text + "precision: float16")
    with pytest.raises(ConfigError, match="precision is 'float16'; expected 'float32' or 'bfloat16'"):
        load_config(tmp_path / "a.yaml")
