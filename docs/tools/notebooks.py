"""Run the notebooks and keep them with their outputs (``make notebooks``).

Each runs from its first cell to its last in a fresh kernel, in its own folder, with the models that it names; these
have to be pulled before. A notebook is written only when it ran to its end and ``problems`` finds nothing in it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
MOST_BYTES = 1_500_000
_PLACE = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|work|mnt|private)/|[A-Z]:\\\\")


def names() -> list[str]:
    """The notebooks of the repository."""
    return sorted(path.name for path in FOLDER.glob("*.ipynb"))


def problems(book: Any) -> list[str]:
    """What a notebook must not be committed with; nothing, if it can be.

    Args:
        book: as ``nbformat`` reads it.
    """
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    found = []
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not run once, in order")
    for cell in code:
        where = cell.source.strip().splitlines()[0]
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"an error below {where!r}")
            if output.get("name") == "stderr":
                found.append(f"a warning or progress below {where!r}: {output.text[:200]}")
        if place := _PLACE.search(json.dumps(_shown(cell))):
            found.append(f"a folder of this machine below {where!r}: {place[0]}")
    if not any(cell.outputs for cell in code):
        found.append("it has no outputs")
    size = len(json.dumps(book).encode())
    if size > MOST_BYTES:
        found.append(f"{size:,} bytes, more than {MOST_BYTES:,}")
    return found


def _shown(cell: Any) -> list[Any]:
    """The outputs of a cell without its pictures."""
    kept = []
    for output in cell.outputs:
        data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
        kept.append({**output, "data": data})
    return kept


def run(name: str) -> list[str]:
    """Run a notebook and write it; returns what kept it from being written."""
    import nbformat
    from nbclient import NotebookClient

    path = FOLDER / name
    book = nbformat.read(path, as_version=4)
    here = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(book, timeout=3600, kernel_name="python3", resources=here, record_timing=False).execute()
    book.metadata["language_info"] = {"name": "python"}  # without the version of this machine
    for output in _pictures(book):
        output.data.pop("text/plain", None)  # "<IPython.core.display.Image object>"
    found = problems(book)
    if not found:
        nbformat.write(book, path)
    return found


def _pictures(book: Any) -> Iterator[Any]:
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                yield output


def main(chosen: list[str]) -> int:
    """Run the named notebooks, or all."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in the outputs
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm, where ipywidgets are missing
    failed = 0
    for name in chosen or names():
        found = run(name)
        failed += bool(found)
        print(f"{name}: {'; '.join(found) or 'run and written'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
