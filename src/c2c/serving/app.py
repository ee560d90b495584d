"""Application of ``c2c serve``: routes of the OpenAI API, handoffs and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakSet

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse

from c2c.prompting import RenderOptions
from c2c.serving import http_app
from c2c.serving.completions import Completion
from c2c.serving.engine import Engine, GenerateRequest, HandoffCreated, HandoffRequest, RequestHandle
from c2c.serving.errors import ApiError, invalid, shutting_down
from c2c.serving.handoffs import HandoffStore
from c2c.serving.http_app import RequestRecord, ServerState, on_disconnect
from c2c.serving.metrics import CONTENT_TYPE, Metrics
from c2c.serving.protocol import ChatCompletionBody, CompletionBody, GenerateBody, HandoffBody, conversation
from c2c.serving.responses import ResponseBuilder
from c2c.serving.serve_config import ServeConfig


def create_app(engine: Engine, config: ServeConfig) -> FastAPI:
    """Make the application; it starts and closes the engine.

    Raises:
        ServerError: no keys, and an address that others can reach.
    """
    service = Service(engine, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    routers = [_completions(service), _models(service), _handoffs(service), _metrics(service)]
    return http_app.create_app(config, routers, service.state, lifespan)


class Service:
    """Hold what the routes share.

    Args:
        engine: answers.
        config: limits and names.
    """

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        self.engine, self.config, self.handoffs = engine, config, HandoffStore(config)
        self.state = ServerState(health=self._health, abort=self._abort)
        gauges = {
            "c2c_queue_length": lambda: engine.waiting,
            "c2c_active_requests": lambda: self.state.active,
            "c2c_handoffs": lambda: len(self.handoffs),
            "c2c_handoff_bytes": lambda: self.handoffs.nbytes,
        }
        self.metrics = Metrics(gauges, lambda: engine.sharers)
        self.state.on_request, engine.on_batch = self.metrics.request, self.metrics.batch
        self._handles: WeakSet[RequestHandle] = WeakSet()
        self._created = int(time.time())
        name = config.name or "c2c"
        self._systems = {name if one == "c2c" else f"{name}/{one}": one for one in engine.info.systems}

    def _health(self) -> dict[str, Any]:
        """Return facts without names and addresses, since everybody may read them."""
        sharers = [
            {"state": "ok"} if one.lost is None else {"state": "lost", "code": one.lost, "since": one.since}
            for one in self.engine.sharers
        ]
        facts = {"waiting": self.engine.waiting, "active": self.state.active, "sharers": sharers}
        return facts if self.engine.alive else facts | {"status": "dead"}

    def _abort(self) -> None:
        for handle in list(self._handles):
            handle.fail(shutting_down())

    async def submit(self, request: GenerateRequest | HandoffRequest) -> RequestHandle:
        """Submit a request to the engine.

        Raises:
            ApiError: it is not accepted.
        """
        handle = await self.engine.submit(request)
        self._handles.add(handle)
        return handle

    def system(self, model: str) -> str:
        """Return the system of a model name.

        Raises:
            ApiError: unknown (404).
        """
        if model not in self._systems:
            message = f"the model {model!r} does not exist. This server has {', '.join(self._systems)}."
            raise ApiError(404, message, code="model_not_found", param="model")
        return self._systems[model]

    def models(self) -> list[dict[str, Any]]:
        """Return all model cards."""
        return [self.card(name) for name in self._systems]

    def card(self, name: str) -> dict[str, Any]:
        """Return one model card.

        Raises:
            ApiError: unknown (404).
        """
        system, info = self.system(name), self.engine.info
        about = {
            "system": system,
            "receiver": info.receiver,
            "sharers": list(info.sharers),
            "context": info.context,
            "trained": info.trained,
        }
        return {"id": name, "object": "model", "created": self._created, "owned_by": "c2c", "c2c": about}

    async def submit_all(self, body: GenerateBody, record: RequestRecord, chat: bool) -> list[RequestHandle]:
        """Submit one request for each prompt; all are accepted, or none.

        Raises:
            ApiError: one of them is not accepted.
        """
        system = record.facts["system"] = self.system(body.model)
        record.facts["stream"] = body.stream
        prompts, most = body.conversations, self.config.max_batch
        if len(prompts) * body.n > most:
            raise invalid(
                f"{len(prompts)} prompts with {body.n} answers each: a request may have {most} answers (--max-batch).",
                "n",
            )
        private = self._private(body, record.owner)
        render = RenderOptions(answer_prefix=body.c2c.answer_prefix, chat_template=chat)
        handles: list[RequestHandle] = []
        try:
            for prompt in prompts:
                request = GenerateRequest(system, prompt, render, body.sampling(), body.n, private, body.stream)
                handles.append(await self.submit(request))
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return handles

    def _private(self, body: GenerateBody, owner: str) -> tuple[Any, ...] | None:
        """Return what the sharers alone have read: conversations, or handoffs of this owner."""
        if body.c2c.sharer_messages is not None:
            return tuple(conversation(messages) for messages in body.c2c.sharer_messages)
        if body.c2c.handoff is None:
            return None
        return tuple(self.handoffs.get(name, owner).handoff.handoff for name in body.c2c.handoff)


# -- routes ------------------------------------------------------------------------------------------------------------


def _completions(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")

    async def respond(request: Request, body: GenerateBody, chat: bool) -> Response:
        record: RequestRecord = request.state.record
        builder = ResponseBuilder(body.model, chat=chat, logprobs=body.top_count is not None, usage=body.include_usage)
        handles = await service.submit_all(body, record, chat)
        completion = Completion(handles, body, builder, service.config.timeout, record)
        async with on_disconnect(request, completion.cancel):
            if not body.stream:
                return Response(await completion.whole(), media_type="application/json")
            chunks = completion.chunks()
            first = await anext(chunks)  # until it is there an error can still become the status
        return EventSourceResponse(_chain(first, chunks), sep="\n")

    @router.post("/chat/completions")
    async def chat_completions(request: Request, body: ChatCompletionBody) -> Response:
        return await respond(request, body, chat=True)

    @router.post("/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        return await respond(request, body, chat=False)

    return router


def _models(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": service.models()})

    @router.get("/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(service.card(name))

    return router


def _handoffs(service: Service) -> APIRouter:
    router, store = APIRouter(prefix="/v1/c2c"), service.handoffs

    @router.post("/handoffs")
    async def create(request: Request, body: HandoffBody) -> Response:
        store.check_room()
        messages = conversation(body.messages)
        handle = await service.submit(HandoffRequest(messages, body.sharer, body.draft_tokens, body.precision))
        async with on_disconnect(request, handle.cancel):
            created = [event async for event in handle.events(service.config.timeout)][-1]
        assert isinstance(created, HandoffCreated)
        stored = store.add(created, request.state.record.owner, body.ttl_seconds)
        asyncio.get_running_loop().call_later(stored.expires - stored.created + 1, store.expire)
        return JSONResponse(stored.to_dict(), 201)

    @router.get("/handoffs")
    async def listing(request: Request) -> Response:
        owned = store.list(request.state.record.owner)
        return JSONResponse({"object": "list", "data": [stored.to_dict() for stored in owned]})

    @router.get("/handoffs/{handoff}")
    async def show(request: Request, handoff: str) -> Response:
        return JSONResponse(store.get(handoff, request.state.record.owner).to_dict())

    @router.delete("/handoffs/{handoff}")
    async def delete(request: Request, handoff: str) -> Response:
        store.delete(handoff, request.state.record.owner)
        return JSONResponse({"id": handoff, "object": "c2c.handoff", "deleted": True})

    return router


def _metrics(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return router


async def _chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for chunk in rest:
        yield chunk
