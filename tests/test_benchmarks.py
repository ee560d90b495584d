"""The benchmarks measure what they promise, on tiny shapes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config

from tiny import memory_pair

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))


def test_a_training_step_is_measured_warm_and_cold():
    import train_step

    arguments = argparse.Namespace(tokens=12, response=4, rounds=1, seed=1)
    models = LlamaConfig(**SIZES, **HEADS), Qwen2Config(**SIZES, **HEADS)
    parts = {name: train_step.measure(name, arguments, *models) for name in ("default", "published_bf16")}
    result = json.loads(json.dumps(train_step.summary(parts, arguments)))
    for name, part in parts.items():
        assert result[f"seconds_{name}_warm"] > 0
        assert result[f"seconds_{name}_cold"] > 0
        assert part["peak_rss_gb"] <= result["peak_rss_gb"]
    assert {"versions", "rounds", "machine", "ratios", "reference"} <= result.keys()
    assert parts["published_bf16"]["parameters"] > parts["default"]["parameters"]


def test_a_document_is_handed_over_once_for_all_questions(monkeypatch):
    import handoff

    model = memory_pair()
    sharer, read = model.sharers[0], []
    original = sharer.read
    monkeypatch.setattr(sharer, "read", lambda *args, **kwargs: read.append(1) or original(*args, **kwargs))
    result = handoff.measure(model, "The fox sleeps in a red house by the sea. " * 2, 3, 2, 1)
    assert len(read) < 2 * (3 + 1) + 3  # a warm-up and a round: once for all, and once for each question
    assert result["over_handoff"]["handoff, read once"] == 1
    sizes = [result["handoff"][precision]["bytes_per_token"] for precision in handoff.PRECISIONS]
    assert sizes[0] == 2 * sizes[1] > sizes[2]
    assert handoff.table(result).row_count == len(result["seconds"]) + 1 + len(handoff.PRECISIONS)
