"""``/v1/c2c/handoffs``: what a sharer has read, prefilled once and kept for many questions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cachetools import TLRUCache
from fastapi import APIRouter, Depends, Request
from pydantic import Field

from c2c.serving.config import ServeConfig
from c2c.serving.engine import HandoffCreated, HandoffRequest
from c2c.serving.errors import ApiError
from c2c.serving.http_server import on_disconnect
from c2c.serving.json_body import json_body
from c2c.serving.protocol import Body, Messages, conversation

if TYPE_CHECKING:
    from c2c.serving.app import Service


class HandoffBody(Body):
    """Body of a new handoff."""

    messages: Messages  # what the sharer reads: a text, or messages
    sharer: int | None = Field(None, ge=0)  # its index, where several hand over private context
    draft_tokens: int = Field(0, ge=0, le=1024)  # tokens of an answer that it generates, handed over as well
    precision: Literal["float32", "bfloat16", "float16", "int8", "float8"] | None = None  # how the entries are kept
    ttl_seconds: float | None = Field(None, gt=0)  # at most as long as the server keeps any


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
        config: the bounds.
        clock: seconds since 1970.
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


def router(service: Service) -> APIRouter:
    """Return the routes."""
    made, store = APIRouter(prefix="/v1/c2c/handoffs"), service.handoffs

    @made.post("", status_code=201)
    async def create(request: Request, body: Annotated[HandoffBody, Depends(json_body(HandoffBody))]) -> dict[str, Any]:
        store.check_room()
        messages = conversation(body.messages)
        handle = await service.submit(HandoffRequest(messages, body.sharer, body.draft_tokens, body.precision))
        async with on_disconnect(request, handle.cancel):
            created = [event async for event in handle.events(service.config.timeout)][-1]
        assert isinstance(created, HandoffCreated)
        stored = store.add(created, request.state.record.owner, body.ttl_seconds)
        asyncio.get_running_loop().call_later(stored.expires - stored.created + 1, store.expire)
        return stored.to_dict()

    @made.get("")
    async def list_handoffs(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [stored.to_dict() for stored in store.list(request.state.record.owner)]}

    @made.get("/{handoff}")
    async def retrieve(request: Request, handoff: str) -> dict[str, Any]:
        return store.get(handoff, request.state.record.owner).to_dict()

    @made.delete("/{handoff}")
    async def delete(request: Request, handoff: str) -> dict[str, Any]:
        store.delete(handoff, request.state.record.owner)
        return {"id": handoff, "object": "c2c.handoff", "deleted": True}

    return made
