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
from rich import filesize
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from c2c.utils import OnProgress

LINE_EVERY = 30.0  # seconds between lines of progress in a log

out = Console()
err = Console(stderr=True)


def print_json(data: Any) -> None:
    """Print one JSON object to stdout, and nothing else there."""
    typer.echo(json.dumps(data, ensure_ascii=False))


def human_bytes(count: float) -> str:
    """Format a size for people, in powers of 1000."""
    return filesize.decimal(round(count))


def log_to_stderr(name: str) -> None:
    """Show the messages of one of our loggers above the progress bars."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        logger.addHandler(RichHandler(console=err, show_path=False, show_level=False))
    logger.setLevel(logging.INFO)


@contextmanager
def progress_bars(*, in_bytes: bool = False) -> Iterator[OnProgress]:
    """Show progress bars on stderr, one per stage; in a log, lines now and then, since rich draws bars there once.

    Args:
        in_bytes: the counts are bytes.

    Yields:
        A function to call with stage, done and total; a total of 0 is an unknown one.
    """
    tasks: dict[str, TaskID] = {}
    last_line: dict[str, float] = {}
    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    stage_and_bar = (TextColumn("{task.description}"), BarColumn(bar_width=20))
    with Progress(*stage_and_bar, count, TimeElapsedColumn(), TimeRemainingColumn(), console=err) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage], last_line[stage] = bars.add_task(stage, total=total or None), time.monotonic()
                if not err.is_terminal:
                    err.print(f"{stage} ...", highlight=False)
            bars.update(tasks[stage], completed=done, total=total or None)
            if not err.is_terminal and 0 < done < total and time.monotonic() - last_line[stage] >= LINE_EVERY:
                last_line[stage] = time.monotonic()
                elapsed = next(task.elapsed for task in bars.tasks if task.id == tasks[stage]) or 0.0
                left = timedelta(seconds=round(elapsed / done * (total - done)))
                counts = [human_bytes(number) if in_bytes else str(number) for number in (done, total)]
                err.print(f"{stage} {'/'.join(counts)}, about {left} left", highlight=False)

        yield report
