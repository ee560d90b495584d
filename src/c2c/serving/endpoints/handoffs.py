"""``/v1/c2c/handoffs``: what a sharer has read, prefilled once and kept for many questions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from c2c.serving.engine import HandoffCreated, HandoffRequest
from c2c.serving.errors import ApiError
from c2c.serving.http_server import on_disconnect
from c2c.serving.json_body import json_body
from c2c.serving.protocol import Before, Body, Messages, conversation

if TYPE_CHECKING:
    from c2c.serving.app import Service


class HandoffBody(Body):
    """Body of a new handoff."""

    messages: Messages  # what the sharer reads: a text, or messages
    before: Before | None = None  # what prompts about it begin with: a system message, or messages
    among: bool | str = False  # it will stand among others: read behind another passage, this text or the server's own
    sharer: int | None = Field(None, ge=0)  # its index, where several hand over private context
    draft_tokens: int = Field(0, ge=0, le=1024)  # tokens of an answer that it generates, handed over as well
    precision: Literal["float32", "bfloat16", "float16", "int8", "float8"] | None = None  # how the entries are kept
    ttl_seconds: float | None = Field(None, gt=0)  # at most as long as the server keeps any


def router(service: Service) -> APIRouter:
    """Return the routes."""
    made, store, folder = APIRouter(prefix="/v1/c2c/handoffs"), service.handoffs, service.handoffs.folder

    @made.post("", status_code=201)
    async def create(request: Request, body: Annotated[HandoffBody, Depends(json_body(HandoffBody))]) -> dict[str, Any]:
        store.check_room()
        messages = conversation(body.messages)
        before = None if body.before is None else conversation(body.before)
        handle = await service.submit(
            HandoffRequest(messages, body.sharer, body.draft_tokens, body.precision, before, body.among)
        )
        async with on_disconnect(request, handle.cancel):
            created = [event async for event in handle.events(service.config.timeout)][-1]
        assert isinstance(created, HandoffCreated)
        stored = store.add(created, request.state.record.owner, body.ttl_seconds)
        service.expire_later(stored)
        if folder is not None:
            try:
                await asyncio.to_thread(folder.save, stored)
            except ApiError:
                store.delete(stored.id, stored.owner)
                raise
            if stored.id not in store:  # it was deleted while it was written
                await asyncio.to_thread(folder.remove, stored.id)
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
        if folder is not None:
            await asyncio.to_thread(folder.remove, handoff)
        return {"id": handoff, "object": "c2c.handoff", "deleted": True}

    return made
