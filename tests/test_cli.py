"""The command line: messages, JSON and exit codes, on tiny models."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from c2c import C2CModel
from c2c.cli import app, output
from c2c.errors import PromptError
from c2c.fusers.base import load_fuser
from tiny import pair, pair_folders

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINT = FIXTURES / "pair_a" / "checkpoint"
runner = CliRunner()


@pytest.fixture(scope="module")
def tiny_pair_folders(tmp_path_factory):
    """Folders of a tiny random receiver and sharer with different tokenizers."""
    return pair_folders(tmp_path_factory.mktemp)


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command in its own process, where exit codes and streams are those of a shell."""
    return subprocess.run([sys.executable, "-m", "c2c", *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "command",
    ["pull", "run", "train", "prefill", "eval", "lm-eval", "report", "inspect", "convert", "doctor", "share", "serve"],
)
def test_help_shows_examples(command):
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Examples" in result.output
    assert f"c2c {command}" in result.output


def test_help_does_not_import_torch():
    code = "import sys, c2c.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_version():
    assert runner.invoke(app, ["--version"]).output.startswith("c2c ")


def test_convert_then_inspect(tmp_path):
    out = tmp_path / "fuser"
    converted = runner.invoke(app, ["convert", str(CHECKPOINT), str(out), "--json"])
    assert converted.exit_code == 0, converted.output
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    inspected = json.loads(runner.invoke(app, ["inspect", str(out), "--json"]).stdout)
    assert inspected["family"] == "c2c"
    assert inspected["layer_map"] == [0, 0, 1, 2]
    # gates of the fixture: open means a logit above 0
    assert [[gate["key"], gate["value"]] for gate in inspected["gates"].values()] == [[1, 0], [0, 1], [1, 1], [0, 1]]


def test_convert_records_identities(tmp_path):
    folder = FIXTURES / "pair_a"
    arguments = ["--receiver", str(folder / "receiver"), "--sharer", str(folder / "sharer")]
    assert runner.invoke(app, ["convert", str(CHECKPOINT), str(tmp_path), *arguments]).exit_code == 0
    data = json.loads(runner.invoke(app, ["inspect", str(tmp_path), "--json"]).stdout)
    assert data["receiver"]["identity"]["architecture"] == "Qwen3ForCausalLM"
    assert data["sharer"]["kv"] == {"layers": 3, "kv_heads": 2, "head_dim": 12}


def test_convert_makes_a_trained_fuser_smaller_and_keeps_what_must_stay_exact(tmp_path):
    fuser = pair(fuser="memory", fuser_options={"rank": 4}).fusers[0]
    fuser.mean.normal_(mean=300)
    fuser.config.receiver = {"name": "ours"}
    fuser.config.training = {"dev": {"value": 1.0}}
    fuser.save_pretrained(tmp_path / "large")
    again = runner.invoke(app, ["convert", str(tmp_path / "large"), str(tmp_path / "small")])
    assert "--dtype" in str(again.exception)
    done = runner.invoke(
        app, ["convert", str(tmp_path / "large"), str(tmp_path / "small"), "--dtype", "torch.bfloat16", "--json"]
    )
    assert done.exit_code == 0, done.output
    small = load_fuser(tmp_path / "small")
    assert small.weight.dtype == torch.bfloat16
    assert torch.equal(small.mean, fuser.mean)  # a mean in bfloat16 would be off by one
    assert small.config.receiver == {"name": "ours"}
    assert small.config.training == fuser.config.training
    wrong = runner.invoke(app, ["convert", str(tmp_path / "large"), str(tmp_path / "other"), "--dtype", "bfloat"])
    assert "bfloat16" in str(wrong.exception)
    assert not (tmp_path / "other").exists()


def test_inspect_reads_a_published_checkpoint_directly():
    result = runner.invoke(app, ["inspect", str(CHECKPOINT)])
    assert result.exit_code == 0
    assert "receiver layer" in result.output


def test_convert_does_not_overwrite(tmp_path):
    assert runner.invoke(app, ["convert", str(CHECKPOINT), str(tmp_path)]).exit_code == 0
    again = run_process("convert", str(CHECKPOINT), str(tmp_path))
    assert again.returncode == 1
    assert "already holds a fuser" in again.stderr
    assert "Traceback" not in again.stderr


def test_errors_are_one_message_and_exit_code_1(tmp_path):
    result = run_process("inspect", str(tmp_path / "nothing"))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("c2c: ")
    assert "Traceback" not in result.stderr


def test_a_model_that_was_not_pulled_says_how_to_pull_it(tmp_path, monkeypatch):
    monkeypatch.setenv("C2C_CACHE", str(tmp_path))
    result = run_process("run", "hello")
    assert result.returncode == 1
    assert "c2c pull" in result.stderr


def test_wrong_usage_is_exit_code_2():
    assert run_process("run").returncode == 2
    assert run_process("no-such-command").returncode == 2


def test_run_json_has_every_mode(tiny_pair_folders):
    receiver, sharer = tiny_pair_folders
    result = runner.invoke(
        app, ["run", "hello", "--receiver", receiver, "--sharer", sharer, "--max-new-tokens", "4", "--json"]
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert set(data["results"]) == {"receiver", "sharer", "text", "c2c"}
    assert data["results"]["c2c"]["text"] == data["results"]["receiver"]["text"]
    assert data["trained"] is False
    assert "untrained" in data["note"]
    for answer in data["results"].values():
        assert 0 < answer["seconds_to_first_token"] <= answer["seconds_total"]
        assert answer["new_tokens"] >= 1


def test_run_side_by_side_says_that_the_fuser_is_untrained(tiny_pair_folders):
    receiver, sharer = tiny_pair_folders
    result = runner.invoke(app, ["run", "hello", "--receiver", receiver, "--sharer", sharer, "--max-new-tokens", "2"])
    assert result.exit_code == 0, result.output
    for title in ("receiver alone", "sharer alone", "text-to-text", "cache-to-cache"):
        assert title in result.output
    assert "equals the receiver's" in " ".join(result.output.split())


def test_run_with_context_for_the_sharer_alone(tiny_pair_folders, tmp_path):
    receiver, sharer = tiny_pair_folders
    model = C2CModel.from_models(receiver, sharer, fuser="memory", fuser_options={"rank": 4})
    torch.nn.init.normal_(model.fusers[0].weight, std=0.3)
    model.fusers[0].config.training = {"config": "random"}
    model.save_pretrained(tmp_path / "fuser")
    (tmp_path / "page.txt").write_text("The fox sleeps in a red house.")
    arguments = ["run", "Where?", "--fuser", str(tmp_path / "fuser"), "--max-new-tokens", "3", "--json"]
    result = runner.invoke(app, [*arguments, "--context", str(tmp_path / "page.txt"), "--message-tokens", "5"])
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)["results"]
    assert results["c2c"]["report"]["memory_slots"] > 5
    assert results["receiver"]["prompt_tokens"] == results["c2c"]["prompt_tokens"]
    assert results["text"]["message_tokens"] <= 5
    drafted = runner.invoke(
        app, [*arguments, "--context", str(tmp_path / "page.txt"), "--mode", "c2c", "--draft-tokens", "4"]
    )
    slots = json.loads(drafted.stdout)["results"]["c2c"]["report"]["memory_slots"]
    assert slots > results["c2c"]["report"]["memory_slots"]
    with pytest.raises(PromptError, match="can't be read"):
        runner.invoke(app, [*arguments, "--context", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(PromptError, match="--context FILE"):
        runner.invoke(app, [*arguments, "--mode", "c2c"], catch_exceptions=False)


def test_run_reads_stdin(tiny_pair_folders):
    receiver, sharer = tiny_pair_folders
    arguments = ["run", "-", "--receiver", receiver, "--sharer", sharer, "--mode", "c2c", "--max-new-tokens", "2"]
    result = runner.invoke(app, [*arguments, "--json"], input="from a pipe\n")
    assert json.loads(result.stdout)["prompt"] == "from a pipe"


def test_a_log_shows_progress_line_by_line(monkeypatch):
    """Bars are for terminals; in a log there is a line now and then, with what is left."""
    written = io.StringIO()
    monkeypatch.setattr(output, "err", Console(file=written))
    monkeypatch.setattr(output, "LINE_EVERY", 0.0)
    with output.progress_bars() as report:
        for done in (0, 25, 100):
            report("sharer prefill", done, 100)
        assert re.search(r"^sharer prefill 25/100, about \d:\d\d:\d\d left$", written.getvalue(), re.MULTILINE)
        assert "100/100, about" not in written.getvalue()
