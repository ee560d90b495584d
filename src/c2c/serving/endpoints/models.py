"""``/v1/models``: the systems that can answer, as models."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter

if TYPE_CHECKING:
    from c2c.serving.app import Service


def router(service: Service) -> APIRouter:
    """Return the routes."""
    made, created = APIRouter(prefix="/v1/models"), int(time.time())

    def card(name: str) -> dict[str, Any]:
        about = {"system": service.system(name), **service.engine.info}
        return {"id": name, "object": "model", "created": created, "owned_by": "c2c", "c2c": about}

    @made.get("")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in service.systems]}

    @made.get("/{name:path}")
    async def retrieve(name: str) -> dict[str, Any]:
        return card(name)

    return made
