"""The command line: messages, JSON and exit codes, on tiny models."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from c2c import C2CModel
from c2c.cli import app, main, output
from c2c.errors import C2CError, PromptError
from c2c.fusers.base import load_fuser
from tiny import pair, pair_folders

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINT = str(FIXTURES / "pair_a" / "checkpoint")
runner = CliRunner()
FORCING = ("FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "COLORTERM")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Options with folders of a tiny random receiver and sharer with different tokenizers."""
    receiver, sharer = pair_folders(tmp_path_factory.mktemp)
    return ["--receiver", receiver, "--sharer", sharer]


def c2c(*arguments: object, **how: Any) -> str:
    """Run the command, which must succeed; returns its output."""
    done = runner.invoke(app, list(map(str, arguments)), catch_exceptions=False, **how)
    assert done.exit_code == 0, done.output
    return done.stdout


def c2c_json(*arguments: object, **how: Any) -> dict[str, Any]:
    return json.loads(c2c(*arguments, "--json", **how))


def subcommands(command=None, path=()):
    """Every command and group, as the words after ``c2c``."""
    command = command or typer.main.get_command(app)
    for name, one in getattr(command, "commands", {}).items():
        yield (*path, name)
        yield from subcommands(one, (*path, name))


@pytest.mark.parametrize("words", list(subcommands()), ids=" ".join)
def test_every_help_has_an_example(words):
    result = runner.invoke(app, [*words, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    after = result.stdout.partition("Options")[2] or result.stdout
    assert re.search(rf"(Examples:|Start with:)[\s\S]*c2c {' '.join(words)}\b", after)


@pytest.mark.parametrize("words", [[], ["train"], ["pull"]])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys; from c2c.cli import main\n"
        f"sys.argv = ['c2c', *{words}, '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'gradio', 'matplotlib', 'datasets', 'fastapi', 'gguf'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "c2c" in done.stdout


def test_version():
    assert c2c("--version").startswith("c2c ")


def test_convert_then_inspect(tmp_path, monkeypatch, capsys):
    out = tmp_path / "fuser"
    c2c("convert", CHECKPOINT, out)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    inspected = c2c_json("inspect", out)
    assert inspected["family"] == "c2c"
    assert inspected["layer_map"] == [0, 0, 1, 2]
    # gates of the fixture: open means a logit above 0
    assert [[gate["key"], gate["value"]] for gate in inspected["gates"].values()] == [[1, 0], [0, 1], [1, 1], [0, 1]]
    assert "receiver layer" in c2c("inspect", CHECKPOINT)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # main sets variables
    monkeypatch.setattr(sys, "argv", ["c2c", "convert", CHECKPOINT, str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"c2c: {out} already holds a fuser; choose another folder or pass --force.\n"


def test_convert_records_identities(tmp_path):
    folder = FIXTURES / "pair_a"
    options = ["--receiver", folder / "receiver", "--sharer", folder / "sharer"]
    converted = c2c_json("convert", CHECKPOINT, tmp_path, *options)
    data = c2c_json("inspect", tmp_path)
    assert converted == data | {"output": str(tmp_path)}
    assert data["receiver"]["identity"]["architecture"] == "Qwen3ForCausalLM"
    assert data["sharer"]["kv"] == {"layers": 3, "kv_heads": 2, "head_dim": 12}
    assert "Qwen3ForCausalLM" in c2c("inspect", tmp_path)


def test_convert_makes_a_trained_fuser_smaller_and_keeps_what_must_stay_exact(tmp_path):
    fuser = pair(fuser="memory", fuser_options={"rank": 4}).fusers[0]
    fuser.mean.normal_(mean=300)
    fuser.config.receiver = {"name": "ours"}
    fuser.config.training = {"dev": {"value": 1.0}}
    fuser.save_pretrained(tmp_path / "large")
    for options, message in (([], "--dtype"), (["--dtype", "bfloat"], "bfloat16")):
        with pytest.raises(C2CError, match=message):
            c2c("convert", tmp_path / "large", tmp_path / "small", *options)
    assert not (tmp_path / "small").exists()
    c2c("convert", tmp_path / "large", tmp_path / "small", "--dtype", "torch.bfloat16")
    small = load_fuser(tmp_path / "small")
    assert small.weight.dtype == torch.bfloat16
    assert torch.equal(small.mean, fuser.mean)  # a mean in bfloat16 would be off by one
    assert small.config.receiver == {"name": "ours"}
    assert small.config.training == fuser.config.training


def test_run_json_has_every_mode(models):
    data = c2c_json("run", "hello", *models, "--max-new-tokens", "4")
    assert set(data["results"]) == {"receiver", "sharer", "text", "c2c"}
    assert data["results"]["c2c"]["text"] == data["results"]["text"]["text"]
    assert data["method"] == data["results"]["c2c"]["report"]["method"] == "text"
    for answer in data["results"].values():
        assert 0 < answer["seconds_to_first_token"] <= answer["seconds_total"]
        assert answer["new_tokens"] >= 1


def test_run_side_by_side_says_by_which_method(models):
    output = c2c("run", "hello", *models, "--max-new-tokens", "2")
    for title in ("receiver alone", "sharer alone", "text-to-text", "best method", "method text"):
        assert title in " ".join(output.split())


def test_run_side_by_side_says_that_the_fuser_is_untrained(models, tmp_path):
    C2CModel.from_models(models[1], models[3]).save_pretrained(tmp_path / "untrained")
    output = c2c("run", "hello", "--fuser", tmp_path / "untrained", "--max-new-tokens", "2")
    assert "cache-to-cache" in output
    assert "equals the receiver's" in " ".join(output.split())


def test_run_with_context_for_the_sharer_alone(models, tmp_path):
    model = C2CModel.from_models(models[1], models[3], fuser="memory", fuser_options={"rank": 4})
    torch.nn.init.normal_(model.fusers[0].weight, std=0.3)
    model.fusers[0].config.training = {"config": "random"}
    model.save_pretrained(tmp_path / "fuser")
    (tmp_path / "page.txt").write_text("The fox sleeps in a red house.")
    command = ["run", "Where?", "--fuser", tmp_path / "fuser", "--max-new-tokens", "3"]
    context = ["--context", tmp_path / "page.txt"]
    results = c2c_json(*command, *context, "--message-tokens", "5")["results"]
    assert results["c2c"]["report"]["memory_slots"] > 5
    assert results["receiver"]["prompt_tokens"] == results["c2c"]["prompt_tokens"]
    assert results["text"]["message_tokens"] <= 5
    drafted = c2c_json(*command, *context, "--mode", "c2c", "--draft-tokens", "4")["results"]
    assert drafted["c2c"]["report"]["memory_slots"] > results["c2c"]["report"]["memory_slots"]
    for options, message in ((["--context", tmp_path], "can't be read"), (["--mode", "c2c"], "--context FILE")):
        with pytest.raises(PromptError, match=message):
            c2c(*command, *options)


@pytest.mark.parametrize("mode", ["c2c", "zero", "untrained", "summary_5"])
def test_run_reads_stdin_and_answers_with_any_system(models, mode):
    data = c2c_json("run", "-", *models, "--mode", mode, "--max-new-tokens", "2", input="from a pipe\n")
    assert data["prompt"] == "from a pipe"
    assert set(data["results"]) == {mode}


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        (b"\xef\xbb\xbfHi\r\nyou \xf0\x9f\x98\x80", "Hi\nyou \U0001f600"),
        (b"Hi\xff", "UTF-8"),
        (b"H\0i\0", "NUL"),
        (b"", "empty"),
    ],
)
def test_a_prompt_on_stdin_is_text_in_utf8(models, given, prompt):
    command = ["run", "-", *models, "--mode", "receiver", "--max-new-tokens", "1"]
    if prompt.startswith("Hi"):
        assert c2c_json(*command, input=given)["prompt"] == prompt
    else:
        with pytest.raises(PromptError, match=prompt):
            c2c(*command, input=given)


def test_contexts_in_other_encodings_are_refused(tmp_path):
    page = tmp_path / "page.txt"
    for content, message in (("é".encode("latin-1"), "Latin-1"), ("é".encode("utf-16"), "UTF-16"), (b"a\0b\0", "NUL")):
        page.write_bytes(content)
        with pytest.raises(PromptError, match=message):
            c2c("run", "hi", "--context", page)


@pytest.mark.slow
def test_a_file_name_that_is_no_text():
    done = subprocess.run([sys.executable, "-m", "c2c", "inspect", b"gone\xff"], capture_output=True)
    assert done.returncode == 1
    assert b"no such folder" in done.stderr
    assert b"Traceback" not in done.stderr


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


def plain_environment(**more):
    """Without what forces colours on, or off."""
    plain = {name: value for name, value in os.environ.items() if name not in FORCING}
    return plain | {"TERM": "xterm-256color"} | more


@pytest.mark.parametrize("arguments", [["pull", "--list"], ["run"]])
def test_no_colours_through_a_pipe(arguments):
    done = subprocess.run([sys.executable, "-m", "c2c", *arguments], capture_output=True, env=plain_environment())
    assert not re.search(rb"\x1b\[[0-9;]*[A-Za-z]", done.stdout + done.stderr)


def test_completion(tmp_path):
    """bash gets a script from --install-completion, and that script gets the names of commands."""
    command = Path(sys.executable).with_name("c2c")  # under whose name shells complete
    if not command.exists():
        pytest.skip("the command is not installed beside this Python")
    environment = plain_environment(HOME=str(tmp_path), COMP_WORDS="c2c ins", COMP_CWORD="1")

    def bash(line, **more):
        # the second command keeps bash from replacing itself: it must be there to be recognised
        done = subprocess.run(["bash", "-c", f"{line}; true"], capture_output=True, text=True, env=environment | more)
        return done.stdout + done.stderr

    assert "_C2C_COMPLETE=complete_bash" in bash(f"{command} --show-completion")
    bash(f"{command} --install-completion")
    written = (tmp_path / ".bash_completions" / "c2c.sh").read_text()
    assert "_C2C_COMPLETE=complete_bash" in written
    assert "c2c.sh" in (tmp_path / ".bashrc").read_text()
    assert bash(str(command), _C2C_COMPLETE="complete_bash").split() == ["inspect"]
