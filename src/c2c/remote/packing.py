"""Keys and values of one layer on the wire: per row the columns that are asked for, in the precision asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from c2c.handoff import Packed, Precision
from c2c.kv_cache import KeyValue, KVGeometry
from c2c.remote.frame import FrameError

NUMBER_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8": 1}
PRECISIONS: tuple[str, ...] = get_args(Precision)
Side = Literal["key", "value"]
_ALONG: dict[Side, int] = {"key": 2, "value": 3}  # a scale per channel of keys, per token of values
_SCALED = ("int8", "float8")
_DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


def native(dtype: torch.dtype) -> str:
    """The precision in which entries of this type cross unchanged."""
    name = str(dtype).removeprefix("torch.")
    return name if name in PRECISIONS else "float32"


def packed_bytes(geometry: KVGeometry, layers: int, columns: int, precision: str) -> int:
    """Bytes of so many columns of so many layers of one row, scales included."""
    scales = 4 * (geometry.width + geometry.kv_heads * columns) if precision in _SCALED else 0
    return layers * (2 * geometry.width * columns * NUMBER_BYTES[precision] + scales)


def pack(entries: KeyValue, columns: Sequence[Tensor], precision: Precision) -> dict[str, Tensor]:
    """Tensors to send.

    Args:
        entries: keys and values of a layer, ``[rows, kv_heads, tokens, head_dim]``.
        columns: per row, which; a row without any takes no space.
        precision: on the wire.
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
class Expected:
    """What a layer must look like that was asked for; anything else is refused before it is used.

    Attributes:
        geometry: the shape of the cache.
        columns: per row, how many.
        precision: on the wire.
    """

    geometry: KVGeometry
    columns: tuple[int, ...]
    precision: str

    def rows(self, tensors: Mapping[str, Tensor]) -> list[tuple[Packed, Packed] | None]:
        """Keys and values per row, each ``[1, kv_heads, columns, head_dim]``; None for a row without columns.

        Raises:
            FrameError: other tensors, shapes or types than were asked for.
        """
        made: list[tuple[Packed, Packed] | None] = []
        used: set[str] = set()
        for row, count in enumerate(self.columns):
            if count == 0:
                made.append(None)
                continue
            made.append(
                (self._packed(tensors, row, "key", count, used), self._packed(tensors, row, "value", count, used))
            )
        if extra := sorted(set(tensors) - used):
            raise FrameError(f"tensors were sent that nobody asked for: {extra[:5]}.")
        return made

    def _packed(self, tensors: Mapping[str, Tensor], row: int, side: Side, count: int, used: set[str]) -> Packed:
        heads, dim, name = self.geometry.kv_heads, self.geometry.head_dim, f"{row}.{side}"
        dtype = _DTYPES.get(self.precision) or getattr(torch, self.precision)
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
        raise FrameError(f"tensor {name!r}: got {got}, expected {shape} of {dtype}.")
    used.add(name)
    return tensor


def spread(rows: Sequence[tuple[Packed, Packed] | None], columns: Sequence[Tensor], like: Tensor) -> KeyValue:
    """Entries at their columns, zero elsewhere: keys and values with the shape and type of ``like``."""
    keys, values = torch.zeros_like(like), torch.zeros_like(like)
    for row, (pair, chosen) in enumerate(zip(rows, columns, strict=True)):
        if pair is not None:
            keys[row, :, chosen] = pair[0].unpack(like.dtype)[0]
            values[row, :, chosen] = pair[1].unpack(like.dtype)[0]
    return keys, values
