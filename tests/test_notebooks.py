"""The notebooks run, cell by cell and unchanged, in a kernel: where a clone has the real pair, here lie tiny models."""

from __future__ import annotations

import base64
import importlib.util
import re

import pytest

from docs_rig import ROOT, arguments, lines, make_workspace, problem

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

FIRST_USE, INSIDE = NOTEBOOKS = ["first_use.ipynb", "inside_a_fused_cache.ipynb"]


@pytest.fixture(scope="module")
def tool():
    """The script of ``make notebooks``."""
    spec = importlib.util.spec_from_file_location("notebooks_tool", ROOT / "docs" / "tools" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str):
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def sources(book, kind: str) -> str:
    return "\n".join(cell.source for cell in book.cells if cell.cell_type == kind)


def shown(book) -> tuple[str, list[bytes]]:
    """What the code cells printed, and all pictures."""
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    found = [output.get("data", {}).get("image/png") for output in outputs]
    return "\n".join(output.get("text", "") for output in outputs), [base64.b64decode(one) for one in found if one]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager

    clone = make_workspace(tmp_path)
    monkeypatch.setattr(KernelSpecManager, "ensure_native_kernel", True)
    monkeypatch.setenv("C2C_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for variable, folder in (("IPYTHONDIR", "ipython"), ("JUPYTER_CONFIG_DIR", "jupyter")):
        monkeypatch.setenv(variable, str(clone / folder))
    (clone / "notebooks").mkdir(exist_ok=True)
    book, here = read(name), {"metadata": {"path": str(clone / "notebooks")}}
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources=here).execute()
    printed, pictures = shown(book)
    assert bool(pictures) == (name == INSIDE)
    assert "tokens" in printed


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_whole(name, tool):
    book = read(name)
    nbformat.validate(book)
    assert tool.names() == NOTEBOOKS
    assert tool.problems(book) == []  # outputs of one run, without warnings or folders of a machine, and not too large
    text = sources(book, "markdown")
    for file in re.findall(r"`((?:docs|notebooks)/[\w./-]+|\w+\.ipynb)`", text):
        assert (ROOT / file).exists() or (ROOT / "notebooks" / file).exists(), file
    fuser = re.search(r'^FUSER = "\.\./(.+?)"', sources(book, "code"), re.MULTILINE)[1]
    assert (ROOT / fuser / "config.json").exists()
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for words in [arguments(line) for block in blocks for line in lines(block)]:
        assert words is None or problem(words) is None, words
    for span in re.findall(r"`(c2c [^`]+)`", text):
        words = [word for word in arguments(lines(span)[0]) if word != "..."]
        assert problem(words, partly=True) is None, span


def test_the_outputs_are_those_of_the_real_pair_and_the_text_fits_them():
    printed, pictures = shown(read(FIRST_USE))
    assert not pictures
    assert re.search(r"receiver: smollm2-135m .*\nsharer:   qwen2.5-coder-1.5b .*\n.*trained: True", printed)
    answers = dict(re.findall(r"^(\S+(?: alone)?) +' ?(\w)[^']*' +[\d.]+ s$", printed, re.MULTILINE))
    assert answers == {"receiver alone": "C", "sharer alone": "B", "text-to-text": "C", "cache-to-cache": "B"}
    assert all(line in printed for line in ("0.0 ' C.'", "0.25 ' B'", "[' B', ' D']"))

    printed, pictures = shown(read(INSIDE))
    assert pictures
    assert all(picture.startswith(b"\x89PNG") and len(picture) < 200_000 for picture in pictures)
    for number in re.findall(r"\d\.\d\d", sources(read(INSIDE), "markdown")):
        assert number in printed or number == "0.95", number  # every figure of the text stands in an output


def test_what_keeps_a_notebook_from_being_committed(tool):
    book = read(FIRST_USE)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    cells[1].outputs[0].text = "kept in /home/someone/models"
    cells[2].outputs = [nbformat.v4.new_output("stream", name="stderr", text="UserWarning")]
    found = [one.partition(" below")[0] for one in tool.problems(book)]
    assert found == ["a folder of this machine", "a warning or progress"]
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    assert tool.problems(book) == ["its cells were not run once, in order", "it has no outputs"]
