"""The benchmarks measure what they promise, on tiny shapes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config

from tiny import build, memory_pair, tokenizer

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


def record(system: str, row: int, right: float, first: float = 1.0, **more) -> dict:
    """A line of a journal of peers.py, of one block."""
    place = {"pair": "a:b", "kind": "facts", "documents": 4, "row": row, "system": system}
    return place | {"text": "x", "read": 1.0, "first": first, "total": first + 1, "bytes": 10, "right": right} | more


def test_peers_makes_tables_of_a_journal_and_says_where_c2c_is_behind():
    import peers_table

    records = [record("c2c", row, row < 5, first=0.1 * row, method="copy") for row in range(10)]
    records += [record("avp, 0 steps", row, row < 9, first=2.0) for row in range(10)]
    records += [record("avp, 20 steps", row, 1, first=0.01) for row in range(3)]
    records.append({**record("avp, 20 steps", 3, 0), "error": "IndexError", "text": ""})
    block, together = peers_table.summarise(records)
    assert together == block | {"kind": "all"}
    ours, thinks = block["systems"]["c2c"], block["systems"]["avp, 20 steps"]
    assert (ours["right"], ours["n"], ours["method"]) == (50.0, 10, "copy")
    assert ours["right_ci95"] == [23.7, 76.3], "Wilson"
    assert ours["first_ci95"][0] < ours["first"] == 0.45 < ours["first_ci95"][1]
    assert (thinks["n"], thinks["errors"], thinks["right"]) == (4, 1, 75.0)
    assert block["behind"] == [
        "avp, 20 steps: 0.10 s to the first token against 0.01",
        "avp, 20 steps: 1.10 s in all against 1.01",
        "avp, 0 steps: right answers 5 against 9 of 10 (p = 0.12)",
    ]
    settings = {"dtype": "bfloat16", "new_tokens": 24, "seed": 0, "threads": 1}
    result = {"settings": settings, "versions": {}, "avp": {}, "machine": "x", "blocks": [block]}
    page = peers_table.page(result)
    assert "| b ← a | facts | 4 | 50 [24, 76] n 10 | 75 [30, 95] n 4 | 90 [60, 98] n 10 |" in page
    assert "- b ← a, facts, 4 document(s): avp, 20 steps: 0.10 s" in page


def test_peers_gives_a_question_distractors_that_do_not_answer_it():
    import peers

    (rows,) = (rows for kind, rows in peers.load_kinds(20, None, 0).items() if kind == "halves")
    for index, row in enumerate(rows[:20]):
        texts = peers.documents(rows, index, 4)
        assert len(set(texts)) == 4
        assert texts[index % 4] == peers.passage(row)
        others = [text for place, text in enumerate(texts) if place != index % 4]
        assert not any(name in text for name in row.question.split()[1:] if name[0].isupper() for text in others)


def test_peers_measures_c2c_alone_where_avp_can_not_be_installed(tmp_path, monkeypatch, capsys):
    import peers

    monkeypatch.setattr("c2c.handoff.OTHER_PASSAGE", "Wheat is a grain.")  # there are 512 tokens, of a letter each

    folder = tmp_path / "model"
    build("llama").save_pretrained(folder)
    tokenizer("chatml").save_pretrained(folder)
    monkeypatch.setattr(peers, "REQUIREMENTS", (str(tmp_path / "missing.whl"),))
    files = [f"--{name}={tmp_path / name}" for name in ("journal", "environment", "output", "table")]
    command = ["peers.py", "--models", str(folder), "--limit=1", "--dtype=float32", "--new-tokens=2", "--json", *files]
    monkeypatch.setattr("sys.argv", command)
    peers.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "can't be installed" in result["avp"]["missing"]
    assert "**avp was not measured**" in (tmp_path / "table").read_text()
    assert {(block["kind"], block["documents"]) for block in result["blocks"]} == {
        (kind, count) for kind in ("facts", "relay", "halves", "all") for count in (1, 4)
    }
    assert all(block["systems"]["c2c"]["method"] == "copy" for block in result["blocks"])
    lines = (tmp_path / "journal").read_text()
    (tmp_path / "journal").write_text(lines[:-30])  # cut in its last line
    peers.main()
    assert json.loads((tmp_path / "journal").read_text().splitlines()[-1]) is not None
    assert len((tmp_path / "journal").read_text().splitlines()) == len(lines.splitlines())
    monkeypatch.setattr("sys.argv", [*command, "--seed=1"])
    with pytest.raises(SystemExit, match="give another --journal"):
        peers.main()
