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
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from c2c.handoff import PRECISIONS, Precision, QuantizedTensor
from c2c.kv_cache import KeyValue, KVGeometry

FORMAT = "c2c-remote-2"
MEDIA_TYPE = "application/x-c2c-records"
OVERHEAD = 1 << 16  # bytes that manifest and safetensors header of a record may take, per row
_ALONG = {"key": 2, "value": 3}  # a scale per channel of keys, per token of values


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
    """Hold one part of an answer: a manifest of plain data, with its ``kind`` and what the kind needs, and tensors."""

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
        return len(blob).to_bytes(8, "big") + hashlib.sha256(blob).digest() + blob


def read_records(pieces: Iterable[bytes], largest: int) -> Iterator[Record]:
    """Read records of at most ``largest`` bytes from pieces of any size, up to ``end`` or ``error``, which must come.

    Raises:
        CutOffError: the bytes end too early. WireError: damaged, too large, or no record.
    """
    source, held, kind = iter(pieces), bytearray(), ""

    def take(count: int) -> bytes:
        while len(held) < count:
            if (piece := next(source, None)) is None:
                raise CutOffError("the answer was cut off before its last record.")
            held.extend(piece)
        taken = bytes(held[:count])
        del held[:count]
        return taken

    while kind not in ("end", "error"):
        length = int.from_bytes(take(8), "big")
        if not 0 < length <= largest:
            raise WireError(f"a record of {length} bytes, expected 1 to {largest}: this is no answer of `c2c share`.")
        digest, blob = take(32), take(length)
        if hashlib.sha256(blob).digest() != digest:
            raise WireError("a record does not have the sha256 before it: it was damaged on the way.", "damaged")
        record = _decode(blob)
        kind = record.kind
        yield record


def _decode(blob: bytes) -> Record:
    try:
        tensors = load(blob)
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        manifest = json.loads(header["__metadata__"]["manifest"])
        given = manifest["format"]
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"a record is no safetensors file with a manifest: {error}") from error
    if given != FORMAT:
        raise WireError(f"a record has format {given!r}, expected {FORMAT!r}: bring both sides to the same version.")
    return Record(manifest, tensors)


# -- entries of a layer ------------------------------------------------------------------------------------------------


def native(dtype: torch.dtype) -> str:
    """Return the precision in which entries of this type cross unchanged; float32 for types without one."""
    return next((name for name, known in PRECISIONS.items() if known == dtype), "float32")


def packed_bytes(geometry: KVGeometry, layers: int, columns: int, precision: str) -> int:
    """Return the bytes of so many columns of so many layers of one row, scales included."""
    tensors = _layout(geometry, [columns], precision).values()
    return layers * sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)


def _layout(
    geometry: KVGeometry, columns: Sequence[int], precision: str
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and type of each tensor of a layer; rows without columns have none."""
    heads, dim, dtype = geometry.kv_heads, geometry.head_dim, PRECISIONS[precision]
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for row, count in enumerate(columns):
        if count:
            found |= {f"{row}.{side}": ((1, heads, count, dim), dtype) for side in _ALONG}
        if count and dtype.itemsize == 1:
            found[f"{row}.key.scale"] = (1, heads, 1, dim), torch.float32
            found[f"{row}.value.scale"] = (1, heads, count, 1), torch.float32
    return found


def pack(entries: KeyValue, columns: Sequence[Tensor], precision: Precision) -> dict[str, Tensor]:
    """Select columns of each row of a layer's entries, ``[rows, kv_heads, tokens, head_dim]``, and quantize them.

    Returns:
        ``<row>.key`` and ``<row>.value``, ``[1, kv_heads, columns, head_dim]`` on the host, and ``.scale`` for 8 bits.
    """
    tensors: dict[str, Tensor] = {}
    for row, chosen in enumerate(columns):
        if not chosen.numel():
            continue
        for side, x in zip(_ALONG, entries, strict=True):
            taken = x[row : row + 1].index_select(2, chosen.to(x.device))
            quantized = QuantizedTensor.quantize(taken, precision, _ALONG[side])
            tensors[f"{row}.{side}"] = quantized.data.cpu()
            if quantized.scale is not None:
                tensors[f"{row}.{side}.scale"] = quantized.scale.cpu()
    return tensors


def unpack(
    tensors: Mapping[str, Tensor], geometry: KVGeometry, columns: Sequence[int], precision: str
) -> list[tuple[QuantizedTensor, QuantizedTensor]]:
    """Check the tensors of a layer that :func:`pack` made, and arrange them by row; ``columns`` counts those of each.

    Returns:
        Per row keys and values, each ``[1, kv_heads, columns, head_dim]``.

    Raises:
        WireError: other tensors, shapes or types than these.
    """
    expected = _layout(geometry, columns, precision)
    given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if given != expected:
        name = min(name for name in given.keys() | expected if given.get(name) != expected.get(name))
        raise WireError(f"tensor {name!r}: got {given.get(name)}, expected {expected.get(name)}.")
    none = torch.zeros(1, geometry.kv_heads, 0, geometry.head_dim)

    def quantized(name: str) -> QuantizedTensor:
        return QuantizedTensor(tensors.get(name, none), tensors.get(f"{name}.scale"))

    return [(quantized(f"{row}.key"), quantized(f"{row}.value")) for row in range(len(columns))]


def spread(
    rows: Sequence[tuple[QuantizedTensor, QuantizedTensor]], columns: Sequence[Tensor], like: Tensor
) -> KeyValue:
    """Scatter entries to their columns, zero elsewhere: keys and values with the shape and type of ``like``."""
    keys, values = torch.zeros_like(like), torch.zeros_like(like)
    for row, (quantized, chosen) in enumerate(zip(rows, columns, strict=True)):
        for target, part in zip((keys, values), quantized, strict=True):
            target[row, :, chosen] = part.dequantize(like.dtype)[0]
    return keys, values
