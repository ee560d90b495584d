"""Errors of the library as answers to the requests that they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from c2c.errors import C2CError, RemoteError, SharerChanged
from c2c.serving.engine import Ask
from c2c.serving.errors import ApiError, internal, invalid, too_long
from c2c.serving.logs import log_failure, warn
from c2c.serving.queue import Job


def as_api_error(error: C2CError, param: str | None = None) -> ApiError:
    """What a client is told. ``param`` is the field of its request that is wrong, if it is one."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, RemoteError):
        if error.code == "too_long":
            return too_long(message, param)
        status, code = (504, "sharer_timeout") if error.code == "timeout" else (502, "sharer_lost")
        return ApiError(status, f"the sharer could not be asked: {message}", code=code)
    if isinstance(error, SharerChanged):
        return ApiError(502, f"the sharer could not be asked: {message}", code="sharer_mismatch")
    # said by LanguageModel.check_tokens alone, which has no type of its own for it
    return too_long(message, param) if "which was made for" in message else invalid(message, param)


@contextmanager
def refusing(job: Job) -> Iterator[None]:
    """What goes wrong with one request is told to it, and the others of its batch go on."""
    try:
        yield
    except C2CError as error:
        log_if_lost(error)
        tell(job, error)
    except Exception as error:
        log_failure("prompt_failed", error)
        job.ticket.fail(internal())


def tell(job: Job, error: C2CError) -> None:
    """End a request with an error of the library."""
    raw = isinstance(job.ask, Ask) and isinstance(job.ask.prompt, str)
    job.ticket.fail(as_api_error(error, "prompt" if raw else "messages"))


def log_if_lost(error: C2CError) -> None:
    """Log that a sharer on another machine did not answer; errors of requests are logged with these."""
    if isinstance(error, RemoteError):
        warn("sharer_lost", code=error.code, status=error.status)
    elif isinstance(error, SharerChanged):
        warn("sharer_lost", code="mismatch")
