"""The protocol between ``RemoteSharer`` and ``c2c share``: requests for a prefill, and the records of an answer.

GET  /v1/sharer    a :class:`~c2c.remote.handshake.Handshake`; ``?tokenizer=true`` with the tokenizer's files
POST /v1/prefill   a :class:`PrefillRequest`; the answer is a record ``begin``, one record per layer as soon as it is
                   made, and a record ``end`` or ``error``

A record is part of a handoff in its file format:

    8 bytes   length of the blob, big-endian
    32 bytes  sha256 of the blob: it finds damage; TLS is what finds forgery
    n bytes   safetensors; its metadata has a ``manifest``, JSON
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self
from weakref import WeakKeyDictionary

import torch
from pydantic import BaseModel, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from c2c.fusers import Fuser
from c2c.handoff import PRECISIONS, Precision, QuantizedTensor
from c2c.identity import ModelIdentity
from c2c.kv_cache import KeyValue, KVGeometry
from c2c.tokens import TokenBatch, natural_positions

FORMAT = "c2c-remote-2"
HANDSHAKE_PATH, PREFILL_PATH = "/v1/sharer", "/v1/prefill"
MEDIA_TYPE = "application/x-c2c-records"
OVERHEAD = 1 << 16  # bytes that manifest and safetensors header of a record may take, per row
Rows = list[tuple[QuantizedTensor, QuantizedTensor]]  # keys and values of each row of a layer
Number = Annotated[int, Field(ge=0, lt=1 << 31)]
_ALONG = {"key": 2, "value": 3}  # a scale per channel of keys, per token of values
_HASHES: WeakKeyDictionary[Fuser, tuple[Any, str]] = WeakKeyDictionary()


class PrefillRequest(BaseModel, frozen=True, extra="forbid"):
    """Describe what a sharer shall read, and which entries of it are wanted."""

    sharer: ModelIdentity  # the model that is meant
    ids: list[list[Number]]  # [rows, tokens]
    stop: Number  # only so many columns are read
    layers: list[Number]  # whose entries are sent, each once, in ascending order
    columns: list[list[Number]]  # per row those that are sent, ascending; what is drafted is sent as well
    precision: str  # on the wire; for projected entries too
    mask: list[list[bool]] | None = None  # which ids are no padding; None for all
    positions: list[list[Number]] | None = None  # None where they count the tokens of each row
    padded: bool = False  # whether the batch counts as padded though the mask is full
    draft_tokens: Number = 0  # at most so many are written first, greedily; one row only
    fuser: str | None = None  # hash of a fuser of the server, to send projected entries instead; one row only

    @model_validator(mode="after")
    def _check(self) -> Self:
        shapes = [list(map(len, part)) for part in (self.ids, self.mask, self.positions) if part is not None]
        rows, length = len(self.ids), max(shapes[0], default=0)
        if not length or any(shape != [length] * rows for shape in shapes):
            raise ValueError("ids, mask and positions must be matrices of one shape")
        if not 1 <= self.stop <= length:
            raise ValueError(f"stop must be 1 to {length}, got {self.stop}")
        if not self.layers or self.layers != sorted(set(self.layers)):
            raise ValueError("layers must be ascending whole numbers, each once")
        if len(self.columns) != rows or any(x != sorted(set(x) & set(range(self.stop))) for x in self.columns):
            raise ValueError(f"columns must be {rows} lists of ascending numbers from 0 to {self.stop - 1}")
        if not self.draft_tokens and not any(self.columns):
            raise ValueError("columns must not all be empty: no entry is wanted")
        if rows > 1 and (self.draft_tokens or self.fuser is not None):
            raise ValueError(f"drafts and projections are for one row, got {rows}")
        if self.draft_tokens and self.stop != length:
            raise ValueError(f"stop must be {length}: a draft is written after the whole prompt")
        return self

    def batch(self) -> TokenBatch:
        """Return the tokens."""
        ids = torch.tensor(self.ids)
        mask = torch.ones_like(ids, dtype=torch.bool) if self.mask is None else torch.tensor(self.mask)
        positions = natural_positions(mask) if self.positions is None else torch.tensor(self.positions)
        return TokenBatch(ids, mask, positions, self.padded or self.mask is not None)


def fuser_hash(fuser: Fuser) -> str:
    """Return the sha256 over family, layer map, geometries, identities and all weights.

    Client and server have the same one only if they would project alike. It is computed again only when a weight was
    written or replaced since the last time.
    """
    state, config = [*fuser.named_parameters(), *fuser.named_buffers()], fuser.config
    kind = [fuser.family, fuser.trained, config.layer_map, config.sharer_kv, config.receiver_kv, config.sharer]
    facts = json.dumps([*kind, getattr(config, "slots", None)], sort_keys=True)
    versions = (facts, [(name, x.data_ptr(), -1 if x.is_inference() else x._version) for name, x in state])
    known = _HASHES.get(fuser)
    if known is None or known[0] != versions:
        digest = hashlib.sha256(facts.encode())
        for name, tensor in sorted(fuser.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        known = _HASHES[fuser] = versions, digest.hexdigest()
    return known[1]


# -- records -----------------------------------------------------------------------------------------------------------


class WireError(ValueError):
    """An answer that must not be used; its code is ``malformed``, or ``damaged`` where a hash does not fit."""

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

    @classmethod
    def decode(cls, blob: bytes) -> Record:
        """Read the safetensors part of a record.

        Raises:
            WireError: it has no manifest of this format.
        """
        try:
            tensors, header = load(blob), json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
            manifest = json.loads(header["__metadata__"]["manifest"])
            given = manifest["format"]
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WireError(f"a record is no safetensors file with a manifest: {error}") from error
        if given != FORMAT:
            raise WireError(f"a record has format {given!r}, expected {FORMAT!r}: bring both sides to one version.")
        return cls(manifest, tensors)


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
        record = Record.decode(blob)
        kind = record.kind
        yield record


# -- entries of a layer ------------------------------------------------------------------------------------------------


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
        for (side, along), x in zip(_ALONG.items() if chosen.numel() else (), entries, strict=False):
            taken = x[row : row + 1].index_select(2, chosen.to(x.device))
            quantized = QuantizedTensor.quantize(taken, precision, along)
            tensors[f"{row}.{side}"] = quantized.data.cpu()
            if quantized.scale is not None:
                tensors[f"{row}.{side}.scale"] = quantized.scale.cpu()
    return tensors


def unpack(tensors: Mapping[str, Tensor], geometry: KVGeometry, columns: Sequence[int], precision: str) -> Rows:
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


def spread(rows: Rows | None, columns: Sequence[Tensor], like: Tensor) -> KeyValue:
    """Scatter entries to their columns, zero elsewhere: keys and values with the shape and type of ``like``."""
    keys, values = torch.zeros_like(like), torch.zeros_like(like)
    for row, (pair, chosen) in enumerate(zip(rows or [], columns, strict=False)):
        for target, part in zip((keys, values), pair, strict=True):
            target[row, :, chosen] = part.dequantize(like.dtype)[0]
    return keys, values
