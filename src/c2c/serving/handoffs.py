"""Handoffs that a server keeps: prefilled once, asked about many times."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cachetools import TLRUCache

from c2c.serving.engine import HandoffCreated
from c2c.serving.errors import ApiError
from c2c.serving.serve_config import ServeConfig


@dataclass(frozen=True)
class StoredHandoff:
    """A handoff that is kept.

    Attributes:
        id: by which clients name it; can't be guessed.
        owner: id of the API key that made it, which alone may use it.
        handoff: what was read.
        created: seconds since 1970.
        expires: seconds since 1970.
    """

    id: str
    owner: str
    handoff: HandoffCreated
    created: float
    expires: float

    def to_dict(self) -> dict[str, Any]:
        """Return what clients see."""
        return {
            "id": self.id,
            "object": "c2c.handoff",
            "created": int(self.created),
            "expires": int(self.expires),
            "tokens": self.handoff.tokens,
            "bytes": self.handoff.nbytes,
            "precision": self.handoff.precision,
            "sharer": self.handoff.sharer,
            "sharer_index": self.handoff.index,
        }


class HandoffStore:
    """Keep handoffs until they are deleted or expire; bounded in number and bytes. For one thread.

    Args:
        config: the bounds.
        clock: seconds since 1970.
    """

    def __init__(self, config: ServeConfig, clock: Callable[[], float] = time.time) -> None:
        self._config, self._clock = config, clock
        self._kept: TLRUCache[str, StoredHandoff] = TLRUCache(
            float("inf"),  # a full store refuses; it never drops what a client may still ask about
            ttu=lambda _, stored, now: stored.expires,
            timer=clock,
            getsizeof=lambda stored: stored.handoff.nbytes,
        )

    def __len__(self) -> int:
        self.expire()
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all that are kept."""
        self.expire()
        return int(self._kept.currsize)

    def check_room(self, nbytes: int = 0) -> None:
        """Check that one more can be kept.

        Raises:
            ApiError: it is too large (413), or there are too many (429).
        """
        limit = self._config.max_handoff_bytes
        if nbytes > limit:
            raise ApiError(
                413,
                f"this handoff has {nbytes} bytes, and the server keeps {limit} (--handoff-mb). Hand over less, or ask "
                "for precision 'int8'.",
                code="handoff_too_large",
            )
        if len(self) >= self._config.handoffs or self.nbytes + nbytes > limit:
            raise ApiError(
                429,
                f"the server keeps {len(self)} handoffs of {self.nbytes} bytes and has no room for another "
                f"(--handoffs {self._config.handoffs}, --handoff-mb {limit / 1e6:g}). Delete some, or wait until they "
                "expire.",
                code="handoff_limit",
            )

    def add(self, handoff: HandoffCreated, owner: str, seconds: float | None = None) -> StoredHandoff:
        """Keep a handoff for ``seconds``, at most as long as the server keeps any.

        Raises:
            ApiError: there is no room.
        """
        self.check_room(handoff.nbytes)
        now, longest = self._clock(), self._config.handoff_seconds
        name = f"handoff-{secrets.token_hex(12)}"
        stored = StoredHandoff(name, owner, handoff, now, now + min(seconds or longest, longest))
        self._kept[name] = stored
        return stored

    def get(self, handoff: str, owner: str) -> StoredHandoff:
        """Return a handoff by its id.

        Raises:
            ApiError: this owner has none of that id (404).
        """
        stored: StoredHandoff | None = self._kept.get(handoff)
        if stored is None or stored.owner != owner:
            raise ApiError(
                404,
                f"no handoff {handoff!r}: it has expired, was deleted, or was made with another API key. POST its "
                "messages to /v1/c2c/handoffs again.",
                code="handoff_not_found",
                param="c2c.handoff",
            )
        return stored

    def list(self, owner: str) -> list[StoredHandoff]:
        """Return all handoffs of an owner, oldest first."""
        self.expire()
        return [stored for stored in self._kept.values() if stored.owner == owner]

    def delete(self, handoff: str, owner: str) -> None:
        """Delete a handoff.

        Raises:
            ApiError: this owner has none of that id (404).
        """
        del self._kept[self.get(handoff, owner).id]

    def expire(self) -> None:
        """Free those whose time is over."""
        self._kept.expire()
