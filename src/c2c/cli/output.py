"""Where command output goes: results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)


def print_json(data: Any) -> None:
    """One JSON object on stdout, and nothing else there."""
    typer.echo(json.dumps(data, ensure_ascii=False))


def human_bytes(count: float) -> str:
    """A size for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
