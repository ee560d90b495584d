"""A document that a visitor uploads, as text."""

from __future__ import annotations

from pathlib import Path

from c2c.cli.output import human_bytes
from c2c.demo.errors import DemoError

LARGEST = 1_000_000  # bytes; no model here reads more


def read_document(path: str | Path) -> str:
    """The text of a file.

    Raises:
        DemoError: too large, empty, or no UTF-8 text.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > LARGEST:
        raise DemoError(f"{path.name} has {human_bytes(size)}; at most {human_bytes(LARGEST)} can be read.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DemoError(
            f"{path.name} is no text in UTF-8 (byte {error.start} can't be read). Give a plain text file, such as .txt "
            "or .md; of a PDF, paste its text."
        ) from error
    if not text.strip():
        raise DemoError(f"{path.name} is empty.")
    return text
