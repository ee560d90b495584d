"""Handoffs that a server keeps: in memory, with bounds, and in a folder if they are to survive a restart."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachetools import TLRUCache
from filelock import FileLock, Timeout

from c2c.errors import C2CError, HandoffError
from c2c.library import Library
from c2c.serving.config import ServeConfig
from c2c.serving.engine import Engine, HandoffCreated
from c2c.serving.errors import ApiError, ServerError
from c2c.serving.logs import warn


@dataclass(frozen=True)
class StoredHandoff:
    """A handoff that is kept."""

    id: str  # by which clients name it; can't be guessed
    owner: str  # id of the API key that made it, which alone may use it
    handoff: HandoffCreated
    created: float  # seconds since 1970
    expires: float  # seconds since 1970

    def to_dict(self) -> dict[str, Any]:
        """Return what clients see."""
        made = self.handoff
        kept = {"id": self.id, "object": "c2c.handoff", "created": int(self.created), "expires": int(self.expires)}
        read = {"tokens": made.tokens, "bytes": made.nbytes, "precision": made.precision}
        notes = {"notes": list(made.notes)} if made.notes else {}
        return kept | read | {"sharer": made.sharer, "sharer_index": made.index} | notes


class HandoffStore:
    """Keep handoffs until they are deleted or expire; bounded in number and bytes. For one thread.

    Args:
        config: the bounds, and the folder.
        clock: seconds since 1970.

    Attributes:
        folder: where they survive a restart; None where they don't.

    Raises:
        ServerError: another server uses the folder.
    """

    def __init__(self, config: ServeConfig, clock: Callable[[], float] = time.time) -> None:
        self._config, self._clock, self._max_bytes = config, clock, int(config.handoff_mb * 1e6)
        self._kept: TLRUCache[str, StoredHandoff] = TLRUCache(
            float("inf"),  # a full store refuses; it never drops what a client may still use
            ttu=lambda _, stored, now: stored.expires,
            timer=clock,
            getsizeof=lambda stored: stored.handoff.nbytes,
        )
        self.expire = self._kept.expire  # frees those whose time is over
        self.folder = None if config.handoff_folder is None else HandoffFolder(config.handoff_folder)

    def restore(self, engine: Engine) -> list[StoredHandoff]:
        """Take up what the folder has; what can't be used is logged and left there."""
        for stored in self.folder.load(engine) if self.folder else ():
            try:
                self.check_room(stored.handoff.nbytes)
            except ApiError as error:
                warn("handoff_not_restored", handoff=stored.id, reason=str(error))
            else:
                self._kept[stored.id] = stored
        return list(self._kept.values())

    def __len__(self) -> int:
        self.expire()
        return len(self._kept)

    def __contains__(self, handoff: object) -> bool:
        return handoff in self._kept

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
        if nbytes > self._max_bytes:
            raise ApiError(
                413,
                f"this handoff has {nbytes} bytes, and the server keeps {self._max_bytes} (--handoff-mb). Hand over "
                "less, or ask for precision 'int8'.",
                code="handoff_too_large",
            )
        if len(self) >= self._config.handoffs or self.nbytes + nbytes > self._max_bytes:
            raise ApiError(
                429,
                f"the server keeps {len(self)} handoffs of {self.nbytes} bytes and has no room for another "
                f"(--handoffs {self._config.handoffs}, --handoff-mb {self._config.handoff_mb:g}). Delete some, or wait "
                "until they expire.",
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


class HandoffFolder:
    """Keep a server's handoffs on disk, in a :class:`~c2c.library.Library` for their server alone.

    Each is bound to the id of its API key. May be used in any thread.

    Raises:
        ServerError: another server uses the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.library = Library(folder)
        self.library.prune()
        self._lock = FileLock(self.library.make() / ".server.lock", timeout=0, mode=0o600, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ServerError(
                f"--handoff-folder {folder} is used by another server, and would be kept by neither. Choose another "
                "folder, or end the other server."
            ) from error

    def load(self, engine: Engine) -> Iterator[StoredHandoff]:
        """Load what a server has saved here, oldest first; what can't be used is logged and left there."""
        for entry in sorted(self.library.entries(), key=lambda entry: entry.created):
            try:
                handoff = self.library.get(entry.name, bound_to=entry.bound_to)
                index, created = entry.about.get("sharer_index"), entry.about.get("stored")
                if entry.bound_to is None or entry.expires is None or index is None or created is None:
                    raise HandoffError("no server has saved it.")
                stored = StoredHandoff(
                    entry.name, entry.bound_to, engine.restore_handoff(handoff, index), created, entry.expires
                )
            except (C2CError, OSError) as error:
                warn("handoff_not_restored", handoff=entry.name, reason=str(error))
                continue
            yield stored

    def save(self, stored: StoredHandoff) -> None:
        """Write a handoff.

        Raises:
            ApiError: it can't be written (507).
        """
        about = {"sharer_index": stored.handoff.index, "stored": stored.created}
        try:
            self.library.add(
                stored.handoff.handoff, stored.id, expires=stored.expires, bound_to=stored.owner, about=about
            )
        except (C2CError, OSError) as error:
            warn("handoff_not_saved", handoff=stored.id, reason=str(error))
            message = "the handoff can't be kept: its server could not write it to its folder, and its log says why."
            raise ApiError(507, message, code="handoff_not_saved") from error

    def remove(self, handoff: str) -> None:
        """Delete the file of a handoff, if there is one."""
        if handoff in self.library:
            self.library.remove(handoff)

    def prune(self) -> None:
        """Delete the files of handoffs that have expired."""
        self.library.prune()

    def close(self) -> None:
        """Leave the folder to another server."""
        self._lock.release()
