"""The benchmarks run, on tiny shapes, and print what they promise."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def train_step(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import train_step

    return train_step


@pytest.fixture
def arguments():
    return argparse.Namespace(tokens=12, response=4, rounds=1, seed=1, json=True, only=None)


def test_train_step_measures_every_fuser_warm_and_cold(train_step, arguments, monkeypatch, capsys):
    def in_this_process(name, given):
        receiver, sharer = (config(**SIZES, **HEADS) for config in (LlamaConfig, Qwen2Config))
        return json.loads(json.dumps(train_step.measure(name, given, receiver, sharer)))

    monkeypatch.setattr(train_step, "_in_process_of_its_own", in_this_process)
    monkeypatch.setattr(train_step, "_arguments", lambda: arguments)
    train_step.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("default", "default_bf16", "published", "published_bf16"):
        assert result[f"seconds_{name}_warm"] > 0
        assert result[f"seconds_{name}_cold"] > 0
        assert result["runs"][name]["peak_rss_gb"] <= result["peak_rss_gb"]
    assert {"versions", "rounds", "machine", "ratios", "reference"} <= result.keys()
    assert result["runs"]["published"]["parameters"] > result["runs"]["default"]["parameters"]


def test_train_step_takes_its_steps_on_stored_and_on_new_caches(train_step, arguments):
    receiver, sharer = (config(**SIZES, **HEADS) for config in (LlamaConfig, Qwen2Config))
    model = train_step._model("default", receiver, sharer, seed=1)
    example = train_step._example(arguments, SIZES["vocab_size"])
    for options, prefills in ({}, 1), ({"budget": 0}, 3):
        training = train_step._training(model, **options)
        for _ in range(3):
            training([example])
        assert training.sharer_store.computed == prefills


def test_train_step_gives_each_fuser_and_precision_a_process(train_step, arguments, monkeypatch):
    seen = []

    def run(command, **kwargs):
        seen.append(command)
        return argparse.Namespace(stdout='a line before\n{"seconds": {}}\n')

    monkeypatch.setattr(train_step.subprocess, "run", run)
    assert train_step._in_process_of_its_own("published_bf16", arguments) == {"seconds": {}}
    monkeypatch.setattr(sys, "argv", seen[0][1:])
    given = train_step._arguments()
    assert (given.only, given.tokens, given.response, given.rounds) == ("published_bf16", 12, 4, 1)


def test_handoff_reads_a_document_once_for_all_questions(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import handoff
    from tiny import pair

    model = pair(fuser="memory", fuser_options={"rank": 4})
    torch.nn.init.normal_(model.fusers[0].weight, std=0.3)
    model.fusers[0].config.training = {"config": "random"}
    text = "The fox sleeps in a red house by the sea. " * 2
    read = []
    original = type(model.sharers[0]).read
    monkeypatch.setattr(type(model.sharers[0]), "read", lambda *a, **k: read.append(1) or original(*a, **k))
    ways = handoff._ways(model, text, 3, 2)
    ways["handoff, read once"]()
    assert len(read) == 1
    ways["handoff, read for each"]()
    assert len(read) == 4
    result = handoff.measure(model, text, 2, 2, 1)
    assert result["over_handoff"]["handoff, read once"] == 1
    sizes = [result["handoff"][precision]["bytes_per_token"] for precision in handoff.PRECISIONS]
    assert sizes[0] == 2 * sizes[1] > sizes[2]
    assert handoff.table(result).row_count == 4 + 1 + len(handoff.PRECISIONS)
