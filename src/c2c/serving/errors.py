"""What a server answers in place of a result: a status, and an error in the shape of the OpenAI API."""

from __future__ import annotations

from typing import Any

from c2c.errors import C2CError


class MissingServerError(C2CError, ImportError):
    """The packages of the server are not installed."""


class ServerError(C2CError):
    """The server can't run as asked."""


class ApiError(C2CError):
    """A request that is not answered.

    Attributes:
        status: HTTP status.
        type: kind of error, as the OpenAI API names them.
        code: which error, for programs.
        param: which field of the request it is about.
        headers: response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def type(self) -> str:
        """``invalid_request_error`` where the request is wrong, else who or what failed."""
        named = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}
        return named.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def to_dict(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """A request with something wrong in it: 400."""
    return ApiError(400, message, code=code, param=param)


def too_long(message: str, param: str | None = "messages") -> ApiError:
    """A prompt for which a model has no room: 400, with the code that clients look for."""
    return ApiError(400, message, code="context_length_exceeded", param=param)


def queue_full(waiting: int, retry_after: int) -> ApiError:
    """As many requests wait as may: 429."""
    return ApiError(
        429,
        f"{waiting} requests wait already, which is the limit (--max-queue). Try again in {retry_after} s.",
        code="queue_full",
        headers={"Retry-After": str(retry_after)},
    )


def shutting_down() -> ApiError:
    """The server finishes what it has accepted and takes nothing new: 503."""
    return ApiError(
        503,
        "the server is shutting down and takes no new requests.",
        code="shutting_down",
        headers={"Retry-After": "5"},
    )


def timed_out(seconds: float) -> ApiError:
    """A request that took longer than the server allows, waiting included: 504."""
    return ApiError(
        504,
        f"the request took longer than {seconds:g} s, waiting in the queue included. Ask for fewer tokens, send fewer "
        "requests at a time, or raise --timeout.",
        code="timeout",
    )


def internal(request_id: str | None = None) -> ApiError:
    """Something of ours broke: 500; the log says what."""
    named = f" Request {request_id}." if request_id else ""
    return ApiError(500, f"the server could not answer this request; its log says why.{named}", code="internal_error")


def client_gone() -> ApiError:
    """Nobody is there any more to read an answer; never sent, only counted."""
    return ApiError(499, "the client closed the connection.", code="client_closed_request")
