"""Files that are complete or absent."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def save_atomically(folder: Path, write: Callable[[str], Any]) -> None:
    """Let ``write`` fill a temporary folder, then rename its files into ``folder``, ``config.json`` last."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
        write(temporary)
        written = [path for path in Path(temporary).rglob("*") if path.is_file()]
        for path in sorted(written, key=lambda path: path.name == "config.json"):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o644)  # temporary files are private
            os.replace(path, target)


def write_json(path: Path, data: Any) -> None:
    """Write JSON to a temporary file beside ``path`` and rename it."""
    save_atomically(
        path.parent, lambda folder: (Path(folder) / path.name).write_text(json.dumps(data, indent=2) + "\n")
    )
