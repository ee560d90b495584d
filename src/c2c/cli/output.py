"""Where command output goes: results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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


def log_to_stderr(name: str) -> None:
    """Show what a logger of ours says, above the progress bars."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        logger.addHandler(RichHandler(console=err, show_path=False, show_level=False))
    logger.setLevel(logging.INFO)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, one per stage; yields what to call with (stage, done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=err) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield report
