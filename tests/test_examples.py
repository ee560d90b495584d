"""The examples run through and print their tables, on tiny random models; and on real ones where these are there."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from c2c import C2CModel, pull
from tiny import pair_folders

EXAMPLES = Path(__file__).parent.parent / "examples"
CACHE = os.environ.get("C2C_CACHE")  # before the fixture that isolates other tests


@pytest.fixture(scope="module")
def fuser(tmp_path_factory):
    """A memory fuser with random weights, which names its models."""
    model = C2CModel.from_models(*pair_folders(tmp_path_factory.mktemp), fuser="memory", fuser_options={"rank": 4})
    torch.nn.init.normal_(model.fusers[0].weight, std=0.3)
    model.fusers[0].config.training = {"config": "random"}
    folder = tmp_path_factory.mktemp("fuser")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as a script; what it prints."""

    def start(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return start


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"relay.py", "read_and_answer.py", "coder_to_writer.py"}


def test_relay(run, fuser):
    printed = run("relay.py", "--fuser", fuser, "--rows", "2")
    assert re.search(r"^matched: +\d+ % exact of 2$", printed, re.MULTILINE)
    assert re.search(r"^deranged: +\d+ % exact of 2$", printed, re.MULTILINE)


def test_read_and_answer(run, fuser, tmp_path):
    (tmp_path / "page.txt").write_text("The fox sleeps in a red house.")
    asked = ("--page", str(tmp_path / "page.txt"), "--question", "Who sleeps?", "--question", "Where?")
    printed = run("read_and_answer.py", "--fuser", fuser, *asked)
    assert re.search(r"read \d+ tokens in \d", printed)
    for question in ("Who sleeps?", "Where?"):
        assert re.search(rf"^{re.escape(question)}\n  with the handoff: ", printed, re.MULTILINE)
    assert printed.count("  and with a draft: ") == printed.count("  without a message: ") == 2


def test_coder_to_writer(run, fuser):
    printed = run("coder_to_writer.py", "--fuser", fuser, "--rows", "1")
    for way in ("cache", "text", "alone"):
        assert re.search(rf"^{way} +\d+ % exact of 1, \d+\.\d s each$", printed, re.MULTILINE)
    assert re.search(r"^<!-- .+ --> <\w+ id=", printed, re.MULTILINE)  # the topic first


def test_other_models_are_taken_by_argument(run, fuser, tmp_path):
    """A fuser refuses them, which shows that they were loaded."""
    with pytest.raises(Exception, match=r"holds no model"):
        run("relay.py", "--fuser", fuser, "--receiver", str(tmp_path))
    with pytest.raises(Exception, match=r"holds no model"):
        run("coder_to_writer.py", "--fuser", fuser, "--sharer", str(tmp_path))


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("relay.py", ("--rows", "2"), "matched: 100 % exact of 2"),
        ("read_and_answer.py", (), "with the handoff"),
        ("coder_to_writer.py", ("--rows", "1"), "exact of 1"),
    ],
)
def test_with_the_shipped_fuser(run, monkeypatch, name, arguments, expected):
    if CACHE is None:
        monkeypatch.delenv("C2C_CACHE", raising=False)
    else:
        monkeypatch.setenv("C2C_CACHE", CACHE)
    missing = [alias for alias in ("smollm2-135m", "qwen2.5-coder-0.5b") if not pull.is_pulled(alias)]
    if missing and os.environ.get("C2C_REAL"):
        pytest.fail(f"not pulled: {missing}")
    if missing:
        pytest.skip(f"not pulled: {missing}")
    assert expected in run(name, *arguments)
