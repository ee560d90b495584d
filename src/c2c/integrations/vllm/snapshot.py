"""Snapshots: KV entries of the first tokens of a prompt, between a vLLM engine and the fusers, and their store."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import Cache, DynamicCache

from c2c import kv_cache
from c2c.integrations.vllm.errors import SnapshotError
from c2c.utils import folder_size, save_atomically

_FORMAT = "c2c-snapshot-1"
_NAME = re.compile(r"[0-9a-f]{32}")
_SHARED_MEMORY = Path("/dev/shm")
_REASON = 500  # characters of a reason at most


@dataclass(frozen=True)
class SnapshotInfo:
    """Metadata of a snapshot.

    Attributes:
        model: whose entries these are, see :func:`~c2c.integrations.vllm.models.model_key`.
        tokens: hash of the tokens, see :func:`token_hash`.
        count: how many tokens.
    """

    model: str
    tokens: str
    count: int

    def check(self, model: str, ids: Sequence[int]) -> None:
        """Check that these are entries of this model, of the first of these tokens and not of all.

        Raises:
            SnapshotError: they are not.
        """
        if self.model != model:
            raise SnapshotError(f"the snapshot is of model {self.model}, and this engine runs {model}.")
        if not 0 < self.count < len(ids):
            raise SnapshotError(
                f"the snapshot has {self.count} tokens and the prompt {len(ids)}; expected at least one and fewer than "
                "the prompt, since the last token is read on them."
            )
        if self.tokens != token_hash(ids[: self.count]):
            raise SnapshotError("the snapshot is of other tokens than the prompt begins with.")


@dataclass(frozen=True)
class Snapshot:
    """KV entries of all layers, on the CPU.

    Attributes:
        info: whose, and of what.
        keys: after the rotary embedding, ``[layers, kv_heads, tokens, head_dim]``.
        values: the same shape.
    """

    info: SnapshotInfo
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, ids: Sequence[int], model: str) -> Snapshot:
        """Make a snapshot of entries, ``[layers, kv_heads, tokens, head_dim]``, one for each of ``ids``."""
        keys, values = keys.detach().cpu().contiguous(), values.detach().cpu().contiguous()
        return cls(SnapshotInfo(model, token_hash(ids), len(ids)), keys, values)

    @classmethod
    def of_cache(cls, cache: Cache, ids: Sequence[int], model: str) -> Snapshot:
        """Make a snapshot of a cache of one row."""
        layers = kv_cache.layers(cache)
        return cls.of(torch.stack([k[0] for k, _ in layers]), torch.stack([v[0] for _, v in layers]), ids, model)

    def cache(self) -> DynamicCache:
        """Return the entries as a cache of one row."""
        return kv_cache.from_layers((k[None], v[None]) for k, v in zip(self.keys, self.values, strict=True))


class SnapshotStore:
    """Keep snapshots by name, with receipts of loads and reasons of failed saves, in a folder shared with the engine.

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
        """Keep a snapshot; those that are too old are deleted.

        Raises:
            SnapshotError: no room.
        """
        self._delete_old()
        facts = {field: str(value) for field, value in vars(snapshot.info).items()}
        body = _body_hash(snapshot.keys, snapshot.values)
        tensors = {"keys": snapshot.keys, "values": snapshot.values}
        data: bytes = save(tensors, {"format": _FORMAT, "body": body, **facts})
        held = folder_size(self.folder)
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
        """Return the metadata of a snapshot, without reading its entries; None while there is none.

        Raises:
            SnapshotError: it is damaged, or will not come.
        """
        try:
            with self._open(name) as (info, _):
                return info
        except FileNotFoundError:
            return None

    def get(self, name: str) -> Snapshot:
        """Return a snapshot, checked.

        Raises:
            SnapshotError: missing or damaged.
        """
        try:
            with self._open(name) as (info, file):
                keys, values, body = file.get_tensor("keys"), file.get_tensor("values"), file.metadata().get("body")
        except FileNotFoundError:
            raise SnapshotError(
                "the snapshot is not there: never written, deleted after its use, or too old."
            ) from None
        if keys.dim() != 4 or keys.shape != values.shape or keys.shape[2] != info.count:
            raise SnapshotError(
                f"the snapshot has keys {tuple(keys.shape)} and values {tuple(values.shape)}; expected both "
                f"[layers, kv_heads, {info.count}, head_dim]."
            )
        if _body_hash(keys, values) != body:
            raise SnapshotError("the snapshot is damaged: its entries do not have the hash that it names.")
        return Snapshot(info, keys, values)

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

    def close(self) -> None:
        """Delete the folder with everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _delete_old(self) -> None:
        limit = time.time() - self.max_seconds
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # somebody else was faster
                if path.is_file() and path.stat().st_mtime < limit:
                    path.unlink()

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[SnapshotInfo, Any]]:
        try:
            with safe_open(self._path(name), framework="pt") as file:
                given = file.metadata() or {}
                if given.get("format") != _FORMAT or not given.get("count", "").isdigit():
                    raise SnapshotError(f"this is no snapshot; expected a safetensors file of format {_FORMAT}.")
                yield SnapshotInfo(given.get("model", ""), given.get("tokens", ""), int(given["count"])), file
        except FileNotFoundError:
            with suppress(FileNotFoundError):
                raise SnapshotError(self._path(name, "failed").read_text(errors="replace")) from None
            raise
        except (SafetensorError, OSError) as error:
            raise SnapshotError(f"the snapshot is damaged: {error}") from error

    def _path(self, name: str, kind: str = "safetensors") -> Path:
        return self.folder / f"{check_name(name)}.{kind}"

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file that is whole or absent, for the user alone."""
        save_atomically(path.parent, lambda folder: (Path(folder) / path.name).write_bytes(data), private=True)


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


def token_hash(ids: Sequence[int]) -> str:
    """Return a hash of token ids, in their order."""
    return hashlib.sha256(array("q", ids).tobytes()).hexdigest()


def _body_hash(keys: Tensor, values: Tensor) -> str:
    digest = hashlib.sha256()
    for entry in (keys, values):
        digest.update(f"{entry.dtype}{tuple(entry.shape)}".encode())
        digest.update(entry.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
