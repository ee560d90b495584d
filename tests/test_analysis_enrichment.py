"""The cache-enrichment oracle, and scaling over result files."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from c2c import kv_cache
from c2c.analysis.config import AnalysisError, EnrichmentConfig, ScalingConfig
from c2c.analysis.enrichment import drop_columns, encode_prompts, measure_enrichment
from c2c.analysis.scaling import count_parameters, measure_scaling
from c2c.cli.app import app
from c2c.data.formats import letter_form
from c2c.errors import CacheError
from c2c.language_model import LanguageModel
from tiny import build, pair_folders, tokenizer

WORDS = ["fox", "dog", "sun", "sea"]


def write(path, numbers):
    rows = [
        {"id": str(i), "question": f"Which is number {i}?", "choices": WORDS[: 2 + i % 3], "answer": i % 2}
        for i in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write(folder / "test.jsonl", range(6)), write(folder / "train.jsonl", range(4, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pair_folders(tmp_path_factory.mktemp)[0]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def model(request):
    return LanguageModel(build(request.param, 1), tokenizer("chatml"))


@pytest.fixture(scope="module")
def shots():
    return [letter_form("Is the sky blue?", ["yes", "no"], 0), letter_form("Is the sea dry?", ["yes", "no"], 1)]


ROW = letter_form("Which one barks?", WORDS, 1)


def test_enriched_entries_have_the_questions_positions_and_have_read_the_exemplars(model, shots):
    """In the first layer entries depend on token and position only: there they are those of the direct prompt."""
    direct, few_shot, head = encode_prompts(model, ROW, shots)
    ours, long = direct.ids[0].tolist(), few_shot.ids[0].tolist()
    end = head + len(long) - len(ours)
    assert long[:head] + long[end:] == ours
    assert long[end - 1] != ours[head - 1]  # no token of the question is left out
    dropped = model.tokenizer.decode(long[head:end])
    found = [text in dropped for text in ("Is the sky blue?", "The answer is B", "Which one barks?")]
    assert found == [True, True, False]

    full, own = (model.prefill(tokens, tokens.length - 1) for tokens in (few_shot, direct))
    short = drop_columns(model, full, head, end - head)
    assert kv_cache.length(short) == kv_cache.length(own) < kv_cache.length(full)
    for mine, alone in zip(kv_cache.layer(short, 0), kv_cache.layer(own, 0), strict=True):
        assert torch.allclose(mine, alone, atol=1e-4)
    unmoved = kv_cache.layer(full, 0)[0][:, :, end:]
    assert not torch.allclose(unmoved, kv_cache.layer(own, 0)[0][:, :, head:], atol=1e-2)
    for layer in range(1, model.geometry.layers):
        mine, alone = kv_cache.layer(short, layer)[1], kv_cache.layer(own, layer)[1]
        assert torch.allclose(mine[:, :, :head], alone[:, :, :head], atol=1e-4)
        assert not torch.allclose(mine[:, :, head:], alone[:, :, head:], atol=1e-3)
        assert torch.equal(mine[:, :, head:], kv_cache.layer(full, layer)[1][:, :, end:])
    with pytest.raises(CacheError, match=f"columns {head} to {len(long)} of a cache of {len(long) - 1}"):
        drop_columns(model, full, head, len(long) - head)


def test_a_template_that_changes_the_question_is_refused(model, shots):
    other = copy.copy(model)
    other.tokenizer = tokenizer("chatml")
    # the last message ends differently where others precede it
    other.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{{ 'turn %d' % (messages | length) }}"
    )
    with pytest.raises(AnalysisError, match="question differently"):
        encode_prompts(other, replace(ROW, answer_prefix=""), shots)


def test_zero_exemplars_give_three_equal_systems(folder, files):
    items, exemplars = files
    result = measure_enrichment(EnrichmentConfig(model=folder, data=items, shots_data=exemplars, shots=0))
    systems = result["systems"]
    assert systems["direct"] == systems["few_shot"] == systems["oracle"]
    assert result["oracle_gain"]["points"] == 0
    assert result["tokens"]["direct"] == result["tokens"]["few_shot"]


def test_enrichment_command(folder, files, tmp_path):
    items, exemplars = files
    arguments = ["analyze", "enrichment", "--model", folder, "--data", items, "--shots-data", exemplars, "--shots", "2"]
    run = CliRunner().invoke(app, [*arguments, "--output-dir", str(tmp_path), "--json"])
    assert run.exit_code == 0, run.output
    result = json.loads((tmp_path / "enrichment.json").read_text())
    assert result["n"] == 6
    assert result["tokens"]["few_shot"] > 1.5 * result["tokens"]["direct"]
    direct, oracle = (result["systems"][name]["accuracy"] for name in ("direct", "oracle"))
    assert result["oracle_gain"]["points"] == pytest.approx(oracle - direct, abs=2e-3)
    assert len(result["provenance"]["data"]) == 2
    assert (tmp_path / "enrichment.svg").read_text().count("<svg") == 1
    assert "few-shot" in CliRunner().invoke(app, arguments).output


def test_items_are_no_exemplars_and_dropped_where_they_do_not_fit(folder, files, tmp_path):
    items, exemplars = files
    with pytest.raises(AnalysisError, match="has 0 questions that are not in"):
        measure_enrichment(EnrichmentConfig(model=folder, data=items, shots_data=items, shots=1))
    long = tmp_path / "long.jsonl"
    row = {"id": "x", "question": "word " * 600, "choices": WORDS, "answer": 0}
    long.write_text(Path(items).read_text() + json.dumps(row) + "\n")
    result = measure_enrichment(EnrichmentConfig(model=folder, data=str(long), shots_data=exemplars, shots=1))
    assert (result["n"], result["dropped"]) == (6, {"prompt too long": 1})


def result(sharer="toy-0.5b", matched=50.0, receiver="r1", **changes):
    def score(value):
        return {"accuracy": value, "ci95": [value - 5, value + 5]}

    return {
        "n": 100,
        "systems": {"receiver": score(25.0), "sharer": score(60.0), "matched": score(matched)},
        "G": matched - 25,
        "G_ci95": [1.0, 40.0],
        "provenance": {
            "fuser": "f" * 64,
            "receiver": {"name": "receiver-135m", "weights": receiver},
            "sharer": {"name": sharer, "weights": sharer},
            "data": {"a.jsonl": "hash"},
            "config": {"mode": "logits", "seed": 0, "data": [{"form": "letter"}]},
        },
    } | changes


def store(folder, name, data):
    (folder / name).mkdir()
    (folder / name / "result.json").write_text(json.dumps(data))


def test_scaling_orders_sharers_by_size(tmp_path):
    for name, matched in (("nameless", 70.0), ("toy-0.5b", 60.0), ("toy-360M", 40.0)):
        store(tmp_path, name, result(name, matched))
    arguments = ["analyze", "scaling", str(tmp_path)]
    unknown = CliRunner().invoke(app, arguments)
    assert isinstance(unknown.exception, AnalysisError)
    assert "--parameters nameless=COUNT" in str(unknown.exception)
    for wrong in ("nameless", "nameless=many", "nameless=0", "=1e9"):
        assert CliRunner().invoke(app, [*arguments, "--parameters", wrong]).exit_code == 2
    arguments += ["--parameters", "nameless=2e9"]
    run = CliRunner().invoke(app, [*arguments, "--output-dir", str(tmp_path / "out"), "--json"])
    assert run.exit_code == 0, run.output
    rows = json.loads(run.stdout.strip().splitlines()[-1])["rows"]
    assert [(row["sharer"], row["parameters"], row["counted"], row["G"]) for row in rows] == [
        ("toy-360M", 360_000_000, "name", 15), ("toy-0.5b", 500_000_000, "name", 35),
        ("nameless", 2_000_000_000, "given", 45),
    ]  # fmt: skip
    assert "0.36B" in (tmp_path / "out" / "scaling.svg").read_text()
    assert json.loads((tmp_path / "out" / "scaling.json").read_text())["rows"] == rows
    assert "nameless" in CliRunner().invoke(app, arguments).output


def without(name):
    data = result()
    del data["systems"][name]
    return data


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), r"holds no result\.json"),
        (({"n": 3},), "is not a result of c2c eval"),
        ((without("sharer"),), "has no accuracy of sharer"),
        ((result(),), "at least two"),
        ((result(), result("toy-1b", receiver="other")), "in receiver"),
        ((result(), result("toy-1b", n=50)), "in n"),
    ],
)
def test_results_that_can_not_be_compared_are_refused(tmp_path, files, words):
    for index, data in enumerate(files):
        store(tmp_path, str(index), data)
    with pytest.raises(AnalysisError, match=words):
        measure_scaling(ScalingConfig(results=[str(tmp_path)]))


def test_parameters_are_counted_from_a_models_config(folder):
    expected = sum(parameter.numel() for parameter in LanguageModel.from_pretrained(folder).model.parameters())
    assert count_parameters(folder, {}) == (expected, "config")
    assert count_parameters(folder, {folder: 9.0}) == (9, "given")
