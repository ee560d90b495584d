"""Snapshots: the KV entries of the first tokens of a prompt, between a vLLM engine and the fusers."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import Cache, DynamicCache

from c2c import kv_cache
from c2c.integrations.vllm.errors import SnapshotError

_FORMAT = "c2c-snapshot-1"
_FIELDS = ("model", "tokens", "count", "body")


@dataclass(frozen=True)
class SnapshotInfo:
    """Metadata of a snapshot.

    Attributes:
        model: whose entries these are, see :func:`~c2c.integrations.vllm.models.model_key`.
        tokens: hash of the tokens, see :func:`token_hash`.
        count: how many tokens.
        body: hash of the entries.
    """

    model: str
    tokens: str
    count: int
    body: str

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
    """KV entries of all layers.

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
        return cls(SnapshotInfo(model, token_hash(ids), len(ids), _body_hash(keys, values)), keys, values)

    @classmethod
    def of_cache(cls, cache: Cache, ids: Sequence[int], model: str) -> Snapshot:
        """Make a snapshot of a cache of one row."""
        layers = kv_cache.layers(cache)
        return cls.of(torch.stack([k[0] for k, _ in layers]), torch.stack([v[0] for _, v in layers]), ids, model)

    def cache(self) -> DynamicCache:
        """Return the entries as a cache of one row."""
        return kv_cache.from_layers((k[None], v[None]) for k, v in zip(self.keys, self.values, strict=True))

    def to_bytes(self) -> bytes:
        """Return a safetensors file."""
        facts = {name: str(getattr(self.info, name)) for name in _FIELDS}
        data: bytes = save({"keys": self.keys, "values": self.values}, {"format": _FORMAT, **facts})
        return data


def read_info(path: Path) -> SnapshotInfo:
    """Read the metadata of a snapshot without its entries.

    Raises:
        FileNotFoundError: there is none. SnapshotError: it is no snapshot.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return _info(file.metadata())
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise SnapshotError(f"the snapshot is damaged: {error}") from error


def read_snapshot(path: Path) -> Snapshot:
    """Read a snapshot and check its hash.

    Raises:
        FileNotFoundError: there is none. SnapshotError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            info = _info(file.metadata())
            keys, values = file.get_tensor("keys"), file.get_tensor("values")
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise SnapshotError(f"the snapshot is damaged: {error}") from error
    if keys.dim() != 4 or keys.shape != values.shape or keys.shape[2] != info.count:
        raise SnapshotError(
            f"the snapshot has keys {tuple(keys.shape)} and values {tuple(values.shape)}; expected both "
            f"[layers, kv_heads, {info.count}, head_dim]."
        )
    if _body_hash(keys, values) != info.body:
        raise SnapshotError("the snapshot is damaged: its entries do not have the hash that it names.")
    return Snapshot(info, keys, values)


def token_hash(ids: Sequence[int]) -> str:
    """Return a hash of token ids, in their order."""
    return hashlib.sha256(array("q", ids).tobytes()).hexdigest()


def _info(metadata: dict[str, str] | None) -> SnapshotInfo:
    given = metadata or {}
    if given.get("format") != _FORMAT or any(name not in given for name in _FIELDS) or not given["count"].isdigit():
        raise SnapshotError(f"this is no snapshot; expected a safetensors file of format {_FORMAT}.")
    return SnapshotInfo(given["model"], given["tokens"], int(given["count"]), given["body"])


def _body_hash(keys: Tensor, values: Tensor) -> str:
    digest = hashlib.sha256()
    for entry in (keys, values):
        digest.update(f"{entry.dtype}{tuple(entry.shape)}".encode())
        digest.update(entry.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
