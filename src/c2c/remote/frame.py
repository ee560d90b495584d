"""The unit of the wire format: a length-prefixed JSON header, its tag, and a body whose hash stands in the header.

    4 bytes   C2C1
    4 bytes   length of the header, big-endian
    n bytes   header, JSON in UTF-8
    32 bytes  tag of the header (see signature.py)
    m bytes   body; m and its sha256 stand in the header

A request is one frame; an answer is several, numbered, of which the last says ``end``.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from c2c.remote.signature import TAG_BYTES, Signer

MAGIC = b"C2C1"
FORMAT = "c2c-remote-1"
MEDIA_TYPE = "application/x-c2c-frames"
LONGEST_HEADER = 1 << 18
_LENGTH = struct.Struct(">I")


class FrameError(ValueError):
    """Bytes that are no frame, or one that was damaged or forged.

    Attributes:
        code: ``malformed``, ``signature`` or ``damaged``.
    """

    def __init__(self, message: str, code: str = "malformed") -> None:
        super().__init__(message)
        self.code = code


class CutOffError(FrameError):
    """The bytes end within a frame."""


@dataclass(frozen=True)
class Frame:
    """One message.

    Attributes:
        header: plain data; ``kind``, ``request``, ``nonce``, ``time``, and what the kind needs.
        body: what was promised in the header.
    """

    header: dict[str, Any]
    body: bytes = b""

    @property
    def kind(self) -> str:
        """What it says."""
        return str(self.header.get("kind"))

    def tensors(self) -> dict[str, Tensor]:
        """The body as tensors.

        Raises:
            FrameError: it is no safetensors file.
        """
        if not self.body:
            return {}
        try:
            return load(self.body)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise FrameError(f"the body of a {self.kind!r} message holds no tensors: {error}") from error


def body_of(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the body of a frame; no tensor is no byte."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}) if tensors else b""


def encode(header: Mapping[str, Any], body: bytes, signer: Signer) -> list[bytes]:
    """A frame as bytes, in two pieces so that a large body is not copied."""
    facts = {"format": FORMAT, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    raw = json.dumps({**header, **facts}, sort_keys=True, separators=(",", ":")).encode()
    return [MAGIC + _LENGTH.pack(len(raw)) + raw + signer.tag(raw), body]


class FrameReader:
    """Reads frames from pieces of any size.

    Args:
        pieces: the bytes, as they come.
        signer: checks the tags.
        largest: longest body that is taken.
    """

    def __init__(self, pieces: Iterable[bytes], signer: Signer, largest: int) -> None:
        self._pieces, self._signer, self._largest = iter(pieces), signer, largest
        self._held = bytearray()
        self.count = 0  # bytes read

    def __iter__(self) -> Iterator[Frame]:
        while (frame := self.read()) is not None:
            yield frame

    def read(self) -> Frame | None:
        """The next frame; None where the bytes end between two.

        Raises:
            FrameError: no frame, of another format, too large, damaged or forged. CutOffError: the bytes end within.
        """
        start = self._take(len(MAGIC) + _LENGTH.size, may_end=True)
        if not start:
            return None
        if not start.startswith(MAGIC):
            raise FrameError(f"a message begins with {start[:4]!r}, expected {MAGIC!r}: this is not c2c's format.")
        (length,) = _LENGTH.unpack(start[len(MAGIC) :])
        if not 0 < length <= LONGEST_HEADER:
            raise FrameError(f"a header of {length} bytes, expected 1 to {LONGEST_HEADER}.")
        raw, tag = self._take(length), self._take(TAG_BYTES)
        if not self._signer.verify(raw, tag):
            raise FrameError(
                "the tag of a header does not fit it: it was damaged or forged, or only one side has a key, or another "
                "one. Give both sides the same key file.",
                "signature",
            )
        header = _header(raw)
        return Frame(header, self._body(header))

    def _body(self, header: dict[str, Any]) -> bytes:
        length, digest = header.get("bytes"), header.get("sha256")
        if type(length) is not int or not 0 <= length <= self._largest:
            raise FrameError(f"a body of {length!r} bytes, expected 0 to {self._largest}.")
        body = self._take(length)
        if hashlib.sha256(body).hexdigest() != digest:
            raise FrameError("a body does not have the sha256 in its header: it was damaged or forged.", "damaged")
        return body

    def _take(self, count: int, may_end: bool = False) -> bytes:
        while len(self._held) < count:
            piece = next(self._pieces, None)
            if piece is None:
                if may_end and not self._held:
                    return b""
                raise CutOffError(f"the data ends in the middle of a message, after {self.count} bytes.", "cut_off")
            self.count += len(piece)
            self._held += piece
        taken = bytes(self._held[:count])
        del self._held[:count]
        return taken


def _header(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a header is not JSON: {type(error).__name__}.") from error
    if not isinstance(header, dict):
        raise FrameError(f"a header is a JSON {type(header).__name__}, expected an object.")
    if header.get("format") != FORMAT:
        raise FrameError(
            f"a message of format {header.get('format')!r}, expected {FORMAT!r}. Bring both sides to the same version "
            "of c2c."
        )
    return header
