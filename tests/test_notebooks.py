"""The notebooks run, cell by cell and unchanged, in a kernel: where a clone has the real pair, here lie tiny models."""

from __future__ import annotations

import re

import pytest

from docs_rig import ROOT, Workspace

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("notebooks"))


def read(name: str):
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def test_the_notebooks_are_there():
    assert NOTEBOOKS == ["first_use.ipynb", "inside_a_fused_cache.ipynb"]


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
    printed = [
        "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")
        for cell in book.cells
        if cell.cell_type == "code"
    ]
    pictures = [
        output.data["text/html"]
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    ]
    if name == "first_use.ipynb":
        assert "trained: True" in printed[1]
        assert all(mode in printed[3] for mode in ("receiver alone", "sharer alone", "text-to-text", "cache-to-cache"))
        assert "prompt tokens were fused" in printed[4]
    else:
        assert len(pictures) == 5
        assert all(picture.count("<svg") == 1 and "#c2c0" not in picture for picture in pictures)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_whole(name):
    book = read(name)
    nbformat.validate(book)
    counts = [cell.execution_count for cell in book.cells if cell.cell_type == "code"]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))  # without outputs, or of one run
    text = "\n".join(cell.source for cell in book.cells)
    for file in re.findall(r"`((?:docs|notebooks)/[\w./-]+|\w+\.ipynb)`", text):
        assert (ROOT / file).exists() or (ROOT / "notebooks" / file).exists(), file
    fuser = re.search(r'^FUSER = "\.\./(.+?)"', text, re.MULTILINE)[1]
    assert (ROOT / fuser / "config.json").exists()
    for cell in book.cells:
        assert not re.search(r"/(home|root|Users)/", str(cell))


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
