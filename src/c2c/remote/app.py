"""The server's HTTP side: ``POST /v1/hello``, ``POST /v1/share`` and ``GET /health``."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from c2c.remote.desk import Desk
from c2c.remote.frame import MEDIA_TYPE, Frame
from c2c.remote.log import Log
from c2c.remote.refusal import Refusal
from c2c.remote.stall import Stall
from c2c.version import __version__

HELLO, SHARE = ("hello",), ("prefill", "read", "project")


class TimedStream(StreamingResponse):
    """A stream that is cut at a deadline, also where the other side does not take what is sent.

    Args:
        content: the pieces.
        deadline: on the monotonic clock.
        ended: called when it is over, however it ends.
    """

    def __init__(self, content: AsyncIterator[bytes], deadline: float, ended: Callable[[], None]) -> None:
        super().__init__(content, media_type=MEDIA_TYPE)
        self._pieces, self._deadline, self._ended = content, deadline, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send."""
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # the connection is closed without the last frame, which the client notices
        finally:
            close = getattr(self._pieces, "aclose", None)
            if close is not None:
                await close()
            self._ended()


def build_app(stall: Stall, desk: Desk, log: Log) -> FastAPI:
    """The application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        stall.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "waiting": stall.waiting}

    async def respond(request: Request, kinds: tuple[str, ...]) -> Response:
        began = time.monotonic()
        facts: dict[str, Any] = {"path": request.url.path}

        def done(status: int, **more: Any) -> None:
            log.write("request", status=status, seconds=round(time.monotonic() - began, 4), **(facts | more))

        try:
            address = request.client.host if request.client else "unknown"
            facts["caller"] = desk.admit(request.headers.get("authorization"), address)
            frame = desk.open(await _body(request, desk.limits.body_bytes, desk.limits.seconds), kinds)
            facts |= {"request": frame.header["request"], "kind": frame.kind}
            if kinds == HELLO:
                done(200)
                return Response(b"".join(stall.hello(frame)), media_type=MEDIA_TYPE)
            return _stream(stall, frame, began + desk.limits.seconds, facts, done)
        except Refusal as refusal:
            done(refusal.status, code=refusal.code)
            return _refused(refusal)
        except Exception as error:  # a fault of ours: the server goes on, and says where, but no text of a request
            place = traceback.extract_tb(error.__traceback__)[-1]
            done(500, code="failed", error=type(error).__name__, at=f"{place.name}:{place.lineno}")
            return _refused(Refusal(500, "failed", f"the server failed: {type(error).__name__}. See its log."))

    @app.post("/v1/hello")
    async def hello(request: Request) -> Response:
        return await respond(request, HELLO)

    @app.post("/v1/share")
    async def share(request: Request) -> Response:
        return await respond(request, SHARE)

    return app


def _stream(stall: Stall, frame: Frame, deadline: float, facts: dict[str, Any], done: Callable[..., None]) -> Response:
    order = stall.order(frame)
    facts |= {"rows": order.tokens.rows, "tokens": int(order.tokens.mask.sum()), "precision": order.precision}
    outcome: dict[str, Any] = {}
    return TimedStream(
        stall.answer(frame, order, deadline, outcome), deadline, lambda: done(200, **({"code": "cut"} | outcome))
    )


async def _body(request: Request, largest: int, seconds: float) -> bytes:
    """The body, if it is not too long and comes in time."""
    too_long = Refusal(413, "too_long", f"the request is longer than {largest} bytes. Send smaller batches.")
    if int(request.headers.get("content-length") or 0) > largest:
        raise too_long
    held = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                held += piece
                if len(held) > largest:
                    raise too_long
    except TimeoutError as error:
        raise Refusal(408, "timeout", f"the request did not arrive within {seconds:.0f} seconds.") from error
    return bytes(held)


def _refused(refusal: Refusal) -> JSONResponse:
    headers = {} if refusal.retry_after is None else {"Retry-After": str(int(refusal.retry_after))}
    return JSONResponse(refusal.to_dict(), refusal.status, headers)
