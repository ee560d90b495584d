"""The notebooks run, cell by cell and unchanged, in a kernel: where a clone has the real pair, here lie tiny models."""

from __future__ import annotations

import base64
import importlib.util
import re

import pytest

from docs_rig import ROOT, Workspace

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


def _tool():
    """The script that runs notebooks and keeps them: ``make notebooks``."""
    spec = importlib.util.spec_from_file_location("notebooks_tool", ROOT / "docs" / "tools" / "notebooks.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


TOOL = _tool()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("notebooks"))


def read(name: str):
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def shown(book) -> tuple[list[str], list[bytes]]:
    """What each code cell printed, and all pictures."""
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    found = [output.get("data", {}).get("image/png") for cell in cells for output in cell.outputs]
    return printed, [base64.b64decode(picture) for picture in found if picture]


def test_the_notebooks_are_there():
    assert NOTEBOOKS == TOOL.names() == ["first_use.ipynb", "inside_a_fused_cache.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, made, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager

    monkeypatch.setattr(KernelSpecManager, "ensure_native_kernel", True)
    monkeypatch.setenv("C2C_CACHE", str(made.cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(made.home / "ipython"))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(made.home / "jupyter"))
    folder = made.home / "notebooks"
    folder.mkdir(exist_ok=True)
    book = read(name)
    nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    printed, pictures = shown(book)
    if name == "first_use.ipynb":
        assert "trained: True" in printed[1]
        assert all(mode in printed[3] for mode in ("receiver alone", "sharer alone", "text-to-text", "cache-to-cache"))
        assert "prompt tokens were fused" in printed[4]
    else:
        assert len(pictures) == 5


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_whole(name):
    book = read(name)
    nbformat.validate(book)
    assert TOOL.problems(book) == []  # outputs of one run, without warnings or folders of a machine, and not too large
    text = "\n".join(cell.source for cell in book.cells)
    for file in re.findall(r"`((?:docs|notebooks)/[\w./-]+|\w+\.ipynb)`", text):
        assert (ROOT / file).exists() or (ROOT / "notebooks" / file).exists(), file
    fuser = re.search(r'^FUSER = "\.\./(.+?)"', text, re.MULTILINE)[1]
    assert (ROOT / fuser / "config.json").exists()
    for cell in book.cells:
        assert not re.search(r"/(home|root|Users)/", str(cell))


def test_the_outputs_are_those_of_the_real_pair_and_the_text_fits_them():
    printed, pictures = shown(read("first_use.ipynb"))
    assert not pictures
    assert re.search(r"receiver: smollm2-135m .*\nsharer:   qwen2.5-coder-1.5b .*\n.*trained: True", printed[1])
    said = dict(re.findall(r"^(\S+(?: alone)?) +'([^']*)' +[\d.]+ s$", printed[3], re.MULTILINE))
    letters = {mode: answer.strip(" .") for mode, answer in said.items()}
    assert letters == {"receiver alone": "C", "sharer alone": "B", "text-to-text": "C", "cache-to-cache": "B"}
    assert "0.0 ' C.'" in printed[5]
    assert "0.25 ' B'" in printed[5]
    assert "[' B', ' D']" in printed[6]

    book = read("inside_a_fused_cache.ipynb")
    printed, pictures = shown(book)
    assert len(pictures) == 5
    assert all(picture.startswith(b"\x89PNG") and len(picture) < 200_000 for picture in pictures)
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    for number in re.findall(r"\d\.\d\d", text):  # every figure of the text stands in an output
        assert any(number in output for output in printed) or number == "0.95", number


def test_what_keeps_a_notebook_from_being_committed():
    book = read("first_use.ipynb")
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    cells[1].outputs[0].text = "kept in /home/someone/models"
    cells[2].outputs = [nbformat.v4.new_output("stream", name="stderr", text="UserWarning")]
    assert [found.partition(" below")[0] for found in TOOL.problems(book)] == [
        "a folder of this machine",
        "a warning or progress",
    ]
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    assert TOOL.problems(book) == ["its cells were not run once, in order", "it has no outputs"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_commands_of_a_notebook_parse(name):
    from docs_rig import arguments, lines, problem

    for cell in read(name).cells:
        if cell.cell_type != "markdown":
            continue
        for block in re.findall(r"^```\n(.*?)^```$", cell.source, re.MULTILINE | re.DOTALL):
            for line in lines(block):
                words = arguments(line)
                assert words is None or problem(words) is None, line
        for span in re.findall(r"`(c2c [^`]+)`", cell.source):
            words = arguments(lines(span)[0])
            assert problem([word for word in words if word != "..."], partly=True) is None, span
