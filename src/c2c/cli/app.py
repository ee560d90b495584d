"""The ``c2c`` app: its subcommands, and the one place that turns errors into messages and exit codes.

Exit codes: 0 success, 1 something could not be done, 2 wrong usage. torch is imported by the commands that need it,
so that ``--help`` is quick.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
import yaml

from c2c.cli import analyze, connect, demo, doctor, evaluate, inspect, library, pull, report, run, serve, train
from c2c.errors import C2CError
from c2c.version import __version__

app = typer.Typer(
    name="c2c",
    help="Language models that talk to each other through their KV caches.",
    epilog="Start with: c2c pull smollm2-135m qwen2.5-coder-0.5b, then: c2c run 'What is a KV cache?'",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
COMMANDS: dict[str, Callable[..., None]] = {
    "pull": pull.pull,
    "connect": connect.connect,
    "run": run.run,
    "demo": demo.demo,
    "train": train.train,
    "prefill": train.prefill,
    "eval": evaluate.evaluate,
    "lm-eval": evaluate.lm_eval,
    "report": report.report,
    "inspect": inspect.inspect,
    "convert": inspect.convert,
    "doctor": doctor.doctor,
    "serve": serve.serve,
    "share": serve.share,
}
_EPILOGS = yaml.safe_load(Path(__file__).with_name("epilogs.yaml").read_text(encoding="utf-8"))
for name, command in COMMANDS.items():
    app.command(name, epilog=_EPILOGS[name])(command)
app.add_typer(analyze.group)
app.add_typer(library.group)

_NO_RIGHTS = "Choose a place that you may read and write, or change its rights."
_ADVICE = {
    errno.ENOSPC: "Make room on the disk, or write to another one.",
    errno.EDQUOT: "Make room, or write to another disk.",
    errno.EFBIG: "The system allows no larger files: raise the limit, or write elsewhere.",
    errno.EACCES: _NO_RIGHTS,
    errno.EPERM: _NO_RIGHTS,
    errno.EROFS: "Choose a place that can be written to.",
    errno.ENOTDIR: "A part of this path is a file; expected folders.",
    errno.EEXIST: "A file lies there; expected a folder, or the name of a new one.",
    errno.EISDIR: "It is a folder; expected a file.",
}


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"c2c {__version__}")
        raise typer.Exit


@app.callback()
def callback(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Language models that talk to each other through their KV caches."""


def _describe(error: C2CError | OSError) -> str | None:
    """Return the message of an expected error; None of a system error that is not about files."""
    if isinstance(error, C2CError):
        return str(error)
    if error.filename is None and error.errno not in _ADVICE:
        return None
    place = "" if error.filename is None else f"{error.filename}: "
    return f"{place}{error.strerror}. {_ADVICE.get(error.errno or 0, '')}".rstrip()


def main() -> None:
    """Run the ``c2c`` command; with ``C2C_DEBUG`` set, errors keep their traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal without some characters shows their numbers
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except (C2CError, OSError) as error:
        message = _describe(error)
        if message is None or os.environ.get("C2C_DEBUG"):
            raise
        typer.echo(f"c2c: {message}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("c2c: interrupted", err=True)
        sys.exit(130)
