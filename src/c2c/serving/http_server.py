"""HTTP base of ``c2c serve`` and ``c2c share``: application, middleware, error responses, health, TLS, graceful end."""

from __future__ import annotations

import asyncio
import math
import re
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn
from cachetools import TTLCache
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

from c2c.errors import C2CError
from c2c.serving.config import HTTPConfig, KeyRing
from c2c.serving.errors import (
    ApiError,
    ServerError,
    client_gone,
    internal,
    shutting_down,
    to_api_error,
    validation_error,
)
from c2c.serving.logs import log, log_failure

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})  # without key, log line and limits
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_DISCARDED = 4  # times the body limit that are read, so that clients that send first and read then get the 413
_GRACE = 5.0  # seconds after the longest request, for sending


@dataclass
class RequestRecord:
    """Record one request for logs and metrics; ``request.state.record`` in an endpoint. No texts."""

    request_id: str  # the client's x-request-id if it can stand in a header, else a new one
    method: str
    path: str
    owner: str = ""  # id of the API key, empty without keys
    status: int | None = None  # of HTTP, even where a stream that began with 200 failed later
    code: str | None = None  # which error
    facts: dict[str, Any] = field(default_factory=dict)  # further ones for the log, set by endpoints
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the request came in."""
        return time.monotonic() - self.began

    def fail(self, error: ApiError) -> None:
        """Record an error."""
        self.status, self.code = error.status, error.code

    def to_dict(self) -> dict[str, Any]:
        """Return what is logged."""
        known = {name: value for name, value in vars(self).items() if value and name not in ("facts", "began")}
        return known | {"seconds": round(self.seconds, 4)} | self.facts


@dataclass
class ServerState:
    """Count the requests of one server, and hold its callbacks; ``app.state.server``."""

    health: Callable[[], dict[str, Any]] = dict  # facts for /health; a status other than "ok" means 503
    on_request: Callable[[RequestRecord], None] = lambda record: None  # gets each that has ended, for metrics
    abort: Callable[[], None] = lambda: None  # gives up what is under way, at a second signal
    active: int = 0  # requests under way
    ended: int = 0
    draining: bool = False  # new requests are refused, because the server is about to end


def create_app(
    config: HTTPConfig, routers: Sequence[APIRouter], state: ServerState, lifespan: Lifespan[FastAPI] | None = None
) -> FastAPI:
    """Make an application with keys, limits, error responses, logs, ``/health`` and ``/ready`` around some routes.

    Raises:
        ServerError: keys that can't be used, or none and an address that others can reach.
    """
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.server = state
    app.add_middleware(RequestMiddleware, config=config, state=state, keys=config.keys())
    for kind in (C2CError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _on_error)
    for router in routers:
        app.include_router(router)

    @app.get("/health")
    @app.get("/ready")
    async def health(request: Request) -> JSONResponse:
        facts = {"status": "draining" if state.draining else "ok"} | state.health()
        shown = facts if request.url.path == "/health" else {"status": facts["status"]}
        return JSONResponse(shown, 200 if facts["status"] == "ok" else 503)

    return app


class RequestMiddleware:
    """Wrap every request: id, key, rate, body limit, faults, log."""

    def __init__(self, app: ASGIApp, config: HTTPConfig, state: ServerState, keys: KeyRing) -> None:
        self._app, self._config, self._state, self._keys = app, config, state, keys
        self._counts: TTLCache[str, list[float]] = TTLCache(10_000, ttl=60)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            scope = _plain(scope)
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        record, started = RequestRecord(request_id, scope["method"], scope["path"]), False
        scope.setdefault("state", {})["record"] = record

        async def send_recorded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = record.status or message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        self._state.active += 1
        try:
            if failure := await self._respond(scope, receive, send_recorded, record):
                record.fail(failure)
                if not started and failure.code != client_gone().code:
                    await _response(failure)(scope, receive, send_recorded)
        finally:
            self._state.active -= 1
            self._state.ended += 1
            self._state.on_request(record)
            log("request", **record.to_dict())

    async def _respond(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> ApiError | None:
        """Let the application answer, and return the error that is still to be sent."""
        try:
            record.owner = self._keys.owner(Headers(scope=scope).get("authorization"))
            self._check_rate(record.owner or str((scope.get("client") or ("unknown",))[0]))
            if self._state.draining and scope["method"] == "POST":
                raise shutting_down()
            await self._app(scope, await self._buffered(receive), send)
        except ApiError as error:
            return error
        except Exception as error:
            log_failure("request_failed", error, request_id=record.request_id)
            return internal(record.request_id)
        return None

    def _check_rate(self, caller: str) -> None:
        if not self._config.rate:
            return
        now = time.monotonic()
        times = [then for then in self._counts.get(caller, ()) if then > now - 60]
        if len(times) >= self._config.rate:
            wait = max(1, math.ceil(times[0] + 60 - now))
            message = f"more than {self._config.rate} requests in a minute (--rate); try again in {wait} seconds."
            raise ApiError(429, message, code="rate", headers={"Retry-After": str(wait)})
        self._counts[caller] = [*times, now]

    async def _buffered(self, receive: Receive) -> Receive:
        """Read the whole body, within size and time, and return what replays it."""
        parts, size, limit, more = [], 0, self._config.max_body, True
        try:
            async with asyncio.timeout(self._config.timeout):
                while more and size <= limit * _DISCARDED:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise client_gone()
                    size += len(message.get("body", b""))
                    parts.append(message.get("body", b"") if size <= limit else b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            reason = f"the body did not arrive within {self._config.timeout:g} s."
            raise ApiError(408, reason, code="timeout", headers={"Connection": "close"}) from None
        if size > limit:
            reason = f"the body has more than {limit} bytes, the limit of this server (--max-body-mb or --max-body-kb)."
            raise ApiError(413, reason, code="request_too_large", headers={"Connection": "close"})
        messages = iter([{"type": "http.request", "body": b"".join(parts), "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        return replay


def _plain(scope: Scope) -> Scope:
    """Return a request with the path and method that routes are for.

    Clients that join addresses send slashes twice or at the end. HEAD is answered as GET; uvicorn leaves the body out.
    """
    path = re.sub("/{2,}", "/", scope["path"]).rstrip("/") or "/"
    return {**scope, "path": path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}


def _response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.to_dict(), error.status, error.headers)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    match error:
        case C2CError():
            known = to_api_error(error)
        case RequestValidationError():
            first = error.errors()[0]
            known = validation_error({**first, "loc": first["loc"][1:]})
        case HTTPException(status_code=status):
            code, message = {
                400: ("invalid_json", "the body is not valid JSON."),  # all that FastAPI itself refuses this way
                404: ("not_found", f"there is nothing at {request.url.path}."),
                405: ("method_not_allowed", f"{request.url.path} takes no {request.method}."),
            }.get(status, (None, str(error.detail)))
            known = ApiError(status, message, code=code, headers=dict(error.headers or {}))
        case _:
            known = internal()
    if isinstance(record := getattr(request.state, "record", None), RequestRecord):
        record.fail(known)
    return _response(known)


@asynccontextmanager
async def on_disconnect(request: Request, cancel: Callable[[], None]) -> AsyncIterator[None]:
    """Call ``cancel`` when the client goes away meanwhile, or when the enclosed work fails. Read the body first."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        cancel()
        raise
    finally:
        watcher.cancel()


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket, so that a port that is taken is found out before models are loaded.

    Raises:
        ServerError: it is taken, or there is no such address.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = error.strerror or error
        raise ServerError(f"can't listen at {host}:{port}: {reason}. Choose another --host or --port.") from error
    except (UnicodeError, TypeError) as error:  # a name that can not be encoded, by version of Python
        bound.close()
        raise ServerError(f"{host!r:.80} is no address: {error}. Choose another --host.") from error
    return bound


def url_of(sock: socket.socket, config: HTTPConfig) -> str:
    """Return the address of a server, such as ``https://127.0.0.1:8650``."""
    host, port = sock.getsockname()[:2]
    return f"{'https' if config.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Serve HTTP, and finish what was accepted before the end.

    At SIGTERM or SIGINT new requests are refused while those under way are answered; a second signal gives them up, a
    third waits for nothing.

    Attributes:
        forced: whether requests were given up.
    """

    def __init__(self, app: FastAPI, config: HTTPConfig) -> None:
        options = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            ws="none",
            server_header=False,
            limit_concurrency=config.connections,
            timeout_keep_alive=75,  # longer than clients keep idle connections: none is closed under a request
            timeout_graceful_shutdown=int(_GRACE),
            **_tls_options(config),
        )
        super().__init__(options)
        self._http, self._state = config, app.state.server
        self._draining: asyncio.Task[None] | None = None
        self.forced = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at a signal; outside the main thread there are none."""
        asyncio.get_running_loop().call_soon_threadsafe(self.stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and log where."""
        await super().startup(sockets)
        if self.started and sockets:
            log("ready", url=url_of(sockets[0], self._http))

    def stop(self) -> None:
        """Finish what was accepted and end; called again, give it up. On the event loop."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        elif not self.forced:
            self.forced = True
            log("giving_up", active=self._state.active)
            self._state.abort()
        else:
            self.force_exit = self.should_exit = True

    async def _drain(self) -> None:
        self._state.draining = True
        log("draining", active=self._state.active)
        until = time.monotonic() + self._http.timeout + _GRACE
        while self._state.active and time.monotonic() < until and not self.should_exit:
            if self.forced:
                until = min(until, time.monotonic() + _GRACE)
            await asyncio.sleep(0.05)
        self.should_exit = True


def serve(app: FastAPI, sock: socket.socket, config: HTTPConfig) -> bool:
    """Serve until SIGTERM or SIGINT.

    Returns:
        Whether everything that was accepted was answered.

    Raises:
        ServerError: the application did not start.
    """
    server = Server(app, config)
    server.run([sock])
    if not server.started:
        raise ServerError("the server did not start; see above.")
    log("stopped", forced=server.forced)
    return not server.forced


def _tls_options(config: HTTPConfig) -> dict[str, Any]:
    required = ssl.CERT_REQUIRED if config.tls_client_ca is not None else ssl.CERT_NONE
    return {
        "ssl_certfile": config.tls_cert,
        "ssl_keyfile": config.tls_key,
        "ssl_ca_certs": config.tls_client_ca,
        "ssl_cert_reqs": required,
    }
