"""Store of snapshots, in a folder that the engine's process and this one share."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from c2c.integrations.vllm.errors import SnapshotError
from c2c.integrations.vllm.snapshot import Snapshot, SnapshotInfo, read_info, read_snapshot

_NAME = re.compile(r"[0-9a-f]{32}")
_SHARED_MEMORY = Path("/dev/shm")
_REASON = 500  # characters of a reason at most


def new_name() -> str:
    """Return a random name for a snapshot or a receipt; it can't be guessed."""
    return secrets.token_hex(16)


def check_name(name: Any) -> str:
    """Check a name, which becomes part of a path, and return it.

    Raises:
        SnapshotError: it is none.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SnapshotError("the name of a snapshot must be 32 hexadecimal digits.")
    return name


class SnapshotStore:
    """Keep snapshots by name, with receipts of loads and reasons of failed saves.

    By default in shared memory, where a file costs a copy and no disk. An engine that has loaded a snapshot writes a
    receipt, which proves that an answer is fused before a word of it is sent.

    Args:
        folder: where; for the user alone.
        max_bytes: of all snapshots together.
        max_seconds: after which a snapshot that nobody deleted is.
    """

    def __init__(self, folder: Path, *, max_bytes: int = 2 * 10**9, max_seconds: float = 3600) -> None:
        self.folder, self.max_bytes, self.max_seconds = folder, max_bytes, max_seconds

    @classmethod
    def create(cls, parent: Path | None = None, **limits: Any) -> SnapshotStore:
        """Make a store in a new folder; :meth:`close` deletes it."""
        if parent is None and os.access(_SHARED_MEMORY, os.W_OK):
            parent = _SHARED_MEMORY
        return cls(Path(tempfile.mkdtemp(prefix="c2c-", dir=parent)), **limits)

    def put(self, name: str, snapshot: Snapshot) -> None:
        """Keep a snapshot.

        Raises:
            SnapshotError: no room.
        """
        self.sweep()
        data = snapshot.to_bytes()
        held = sum(_size(path) for path in self.folder.iterdir())
        if held + len(data) > self.max_bytes:
            raise SnapshotError(
                f"no room for a snapshot of {len(data)} bytes: the store holds {held} of {self.max_bytes}. Ask for "
                "shorter prompts or fewer at a time, or raise the store's limit."
            )
        try:
            self._write(self._path(name), data)
        except OSError as error:
            raise SnapshotError(
                f"no room for a snapshot of {len(data)} bytes in {self.folder}: {error.strerror}. Give the store a "
                "folder with more room (containers often have 64 MB of shared memory)."
            ) from error

    def info(self, name: str) -> SnapshotInfo | None:
        """Return the metadata of a snapshot; None while there is none.

        Raises:
            SnapshotError: it is damaged, or will not come.
        """
        try:
            return read_info(self._path(name))
        except FileNotFoundError:
            self._raise_if_failed(name)
            return None

    def get(self, name: str) -> Snapshot:
        """Return a snapshot, checked.

        Raises:
            SnapshotError: missing or damaged.
        """
        try:
            return read_snapshot(self._path(name))
        except FileNotFoundError:
            self._raise_if_failed(name)
            raise SnapshotError(
                "the snapshot is not there: never written, deleted after its use, or too old."
            ) from None

    def fail(self, name: str, reason: str) -> None:
        """Record that a snapshot will not come, and why."""
        self._write(self._path(name, "failed"), reason[:_REASON].encode())

    def acknowledge(self, name: str) -> None:
        """Write a receipt."""
        self._write(self._path(name, "loaded"), b"")

    def acknowledged(self, name: str) -> bool:
        """Return whether there is a receipt."""
        return self._path(name, "loaded").exists()

    def delete(self, name: str) -> None:
        """Delete everything of this name."""
        for kind in ("safetensors", "failed", "loaded"):
            self._path(name, kind).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what is too old."""
        limit = time.time() - self.max_seconds
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # somebody else was faster
                if path.stat().st_mtime < limit:
                    path.unlink()

    def close(self) -> None:
        """Delete the folder with everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str, kind: str = "safetensors") -> Path:
        return self.folder / f"{check_name(name)}.{kind}"

    def _raise_if_failed(self, name: str) -> None:
        with suppress(FileNotFoundError):
            raise SnapshotError(self._path(name, "failed").read_text(errors="replace"))

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file that is whole or absent, for the user alone."""
        temporary = path.with_suffix(f".{secrets.token_hex(4)}.part")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
