"""The examples run through and print their tables, on tiny random models; and on real ones where these are there."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from c2c import C2CModel
from test_real import use_real_models
from tiny import pair_folders

EXAMPLES = Path(__file__).parent.parent / "examples"
PAGE = "The fox sleeps in a red house."
QUESTIONS = ("--question", "Who sleeps?", "--question", "Where?")
PRINTED = {
    "relay.py": (("--rows", "2"), [r"^matched: +\d+ % exact of 2$", r"^deranged: +\d+ % exact of 2$"]),
    "read_and_answer.py": (
        ("--page", "page.txt", *QUESTIONS),
        [r"read \d+ tokens in \d", r"^Who sleeps\?\n  with the handoff: ", r"^  and with a draft: ", r"^  without a "],
    ),
    "coder_to_writer.py": (
        ("--rows", "1"),
        [rf"^{name} +\d+ % exact of 1, \d+\.\d s each$" for name in ("cache", "text", "alone")]
        + [r"^<!-- .+ --> <\w+ id="],  # the page's topic comes first
    ),
}
REAL = {
    "relay.py": (("--rows", "2"), "matched: 100 % exact of 2"),
    "read_and_answer.py": ((), "with the handoff"),
    "coder_to_writer.py": (("--rows", "1"), "exact of 1"),
}


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
def run(monkeypatch, capsys, tmp_path):
    """Run an example as a script, in a folder with a page; what it prints."""
    (tmp_path / "page.txt").write_text(PAGE)
    monkeypatch.chdir(tmp_path)

    def start(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return start


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_prints_its_table_and_takes_other_models(run, fuser, name, tmp_path):
    arguments, expected = PRINTED[name]
    printed = run(name, "--fuser", fuser, *arguments)
    for line in expected:
        assert re.search(line, printed, re.MULTILINE), printed
    for role in ("--receiver", "--sharer"):
        with pytest.raises(Exception, match=r"holds no model"):
            run(name, "--fuser", fuser, role, str(tmp_path))


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_with_the_shipped_fuser(run, monkeypatch, name):
    use_real_models(monkeypatch, "smollm2-135m", "qwen2.5-coder-0.5b")
    arguments, expected = REAL[name]
    assert expected in run(name, *arguments)
