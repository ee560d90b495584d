"""What a server says of itself before anything is asked: the handshake."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from c2c.errors import RemoteError
from c2c.identity import ModelIdentity
from c2c.kv_cache import KVGeometry
from c2c.remote.frame import Frame
from c2c.remote.packing import PRECISIONS

_LARGEST = 1 << 28
_MOST_LAYERS = 4096


@dataclass(frozen=True)
class Greeting:
    """A server's model and terms.

    Attributes:
        identity: who the model is.
        config: of its text decoder.
        dtype: of its cache.
        layers: those whose entries may be sent.
        precisions: in which they may be sent, the finest first.
        fusers: hashes of fusers that it can project with.
        tokens: most tokens of one request, padding and drafts included.
        rotary: what :func:`c2c.remote.skeleton.rotary_sums` made there.
        rotary_error: why its rotation can't be taken off, None where it can.
        files: the tokenizer, None where there is none or it was not asked for.
    """

    identity: ModelIdentity
    config: dict[str, Any]
    dtype: torch.dtype
    layers: frozenset[int]
    precisions: tuple[str, ...]
    fusers: frozenset[str]
    tokens: int
    rotary: list[float] | None
    rotary_error: str | None
    files: Mapping[str, Any] | None

    @property
    def geometry(self) -> KVGeometry:
        """The shape of the model's cache."""
        return KVGeometry(**self.identity.kv)

    @classmethod
    def from_frame(cls, frame: Frame, url: str) -> Greeting:
        """Read a ``hello``.

        Raises:
            RemoteError: something is missing or has another form.
        """
        try:
            data = json.loads(_inflate(frame.body))
            greeting = cls(
                identity=ModelIdentity.from_dict(data["sharer"]),
                config=dict(data["config"]),
                dtype=getattr(torch, data["dtype"]),
                layers=frozenset(map(int, data["layers"])),
                precisions=tuple(name for name in data["precisions"] if name in PRECISIONS),
                fusers=frozenset(map(str, data["fusers"])),
                tokens=int(data["tokens"]),
                rotary=data["rotary"],
                rotary_error=data["rotary_error"],
                files=data["files"],
            )
            sane = isinstance(greeting.dtype, torch.dtype) and greeting.precisions
            if not sane or not 0 < greeting.geometry.layers <= _MOST_LAYERS:
                raise ValueError("facts out of range")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
            raise RemoteError(
                f"the handshake of the sharer at {url} can't be read ({type(error).__name__}: {error}). Bring both "
                "sides to the same version of c2c.",
                "malformed",
            ) from error
        return greeting


def _inflate(body: bytes) -> bytes:
    """Decompress, but not without bound."""
    engine = zlib.decompressobj()
    data = engine.decompress(body, _LARGEST)
    if not engine.eof:
        raise ValueError("cut off or too long")
    return data
