"""Tags on headers: HMAC-SHA256 with a shared key, or without one a plain hash that finds damage, but no forgery."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from c2c.errors import C2CError

TAG_BYTES = 32
_SHORTEST_KEY = 16


class KeyFileError(C2CError, ValueError):
    """A key file that is missing or too short."""


class Signer:
    """Makes and checks tags.

    Args:
        key: the shared secret; None for a plain SHA-256.
    """

    def __init__(self, key: bytes | None) -> None:
        self._key = key

    @property
    def signs(self) -> bool:
        """Whether there is a key."""
        return self._key is not None

    def tag(self, data: bytes) -> bytes:
        """32 bytes for ``data``."""
        if self._key is None:
            return hashlib.sha256(data).digest()
        return hmac.new(self._key, data, hashlib.sha256).digest()

    def verify(self, data: bytes, tag: bytes) -> bool:
        """Whether ``tag`` was made for ``data`` with the same key, in constant time."""
        return hmac.compare_digest(self.tag(data), tag)


def read_key(path: str | Path) -> bytes:
    """The shared key in a file, white space around it taken off.

    Raises:
        KeyFileError: the file can't be read, or the key is shorter than 16 bytes.
    """
    make = f"Make one with: python -c 'import secrets; print(secrets.token_hex(32))' > {path}"
    try:
        key = Path(path).expanduser().read_bytes().strip()
    except OSError as error:
        raise KeyFileError(f"the key file {path} can't be read: {error}. {make}") from error
    if len(key) < _SHORTEST_KEY:
        raise KeyFileError(f"the key in {path} has {len(key)} bytes, expected at least {_SHORTEST_KEY}. {make}")
    return key
