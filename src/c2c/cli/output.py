"""Where command output goes: results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import typer
from rich import filesize, progress
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from c2c.utils import OnProgress, json_line

LINE_EVERY = 30.0  # seconds between lines of progress in a log

out = Console()
err = Console(stderr=True)


def print_json(data: Any) -> None:
    """Print one JSON object to stdout, and nothing else there."""
    typer.echo(json_line(data, getattr(sys.stdout, "encoding", None) or "utf-8"))


def print_result(data: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    """Print a command's result as JSON, or for people."""
    (print_json if as_json else show)(data)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table; what follows the first column is aligned to the right, as numbers are."""
    table = Table(columns[0], title=title)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row))
    out.print(table)


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

    Yields:
        A function to call with stage, done and total (bytes with ``in_bytes``); a total of 0 is an unknown one.
    """
    tasks: dict[str, progress.TaskID] = {}
    last_line: dict[str, float] = {}
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.DownloadColumn() if in_bytes else progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=err) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage], last_line[stage] = bars.add_task(stage, total=total or None), time.monotonic()
                if not err.is_terminal:
                    err.print(f"{stage} ...", highlight=False)
            bars.update(tasks[stage], completed=done, total=total or None)
            if not err.is_terminal and 0 < done < total and time.monotonic() - last_line[stage] >= LINE_EVERY:
                last_line[stage] = time.monotonic()
                elapsed = bars.tasks[tasks[stage]].elapsed or 0.0
                left = timedelta(seconds=round(elapsed / done * (total - done)))
                counts = [human_bytes(number) if in_bytes else str(number) for number in (done, total)]
                err.print(f"{stage} {'/'.join(counts)}, about {left} left", highlight=False)

        yield report
