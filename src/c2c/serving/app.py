"""The HTTP interface: its routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from c2c.serving.answering import answer
from c2c.serving.body import read_body, watched
from c2c.serving.engine import AskToRead, Engine
from c2c.serving.errors import ApiError
from c2c.serving.events import Read
from c2c.serving.frame import Frame, error_response
from c2c.serving.metrics import CONTENT_TYPE
from c2c.serving.requests import ChatRequest, CompletionRequest, HandoffRequest, parse, parse_messages
from c2c.serving.responses import ChatShape, CompletionShape
from c2c.serving.service import Service
from c2c.serving.settings import Settings
from c2c.serving.trace import trace_of


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application; its ``state.service`` is what it works with. It starts and closes the engine."""
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.add_middleware(Frame, service=service)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    _add_answers(app, service)
    _add_models(app, service)
    _add_handoffs(app, service)
    _add_watching(app, service)
    return app


# -- routes ------------------------------------------------------------------------------------------------------------


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request, service))
        shape = ChatShape(asked.model, asked.logprobs)
        return await answer(request, service, asked, [asked.conversation], shape)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request, service))
        shape = CompletionShape(asked.model, asked.logprobs is not None)
        return await answer(request, service, asked, asked.prompt, shape)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": service.models()})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(service.card(name))


def _add_handoffs(app: FastAPI, service: Service) -> None:
    store = service.handoffs

    @app.post("/v1/c2c/handoffs")
    async def create(request: Request) -> Response:
        asked = parse(HandoffRequest, await _body(request, service))
        messages = parse_messages(asked.messages, "messages")
        store.check_room()
        ticket = service.submit(AskToRead(messages, asked.sharer, asked.draft_tokens, asked.precision))
        async with watched(request, [ticket]):
            async for event in ticket.events(service.settings.timeout):
                if isinstance(event, Read):
                    stored = store.add(event, trace_of(request).owner, asked.ttl_seconds)
                    asyncio.get_running_loop().call_later(stored.expires - stored.created + 1, store.purge)
                    return JSONResponse(stored.to_dict(), 201)
        raise RuntimeError("a reading ended without a word")

    @app.get("/v1/c2c/handoffs")
    async def listing(request: Request) -> Response:
        owned = store.of(trace_of(request).owner)
        return JSONResponse({"object": "list", "data": [stored.to_dict() for stored in owned]})

    @app.get("/v1/c2c/handoffs/{handoff}")
    async def show(request: Request, handoff: str) -> Response:
        return JSONResponse(store.get(handoff, trace_of(request).owner).to_dict())

    @app.delete("/v1/c2c/handoffs/{handoff}")
    async def delete(request: Request, handoff: str) -> Response:
        store.delete(handoff, trace_of(request).owner)
        return JSONResponse({"id": handoff, "object": "c2c.handoff", "deleted": True})


def _add_watching(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        facts = service.health()
        return JSONResponse(facts, 200 if facts["status"] == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


# -- helpers -----------------------------------------------------------------------------------------------------------


async def _body(request: Request, service: Service) -> bytes:
    return await read_body(request, service.settings.max_body, service.settings.timeout)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    trace = trace_of(request)
    trace.status, trace.code = error.status, error.code
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: f"there is nothing at {request.url.path}.", 405: f"{request.url.path} takes no {request.method}."}
    codes = {404: "not_found", 405: "method_not_allowed"}
    message, code = said.get(error.status_code, str(error.detail)), codes.get(error.status_code)
    return error_response(ApiError(error.status_code, message, code=code, headers=dict(error.headers or {})))
