"""Errors of an HTTP server in the shape of the OpenAI API; the status follows from the class of an exception."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from c2c.errors import C2CError, ContextLengthError, RemoteError, SharerChanged

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}


class MissingServerError(C2CError, ImportError):
    """The packages of the server are not installed."""


class ServerError(C2CError):
    """A server that can't start with the given options."""


@dataclass(eq=False)
class ApiError(C2CError):
    """A request that is refused or failed."""

    status: int  # of HTTP
    message: str  # for the client; never any text of a prompt
    code: str | None = None  # which error, for programs
    param: str | None = None  # the field of the request that is wrong
    headers: dict[str, str] = field(default_factory=dict)  # of the response
    details: dict[str, Any] = field(default_factory=dict)  # further fields of the error object

    def __post_init__(self) -> None:
        super().__init__(self.message)

    @property
    def type(self) -> str:
        """Kind of error, as the OpenAI API names them."""
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON body of the response."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error | self.details}


def to_api_error(error: C2CError, param: str | None = None) -> ApiError:
    """Convert an error of the library by its class; ``param`` is the field of the request that is wrong, if it is."""
    message = str(error)
    match error:
        case ApiError():
            return error
        case RemoteError(code="too_long") | ContextLengthError():
            return ApiError(400, message, code="context_length_exceeded", param=param)  # which clients look for
        case RemoteError():
            status, code = (504, "sharer_timeout") if error.code == "timeout" else (502, "sharer_lost")
            return ApiError(status, f"the sharer could not be asked: {message}", code=code)
        case SharerChanged():
            return ApiError(502, f"the sharer could not be asked: {message}", code="sharer_mismatch")
    return invalid(message, param)


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """Return the error of an invalid request: 400."""
    return ApiError(400, message, code=code, param=param)


def validation_error(first: Mapping[str, Any]) -> ApiError:
    """Convert the first error of pydantic: which field, and what is wrong, but not its value, which may be a text."""
    param = ".".join(str(part) for part in first.get("loc", ()))
    match first.get("type"):
        case "unsupported_parameter":
            param = ".".join(filter(None, (param, first["ctx"]["name"])))
            return invalid(f"{param} is not supported, or not with this value: leave it out.", param, first["type"])
        case "extra_forbidden" | "unexpected_keyword_argument":
            return invalid(f"unknown parameter {param}: leave it out.", param, "unknown_parameter")
        case "missing" if param:
            return invalid(f"{param} is missing.", param, "missing_parameter")
        case "json_invalid":
            return invalid("the body is not valid JSON.", code="invalid_json")
        case "missing" | "model_attributes_type" | "dataclass_type" if not param:
            return invalid("send a JSON object as body, with Content-Type: application/json.", code="invalid_json")
    message = str(first.get("msg", "it is not valid")).removeprefix("Value error, ")
    return invalid(f"{param or 'the body'}: {message}.", param or None)


def queue_full(waiting: int, seconds: float) -> ApiError:
    """Return the error of a full queue, whose next place is free after about so many seconds: 429."""
    retry_after = min(max(math.ceil(seconds), 1), 60)
    message = f"{waiting} requests wait already, which is the limit (--max-queue). Try again in {retry_after} s."
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(retry_after)})


def shutting_down() -> ApiError:
    """Return the error of a server that drains: 503."""
    message = "the server is shutting down and takes no new requests."
    return ApiError(503, message, code="shutting_down", headers={"Retry-After": "5"})


def timed_out(seconds: float) -> ApiError:
    """Return the error of a request that took longer than the server allows, waiting included: 504."""
    message = f"the request took longer than {seconds:g} s, waiting in the queue included."
    advice = "Ask for fewer tokens, send fewer requests at a time, or raise --timeout."
    return ApiError(504, f"{message} {advice}", code="timeout")


def internal(request_id: str | None = None) -> ApiError:
    """Return the error of a fault of the server: 500; the log has the details."""
    named = f" Request {request_id}." if request_id else ""
    return ApiError(500, f"the server could not answer this request; its log says why.{named}", code="internal_error")


def client_gone() -> ApiError:
    """Return the error of a closed connection; never sent, only logged and counted."""
    return ApiError(499, "the client closed the connection.", code="client_closed_request")
