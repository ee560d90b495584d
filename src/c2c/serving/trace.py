"""One HTTP request as logs and metrics see it."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from c2c.serving.events import Done
from c2c.serving.ticket import Ticket

_SANE = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass
class Trace:
    """What is known about a request. No texts.

    Attributes:
        request_id: the client's own if it sent one that can stand in a header, else ours.
        method: of the request.
        path: of the request, without its query.
        owner: a hash of its API key; empty without keys.
        way: who answers; None where nobody is asked.
        status: what it ended with, even if a stream had begun with 200.
        code: which error.
        stream: whether a stream was asked for.
        done: what the engine said at the end.
        first_token: seconds from acceptance to the first token.
        began: ``time.monotonic()``.
    """

    request_id: str
    method: str
    path: str
    owner: str = ""
    way: str | None = None
    status: int | None = None
    code: str | None = None
    stream: bool = False
    done: list[Done] = field(default_factory=list)
    first_token: float | None = None
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(cls, method: str, path: str, request_id: str | None) -> Trace:
        """A trace for a request that has just come in."""
        sane = request_id if request_id and _SANE.fullmatch(request_id) else secrets.token_hex(16)
        return cls(sane, method, path)

    def note(self, tickets: Sequence[Ticket], done: Sequence[Done]) -> None:
        """Note how the request was answered."""
        self.done = list(done)
        self.first_token = min(one.first_token for one in done) - min(ticket.made for ticket in tickets)

    @property
    def seconds(self) -> float:
        """Since it came in."""
        return time.monotonic() - self.began

    def to_dict(self) -> dict[str, Any]:
        """For the log."""
        facts: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(self.seconds, 4),
        }
        if self.code is not None:
            facts["code"] = self.code
        if self.way is not None:
            facts |= {"way": self.way, "stream": self.stream}
        if self.done:
            facts |= {
                "first_token_seconds": round(self.first_token or 0, 4),
                "prompt_tokens": sum(one.prompt_tokens for one in self.done),
                "completion_tokens": sum(one.completion_tokens for one in self.done),
                "batch": max(one.rows for one in self.done),
                "crossed_bytes": sum(one.crossed for one in self.done),
            }
        if any(one.fallback for one in self.done):
            facts["fallback"] = True
        return facts


def trace_of(request: Request) -> Trace:
    """What :class:`~c2c.serving.frame.Frame` knows about a request."""
    trace: Trace = request.state.trace
    return trace
