"""The HTTP interface: routes, from requests to asks and from events to responses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from c2c.serving.body import read_body, watched
from c2c.serving.engine import Ask, AskToRead, Engine
from c2c.serving.errors import ApiError, invalid
from c2c.serving.events import Done, Finished, Read
from c2c.serving.frame import Frame, error_response
from c2c.serving.metrics import CONTENT_TYPE
from c2c.serving.requests import (
    ChatRequest,
    CompletionRequest,
    HandoffRequest,
    Options,
    parse,
    parse_messages,
    parse_private,
)
from c2c.serving.requests import Request as Asked
from c2c.serving.responses import ChatShape, CompletionShape, Shape, usage
from c2c.serving.service import Service
from c2c.serving.settings import Settings
from c2c.serving.stream import EventStream, Stream
from c2c.serving.ticket import Ticket
from c2c.serving.trace import Trace


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
        return await _answer(request, service, asked, [asked.conversation], shape)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request, service))
        shape = CompletionShape(asked.model, asked.logprobs is not None)
        return await _answer(request, service, asked, asked.prompt, shape)


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
                    stored = store.add(event, _trace(request).owner, asked.ttl_seconds)
                    asyncio.get_running_loop().call_later(stored.expires - stored.created + 1, store.purge)
                    return JSONResponse(stored.to_dict(), 201)
        raise RuntimeError("a reading ended without a word")

    @app.get("/v1/c2c/handoffs")
    async def listing(request: Request) -> Response:
        owned = store.of(_trace(request).owner)
        return JSONResponse({"object": "list", "data": [stored.to_dict() for stored in owned]})

    @app.get("/v1/c2c/handoffs/{handoff}")
    async def show(request: Request, handoff: str) -> Response:
        return JSONResponse(store.get(handoff, _trace(request).owner).to_dict())

    @app.delete("/v1/c2c/handoffs/{handoff}")
    async def delete(request: Request, handoff: str) -> Response:
        store.delete(handoff, _trace(request).owner)
        return JSONResponse({"id": handoff, "object": "c2c.handoff", "deleted": True})


def _add_watching(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        state = service.state
        facts = {"status": state, "waiting": service.engine.waiting, "active": service.active}
        return JSONResponse(facts, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


# -- answering ---------------------------------------------------------------------------------------------------------


async def _answer(request: Request, service: Service, asked: Asked, prompts: Sequence[Any], shape: Shape) -> Response:
    """Ask the engine, and answer at once or as a stream."""
    trace, seconds = _trace(request), service.settings.timeout
    trace.stream = asked.stream
    tickets = _submit(service, trace, asked, prompts)
    extra = (lambda done: _about(trace, done)) if asked.c2c.report else None
    async with watched(request, tickets):
        if asked.stream:
            stream = Stream(tickets, asked.n, shape, seconds, asked.include_usage, extra, trace)
            chunks = stream.chunks()
            return EventStream(await anext(chunks), chunks, stream)
        finished, done = await _collect(tickets, asked.n, seconds)
    trace.note(tickets, done)
    body = shape.body(finished, usage(done))
    return JSONResponse(body | {"c2c": extra(done)} if extra else body)


def _submit(service: Service, trace: Trace, asked: Asked, prompts: Sequence[Any]) -> list[Ticket]:
    """One ask for each prompt; all are accepted, or none."""
    way = service.way(asked.model)
    trace.way = way.value
    if len(prompts) * asked.n > service.settings.max_batch:
        raise invalid(
            f"{len(prompts)} prompts with {asked.n} answers each: one request may ask for "
            f"{service.settings.max_batch} answers (--max-batch).",
            "n",
        )
    private, prefix = _private(service, trace, asked.c2c), asked.c2c.answer_prefix
    tickets: list[Ticket] = []
    try:
        for prompt in prompts:
            ask = Ask(way, prompt, asked.sampling(), asked.n, private, prefix, asked.stream)
            tickets.append(service.submit(ask))
    except ApiError:
        for ticket in tickets:
            ticket.cancel()
        raise
    return tickets


def _private(service: Service, trace: Trace, options: Options) -> tuple[Any, ...] | None:
    """What the sharers alone have read: messages, or the values of handoffs."""
    if options.sharer_messages is not None:
        return parse_private(options.sharer_messages)
    if options.handoff is None:
        return None
    names = [options.handoff] if isinstance(options.handoff, str) else options.handoff
    return tuple(service.handoffs.get(name, trace.owner).read.value for name in names)


async def _collect(tickets: Sequence[Ticket], n: int, seconds: float) -> tuple[list[tuple[int, Finished]], list[Done]]:
    """All answers of all prompts, in order."""
    finished: list[tuple[int, Finished]] = []
    done: list[Done] = []
    for place, ticket in enumerate(tickets):
        async for event in ticket.events(seconds):
            if isinstance(event, Finished):
                finished.append((place * n + event.choice, event))
            elif isinstance(event, Done):
                done.append(event)
    return sorted(finished, key=lambda pair: pair[0]), done


def _about(trace: Trace, done: Sequence[Done]) -> dict[str, Any]:
    """What was asked for with ``report``: of the first prompt, or of each."""
    facts = [{"way": trace.way, "report": one.report, "message": one.message, "batch": one.rows} for one in done]
    return facts[0] if len(facts) == 1 else {"prompts": facts}


# -- helpers -----------------------------------------------------------------------------------------------------------


async def _body(request: Request, service: Service) -> bytes:
    return await read_body(request, service.settings.max_body, service.settings.timeout)


def _trace(request: Request) -> Trace:
    trace: Trace = request.state.trace
    return trace


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    trace = _trace(request)
    trace.status, trace.code = error.status, error.code
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: f"there is nothing at {request.url.path}.", 405: f"{request.url.path} takes no {request.method}."}
    codes = {404: "not_found", 405: "method_not_allowed"}
    message, code = said.get(error.status_code, str(error.detail)), codes.get(error.status_code)
    return error_response(ApiError(error.status_code, message, code=code, headers=dict(error.headers or {})))
