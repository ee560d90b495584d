"""The body of a request, no larger than allowed, and whether its sender is still there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from c2c.serving.errors import ApiError, client_gone
from c2c.serving.ticket import Ticket

_DISCARDED = 4  # times the limit, so that clients that send first and read then get their answer


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """All bytes of a request.

    Raises:
        ApiError: too many (413), or they come too slowly (408).
    """
    try:
        async with asyncio.timeout(seconds):
            return await _read(request, limit)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {seconds:g} s.", code="timeout", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:
        raise client_gone() from None


async def _read(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > limit * _DISCARDED:
            break
    if size > limit:
        raise ApiError(
            413,
            f"the body has more than {limit} bytes, the limit of this server (--max-body-mb {limit / 1e6:g}).",
            code="request_too_large",
            headers={"Connection": "close"},
        )
    return b"".join(parts)


@asynccontextmanager
async def watched(request: Request, tickets: Sequence[Ticket]) -> AsyncIterator[None]:
    """Cancel the tickets when the client goes away meanwhile, or when the enclosed work fails."""
    watcher = asyncio.create_task(_cancel_when_gone(request, tickets))
    try:
        yield
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    finally:
        watcher.cancel()


async def _cancel_when_gone(request: Request, tickets: Sequence[Ticket]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for ticket in tickets:
        ticket.cancel()
