"""Tiny models, rows and configurations for tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from c2c.data.config import DataSource
from c2c.training import TrainConfig
from c2c.training.config import ADAPTER
from tiny import pair_folders

WORDS = ["fox", "dog", "sun", "sea"]
PASSAGES = [
    "The fox sleeps in a red house by the sea.",
    "A dog and a cat went to the market, and bought three fish and a loaf of bread.",
    "Rain fell for a week.",
]


class Stopped(Exception):
    """Raised in the midst of a run."""


def open_fuser(run) -> None:
    """Let a new fuser change the receiver's cache."""
    draw = torch.Generator().manual_seed(1)
    for name in {"up", "weight"} & dict(run.objective.fuser.named_parameters()).keys():
        torch.nn.init.normal_(getattr(run.objective.fuser, name), std=0.4, generator=draw)


def stop_at(step: int):
    """Progress that ends a run after a step."""

    def stop(stage, done, total):
        if stage == "training" and done == step:
            raise Stopped

    return stop


def make_folders(make_folder) -> tuple[str, str, str]:
    """Folders of a tiny receiver and sharer, and of rows; ``make_folder(name)`` makes one.

    Only the words of a question give its answer away. Passages are private: each answers several questions.
    """
    receiver, sharer = pair_folders(make_folder)
    data = Path(make_folder("data"))
    for split, start, count in (("train", 0, 24), ("dev", 100, 6), ("test", 3, 2)):
        rows = [
            {"id": str(i), "question": f"Which is number {i}?", "choices": WORDS, "answer": i % 4}
            for i in range(start, start + count)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = ["fox", "dog", "rain"]
    private = [
        {"id": f"{i}", "context": PASSAGES[i % 3], "question": f"Who was number {i}?", "answer": answers[i % 3]}
        for i in range(12)
    ]
    (data / "private.jsonl").write_text("".join(json.dumps(row) + "\n" for row in private))
    return receiver, sharer, str(data)


def config(folders, output, **changes) -> TrainConfig:
    """A short run on the questions."""
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


def private_config(folders, output, **changes) -> TrainConfig:
    """A short run on the passages."""
    source = DataSource("private.jsonl", kind="private_question")
    values = {"train": [source], "dev": [source], "family": "memory", "warmup_steps": 0, "calibration": 12}
    return config(folders, output, **(values | {"max_steps": -1, "epochs": 2.0, "eval_steps": None} | changes))


def adapter_config(folders, output, **changes) -> TrainConfig:
    """A short run of the control."""
    values = {
        "train": [DataSource("train.jsonl"), DataSource("train.jsonl", form="sentence", limit=8)],
        "family": ADAPTER,
        "fuser_options": {"rank": 16},
    }
    return config(folders, output, **(values | changes))
