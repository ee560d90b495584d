"""Training in processes of their own: killed at any moment, and two at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from c2c.training.trainer import last_complete
from training_rig import config, make_folders

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Configs for one run each, on the same tiny models and data."""
    folders = make_folders(tmp_path_factory.mktemp)
    folder = tmp_path_factory.mktemp("runs")

    def write(name, **changes) -> list[str]:
        steps = {"max_steps": 12, "eval_steps": 4, "save_steps": 2, "logging_steps": 1}
        values = asdict(config(folders, folder / name, **steps, **changes))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return ["-m", "c2c", "train", str(folder / f"{name}.yaml"), "--json"]

    return folder, write


@pytest.fixture(scope="module")
def alone(setting):
    """The folder of an unbroken run of one process."""
    folder, write = setting
    run(write("alone"))
    return folder / "alone"


def run(command, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*launcher, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # one object, and nothing else


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")


def losses(folder: Path, step: int) -> list[float]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def assert_same_weights(first, second, tolerance):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=tolerance), name


@pytest.mark.slow
def test_killed_and_resumed_equals_unbroken(setting, alone):
    folder, write = setting
    command = write("killed")
    process = subprocess.Popen(
        [sys.executable, *command], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((folder / "killed").glob("checkpoint-[4-9]*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "killed" / "summary.json").exists()
    summary = run(command)
    assert summary["dev"] == json.loads((alone / "summary.json").read_text())["dev"]
    assert_same_weights(weights(alone, 12), weights(folder / "killed", 12), 0.0)


@pytest.mark.slow
def test_two_processes_train_like_one(setting, alone):
    folder, write = setting
    summary = run(write("together"), processes=2)
    assert summary["processes"] == 2
    assert losses(folder / "together", 12) == pytest.approx(losses(alone, 12), abs=2e-3)
    assert_same_weights(weights(alone, 12), weights(folder / "together", 12), 1e-3)


@pytest.mark.slow
def test_two_processes_fill_one_store(setting, alone):
    folder, write = setting
    run(write("shared", store_dir=str(folder / "store")), processes=2)
    assert sorted(len(list(part.glob("*.safetensors"))) for part in (folder / "store").iterdir()) == [30, 30]
    assert_same_weights(weights(alone, 12), weights(folder / "shared", 12), 1e-3)


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path):
    for step, complete in ((2, True), (4, True), (6, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{")
        if complete:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-6").exists()
    assert last_complete(tmp_path / "nowhere") is None
