"""The wire format: records, each a part of a handoff in its file format, a manifest and tensors in safetensors.

    8 bytes   length of the blob, big-endian
    32 bytes  sha256 of the blob
    n bytes   safetensors; its metadata has a ``manifest``, JSON

An answer is a record ``begin``, one record per layer as soon as it is made, and a record ``end`` or ``error``. The hash
finds damage; TLS is what finds forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from c2c.handoff import Packed, Precision
from c2c.kv_cache import KeyValue, KVGeometry

FORMAT = "c2c-remote-2"
MEDIA_TYPE = "application/x-c2c-records"
OVERHEAD = 1 << 16  # bytes that manifest and safetensors header of a record may take, per row
NUMBER_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8": 1}
PRECISIONS: tuple[str, ...] = get_args(Precision)
_LENGTH_BYTES, _HASH_BYTES = 8, 32
_SCALED = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
Side = Literal["key", "value"]
_ALONG: dict[Side, int] = {"key": 2, "value": 3}  # a scale per channel of keys, per token of values


class WireError(ValueError):
    """An answer that must not be used.

    Attributes:
        code: ``malformed``, or ``damaged`` where a hash does not fit.
    """

    def __init__(self, message: str, code: str = "malformed") -> None:
        super().__init__(message)
        self.code = code


class CutOffError(WireError):
    """An answer that ends before its last record."""


@dataclass(frozen=True)
class Record:
    """One part of an answer.

    Attributes:
        manifest: plain data; ``kind`` and what the kind needs.
        tensors: by name.
    """

    manifest: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> str:
        """``begin``, ``layer``, ``end`` or ``error``."""
        return str(self.manifest.get("kind"))

    def encode(self) -> bytes:
        """Return the record as bytes."""
        metadata = {"manifest": json.dumps({"format": FORMAT} | self.manifest, sort_keys=True)}
        blob = save({name: tensor.contiguous() for name, tensor in self.tensors.items()}, metadata=metadata)
        return len(blob).to_bytes(_LENGTH_BYTES, "big") + hashlib.sha256(blob).digest() + blob

    @classmethod
    def decode(cls, blob: bytes) -> Record:
        """Read a safetensors blob.

        Raises:
            WireError: no safetensors, or no manifest of this format.
        """
        try:
            tensors = load(blob)
            header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
            manifest = json.loads(header["__metadata__"]["manifest"])
            known = manifest["format"]
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WireError(f"a record is no safetensors file with a manifest: {error}") from error
        if known != FORMAT:
            raise WireError(
                f"a record has format {known!r}, expected {FORMAT!r}: bring both sides to the same version."
            )
        return cls(manifest, tensors)


def read_records(pieces: Iterable[bytes], largest: int) -> Iterator[Record]:
    """Read records from bytes in pieces of any size, up to ``end`` or ``error``, which must come.

    Args:
        pieces: the bytes, as they arrive.
        largest: bytes of one record at most.

    Raises:
        CutOffError: the bytes end too early. WireError: damaged, too large, or no record.
    """
    stream = _Stream(pieces)
    while True:
        length = int.from_bytes(stream.take(_LENGTH_BYTES), "big")
        if not 0 < length <= largest:
            raise WireError(f"a record of {length} bytes, expected 1 to {largest}: this is no answer of `c2c share`.")
        digest, blob = stream.take(_HASH_BYTES), stream.take(length)
        if hashlib.sha256(blob).digest() != digest:
            raise WireError("a record does not have the sha256 before it: it was damaged on the way.", "damaged")
        record = Record.decode(blob)
        yield record
        if record.kind in ("end", "error"):
            return


class _Stream:
    """Bytes in pieces, taken in lengths of one's own."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces, self._held, self._count = iter(pieces), bytearray(), 0

    def take(self, count: int) -> bytes:
        while len(self._held) < count:
            piece = next(self._pieces, None)
            if piece is None:
                raise CutOffError(f"the answer was cut off after {self._count} bytes, before its last record.", "cut")
            self._count += len(piece)
            self._held += piece
        taken = bytes(self._held[:count])
        del self._held[:count]
        return taken


# -- entries of a layer ------------------------------------------------------------------------------------------------


def native(dtype: torch.dtype) -> str:
    """Return the precision in which entries of this type cross unchanged."""
    name = str(dtype).removeprefix("torch.")
    return name if name in PRECISIONS else "float32"


def packed_bytes(geometry: KVGeometry, layers: int, columns: int, precision: str) -> int:
    """Return the bytes of so many columns of so many layers of one row, scales included."""
    scales = 4 * (geometry.width + geometry.kv_heads * columns) if precision in _SCALED else 0
    return layers * (2 * geometry.width * columns * NUMBER_BYTES[precision] + scales)


def pack(entries: KeyValue, columns: Sequence[Tensor], precision: Precision) -> dict[str, Tensor]:
    """Select and quantize the entries of a layer.

    Args:
        entries: keys and values, ``[rows, kv_heads, tokens, head_dim]``.
        columns: per row, which; a row without any takes no space.
        precision: on the wire.

    Returns:
        ``<row>.key`` and ``<row>.value``, ``[1, kv_heads, columns, head_dim]`` on the host, and ``.scale`` for 8 bits.
    """
    tensors: dict[str, Tensor] = {}
    for row, chosen in enumerate(columns):
        if not chosen.numel():
            continue
        for side, x in zip(_ALONG, entries, strict=True):
            taken = x[row : row + 1].index_select(2, chosen.to(x.device))
            packed = Packed.pack(taken, precision, _ALONG[side])
            tensors[f"{row}.{side}"] = packed.data.cpu()
            if packed.scale is not None:
                tensors[f"{row}.{side}.scale"] = packed.scale.cpu()
    return tensors


@dataclass(frozen=True)
class LayerSpec:
    """Shape and type that the tensors of a layer must have.

    Attributes:
        geometry: the shape of the cache.
        columns: per row, how many.
        precision: on the wire.
    """

    geometry: KVGeometry
    columns: tuple[int, ...]
    precision: str

    def unpack(self, tensors: Mapping[str, Tensor]) -> list[tuple[Packed, Packed] | None]:
        """Return keys and values per row, each ``[1, kv_heads, columns, head_dim]``; None for a row without columns.

        Raises:
            WireError: tensors, shapes or types other than expected.
        """
        used: set[str] = set()
        rows: list[tuple[Packed, Packed] | None] = [
            (self._packed(tensors, row, "key", count, used), self._packed(tensors, row, "value", count, used))
            if count
            else None
            for row, count in enumerate(self.columns)
        ]
        if extra := sorted(set(tensors) - used):
            raise WireError(f"unexpected tensors: {extra[:5]}.")
        return rows

    def _packed(self, tensors: Mapping[str, Tensor], row: int, side: Side, count: int, used: set[str]) -> Packed:
        heads, dim, name = self.geometry.kv_heads, self.geometry.head_dim, f"{row}.{side}"
        dtype = _SCALED.get(self.precision) or getattr(torch, self.precision)
        data = _tensor(tensors, name, (1, heads, count, dim), dtype, used)
        if self.precision not in _SCALED:
            return Packed(data)
        shape = (1, heads, 1, dim) if side == "key" else (1, heads, count, 1)
        return Packed(data, _tensor(tensors, f"{name}.scale", shape, torch.float32, used))


def _tensor(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype, used: set[str]
) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
        got = "nothing" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
        raise WireError(f"tensor {name!r}: got {got}, expected {shape} of {dtype}.")
    used.add(name)
    return tensor


def spread(rows: Sequence[tuple[Packed, Packed] | None], columns: Sequence[Tensor], like: Tensor) -> KeyValue:
    """Scatter entries to their columns, zero elsewhere: keys and values with the shape and type of ``like``."""
    keys, values = torch.zeros_like(like), torch.zeros_like(like)
    for row, (pair, chosen) in enumerate(zip(rows, columns, strict=True)):
        if pair is not None:
            keys[row, :, chosen] = pair[0].unpack(like.dtype)[0]
            values[row, :, chosen] = pair[1].unpack(like.dtype)[0]
    return keys, values
