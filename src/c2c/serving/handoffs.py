"""Handoffs that a server keeps: read once, asked about many times."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from c2c.serving.errors import ApiError
from c2c.serving.events import Read
from c2c.serving.settings import Settings


@dataclass(frozen=True)
class Stored:
    """A handoff that is kept.

    Attributes:
        id: by which it is asked for; can't be guessed.
        owner: who may use it.
        read: what was read.
        created: seconds since 1970.
        expires: seconds since 1970.
    """

    id: str
    owner: str
    read: Read
    created: float
    expires: float

    def to_dict(self) -> dict[str, Any]:
        """For clients."""
        return {
            "id": self.id,
            "object": "c2c.handoff",
            "created": int(self.created),
            "expires": int(self.expires),
            "tokens": self.read.tokens,
            "bytes": self.read.nbytes,
            "precision": self.read.precision,
            "sharer": self.read.sharer,
            "sharer_index": self.read.index,
        }


class HandoffStore:
    """Keeps handoffs until they are deleted or expire; bounded in number and bytes. For one thread.

    Args:
        settings: the bounds.
        clock: seconds since 1970.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self._settings, self._clock = settings, clock
        self._kept: dict[str, Stored] = {}

    def __len__(self) -> int:
        self.purge()
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all that are kept."""
        self.purge()
        return sum(stored.read.nbytes for stored in self._kept.values())

    def check_room(self, nbytes: int = 0) -> None:
        """Make sure that one more can be kept.

        Raises:
            ApiError: it is too large (413), or there are too many (429).
        """
        limit = self._settings.max_handoff_bytes
        if nbytes > limit:
            raise ApiError(
                413,
                f"this handoff has {nbytes} bytes, and the server keeps {limit} (--handoff-mb). Hand over less, or ask "
                "for precision 'int8'.",
                code="handoff_too_large",
            )
        if len(self) >= self._settings.max_handoffs or self.nbytes + nbytes > limit:
            raise ApiError(
                429,
                f"the server keeps {len(self)} handoffs of {self.nbytes} bytes and has no room for another "
                f"(--handoffs {self._settings.max_handoffs}, --handoff-mb {limit / 1e6:g}). Delete some, or wait until "
                "they expire.",
                code="handoff_limit",
            )

    def add(self, read: Read, owner: str, seconds: float | None = None) -> Stored:
        """Keep a handoff, at most as long as the server keeps any.

        Raises:
            ApiError: there is no room.
        """
        self.check_room(read.nbytes)
        now, longest = self._clock(), self._settings.handoff_seconds
        stored = Stored(f"handoff-{secrets.token_hex(12)}", owner, read, now, now + min(seconds or longest, longest))
        self._kept[stored.id] = stored
        return stored

    def get(self, handoff: str, owner: str) -> Stored:
        """A handoff by its id.

        Raises:
            ApiError: there is none of this owner (404).
        """
        self.purge()
        stored = self._kept.get(handoff)
        if stored is None or stored.owner != owner:
            raise ApiError(
                404,
                f"no handoff {handoff!r}: it has expired, was deleted, or was made with another API key. POST its "
                "messages to /v1/c2c/handoffs again.",
                code="handoff_not_found",
                param="c2c.handoff",
            )
        return stored

    def of(self, owner: str) -> list[Stored]:
        """All handoffs of an owner, oldest first."""
        self.purge()
        return [stored for stored in self._kept.values() if stored.owner == owner]

    def delete(self, handoff: str, owner: str) -> None:
        """Forget a handoff.

        Raises:
            ApiError: there is none of this owner (404).
        """
        found = self.get(handoff, owner)  # before the dict is looked at: it may take another's place
        del self._kept[found.id]

    def purge(self) -> None:
        """Forget those that have expired."""
        now = self._clock()
        self._kept = {key: stored for key, stored in self._kept.items() if stored.expires > now}
