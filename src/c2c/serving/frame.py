"""Around every request: its id, who may ask, whether anybody may, how it ended."""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from c2c.serving.errors import ApiError, internal, shutting_down
from c2c.serving.logs import log, log_failure
from c2c.serving.trace import Trace

if TYPE_CHECKING:
    from c2c.serving.service import Service

_GUARDED = "/v1/"


class Frame:
    """The outermost part of the application.

    Args:
        app: what answers.
        service: what is known about the server as a whole.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        trace = Trace.begin(scope["method"], scope["path"], headers.get("x-request-id"))
        scope.setdefault("state", {})["trace"] = trace
        guarded = scope["path"].startswith(_GUARDED)
        self._service.active += guarded
        try:
            await self._answer(scope, receive, _Marked(send, trace), headers if guarded else None)
        finally:
            self._service.active -= guarded
            self._service.ended += guarded
            if guarded:
                self._service.metrics.request(trace)
                log("request", **trace.to_dict())

    async def _answer(self, scope: Scope, receive: Receive, send: _Marked, guarded: Headers | None) -> None:
        try:
            if guarded is not None:
                send.trace.owner = owner_of(guarded.get("authorization"), self._service.settings.api_keys)
                if self._service.draining and scope["method"] == "POST":
                    raise shutting_down()
            await self._app(scope, receive, send)
        except ApiError as error:
            send.trace.code = error.code
            await error_response(error)(scope, receive, send)
        except Exception as error:
            log_failure("request_failed", error, request_id=send.trace.request_id)
            send.trace.status, send.trace.code = 500, internal().code
            if not send.started:
                await error_response(internal(send.trace.request_id))(scope, receive, send)


class _Marked:
    """Sends with the request's id in the headers, and notes the status."""

    def __init__(self, send: Send, trace: Trace) -> None:
        self._send, self.trace = send, trace
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.trace.status = self.trace.status or message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.trace.request_id
        await self._send(message)


def error_response(error: ApiError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.to_dict(), error.status, error.headers)


def owner_of(authorization: str | None, keys: tuple[str, ...]) -> str:
    """A hash of the API key that a request brings; empty where no keys are asked for.

    Raises:
        ApiError: no key, or one that is not known (401).
    """
    if not keys:
        return ""
    scheme, _, given = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise _unknown("no API key was given: send the header 'Authorization: Bearer KEY'.")
    # every key is compared, each in constant time
    known = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if not any(known):
        raise _unknown("the API key is not one of this server's.")
    return hashlib.sha256(given.strip().encode()).hexdigest()[:16]


def _unknown(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
