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
QUESTION = ("--question", "Who built the lighthouse of Grey Point?")
FUSER_FOLDER = str(EXAMPLES.parent / "zoo" / "memory_smollm2-135m_from_qwen2.5-coder-0.5b")
QUESTIONS = ("--question", "Who sleeps?", "--question", "Where?")
ASKED = ("--document", "page.txt", *QUESTIONS)
FUSER, SAME = "with a memory fuser", "one model on both sides"
PRINTED = [
    ("relay.py", FUSER, ("--rows", "2"), [r"^matched: +\d+ % exact of 2$", r"^deranged: +\d+ % exact of 2$"]),
    (
        "read_and_answer.py",
        FUSER,
        ("--page", "page.txt", *QUESTIONS),
        [r"read \d+ tokens in \d", r"^Who sleeps\?\n  with the handoff: ", r"^  and with a draft: ", r"^  without a "],
    ),
    *(
        (
            "coder_to_writer.py",
            models,
            ("--rows", "1"),
            [rf"^{name} +\d+ % exact of 1, \d+\.\d s each$" for name in ("cache", "text", "page", "alone")]
            + [r"^<!-- .+ --> <\w+ id="],  # the page's topic comes first
        )
        for models in (FUSER, SAME)
    ),
    (
        "langgraph_two_agents.py",
        SAME,
        ASKED,
        [r": copy, the same model", r"^Who sleeps\?\n  from the reader's cache: ", r"^  from the text: .* after \d"],
    ),
    pytest.param(
        *("openai_two_clients.py", SAME, ASKED),
        [r"^A: \d+ tokens were read", r"^B: Who sleeps\?\n   with the id: ", r"^   without the id: "],
        marks=pytest.mark.slow,
    ),
]
REAL = [
    ("relay.py", ("--rows", "2"), "matched: 100 % exact of 2"),
    ("read_and_answer.py", (), "with the handoff"),
    ("coder_to_writer.py", ("--rows", "1", "--fuser", FUSER_FOLDER), "exact of 1"),
]
SAME_REAL = [
    ("langgraph_two_agents.py", "from the reader's cache: Mary Ellison"),
    ("openai_two_clients.py", "with the id:    Mary Ellison"),
]


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny model."""
    return pair_folders(tmp_path_factory.mktemp)[0]


def test_every_example_is_run():
    names = {getattr(one, "values", one)[0] for one in PRINTED}
    assert names == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize(("name", "models", "arguments", "expected"), PRINTED)
def test_an_example_prints_its_table_and_takes_other_models(
    run, fuser, folder, tmp_path, name, models, arguments, expected
):
    if name == "langgraph_two_agents.py":
        pytest.importorskip("langgraph")
    given = ("--fuser", fuser) if models == FUSER else ("--receiver", folder, "--sharer", folder, "--dtype", "float32")
    printed = run(name, *given, *arguments)
    for line in expected:
        assert re.search(line, printed, re.MULTILINE), printed
    if name == "openai_two_clients.py":
        return  # its server says so
    for role in ("--receiver", "--sharer"):
        with pytest.raises(Exception, match=r"holds no model"):
            run(name, *given, role, str(tmp_path))


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments", "expected"), REAL)
def test_with_the_shipped_fuser(run, monkeypatch, name, arguments, expected):
    use_real_models(monkeypatch, "smollm2-135m", "qwen2.5-coder-0.5b")
    assert expected in run(name, *arguments)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), SAME_REAL)
def test_with_one_real_model(run, monkeypatch, name, expected):
    pytest.importorskip("langgraph")
    use_real_models(monkeypatch, "qwen2.5-coder-0.5b")
    assert expected in run(name, *QUESTION)


@pytest.mark.real
@pytest.mark.slow
def test_the_coder_and_the_writer_are_one_model(run, monkeypatch):
    use_real_models(monkeypatch, "qwen2.5-coder-1.5b")
    right = dict(re.findall(r"^(\w+) +(\d+) % exact of 4", run("coder_to_writer.py", "--rows", "4"), re.MULTILINE))
    assert int(right["cache"]) == int(right["page"]) >= 75 > int(right["alone"])
    assert int(right["cache"]) >= int(right["text"])
