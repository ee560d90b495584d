"""Errors of the library as answers to the requests that they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from c2c.errors import C2CError, RemoteError, SharerChanged
from c2c.serving.engine import Ask
from c2c.serving.errors import internal, to_api_error
from c2c.serving.logs import log_failure, warn
from c2c.serving.queue import Job


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
    job.ticket.fail(to_api_error(error, "prompt" if raw else "messages"))


def log_if_lost(error: C2CError) -> None:
    """Log that a sharer on another machine did not answer; errors of requests are logged with these."""
    if isinstance(error, RemoteError):
        warn("sharer_lost", code=error.code, status=error.status)
    elif isinstance(error, SharerChanged):
        warn("sharer_lost", code="mismatch")
