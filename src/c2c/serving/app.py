"""Application of ``c2c serve``: the engine, and what all endpoints share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakSet

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from c2c.serving import endpoints, http_server
from c2c.serving.config import ServeConfig
from c2c.serving.engine import Engine, Request, RequestHandle
from c2c.serving.errors import ApiError, shutting_down
from c2c.serving.handoffs import HandoffStore, StoredHandoff
from c2c.serving.http_server import ServerState


def create_app(engine: Engine, config: ServeConfig) -> FastAPI:
    """Make the application; it starts and closes the engine.

    Raises:
        ServerError: no keys, and an address that others can reach; another server uses the folder of handoffs.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        for stored in restored:
            service.expire_later(stored)
        yield
        await asyncio.to_thread(engine.close)
        if service.handoffs.folder is not None:
            service.handoffs.folder.close()

    service = Service(engine, config)
    restored = service.handoffs.restore(engine)
    app = http_server.create_app(config, endpoints.routers(service), service.state, lifespan)
    if config.cors_origin:  # outermost: browsers ask for leave without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origin,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


class Service:
    """Hold what the endpoints share.

    Args:
        engine: answers.
        config: limits and names.

    Attributes:
        handoffs: what sharers have read for later requests.
        state: counts and callbacks of the HTTP server.
        systems: names of the engine's systems, by the model name that clients use.
    """

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        self.engine, self.config, self.handoffs = engine, config, HandoffStore(config)
        self.state = ServerState(health=self._health, abort=self._abort)
        name = config.name or "c2c"
        self.systems = {name if system == "c2c" else f"{name}/{system}": system for system in engine.systems}
        self._handles: WeakSet[RequestHandle] = WeakSet()

    def system(self, model: str) -> str:
        """Return the system of a model name.

        Raises:
            ApiError: unknown (404).
        """
        if model not in self.systems:
            message = f"the model {model!r} does not exist. This server has {', '.join(self.systems)}."
            raise ApiError(404, message, code="model_not_found", param="model")
        return self.systems[model]

    async def submit(self, request: Request) -> RequestHandle:
        """Submit a request to the engine.

        Raises:
            ApiError: it is not accepted.
        """
        handle = await self.engine.submit(request)
        self._handles.add(handle)
        return handle

    def expire_later(self, stored: StoredHandoff) -> None:
        """Free a handoff when its time is over, though nobody sends a request then."""

        def expire() -> None:
            self.handoffs.expire()
            if self.handoffs.folder is not None:
                loop.run_in_executor(None, self.handoffs.folder.prune)

        loop = asyncio.get_running_loop()
        loop.call_later(max(stored.expires - time.time(), 0) + 1, expire)

    def _health(self) -> dict[str, Any]:
        """Return facts without names and addresses, since everybody may read them."""
        facts = {"waiting": self.engine.waiting, "active": self.state.active, "sharers": list(self.engine.sharers)}
        return facts if self.engine.alive else facts | {"status": "dead"}

    def _abort(self) -> None:
        for handle in list(self._handles):
            handle.fail(shutting_down())
