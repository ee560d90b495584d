"""Where command output goes: results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from c2c.utils import OnProgress

LINE_EVERY = 30.0  # seconds between lines of progress in a log

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
def progress_bars() -> Iterator[OnProgress]:
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

        yield report if err.is_terminal else _lines(report)


def _lines(report: OnProgress) -> OnProgress:
    """The same with a line now and then: where nobody sees bars move, as in a log, rich draws them at the end only."""
    began: dict[str, float] = {}
    said: dict[str, float] = {}

    def tell(stage: str, done: int, total: int) -> None:
        report(stage, done, total)
        now = time.monotonic()
        if stage not in began:
            began[stage] = said[stage] = now
            return
        if now - said[stage] >= LINE_EVERY and 0 < done < total:
            said[stage] = now
            left = (now - began[stage]) / done * (total - done)
            err.print(f"{stage} {done}/{total}, about {timedelta(seconds=round(left))} left", highlight=False)

    return tell
