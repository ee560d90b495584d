"""Answering a request: from its fields to asks for the engine, and from events to a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from c2c.serving.body import watched
from c2c.serving.engine import Ask
from c2c.serving.errors import ApiError, invalid
from c2c.serving.events import Done, Finished
from c2c.serving.requests import Options, parse_private
from c2c.serving.requests import Request as Asked
from c2c.serving.responses import Shape, about, usage
from c2c.serving.service import Service
from c2c.serving.stream import EventStream, Stream
from c2c.serving.ticket import Ticket
from c2c.serving.trace import Trace, trace_of


async def answer(request: Request, service: Service, asked: Asked, prompts: Sequence[Any], shape: Shape) -> Response:
    """Ask the engine, and answer at once or as a stream."""
    trace, seconds = trace_of(request), service.settings.timeout
    trace.stream = asked.stream
    tickets = _submit(service, trace, asked, prompts)
    report = asked.c2c.report
    async with watched(request, tickets):
        if asked.stream:
            stream = Stream(tickets, asked.n, shape, seconds, asked.include_usage, report, trace)
            chunks = stream.chunks()
            return EventStream(await anext(chunks), chunks, stream)
        finished, done = await _collect(tickets, asked.n, seconds)
    trace.note(tickets, done)
    return JSONResponse(shape.body(finished, usage(done)) | about(trace.way, done, report))


def _submit(service: Service, trace: Trace, asked: Asked, prompts: Sequence[Any]) -> list[Ticket]:
    """One ask for each prompt; all are accepted, or none."""
    way = service.way(asked.model)
    trace.way = way.value
    if len(prompts) * asked.n > service.settings.max_batch:
        raise invalid(
            f"{len(prompts)} prompts with {asked.n} answers each: one request may ask for "
            f"{service.settings.max_batch} answers (--max-batch).",
            "n",
        )
    private, prefix = _private(service, trace, asked.c2c), asked.c2c.answer_prefix
    tickets: list[Ticket] = []
    try:
        for prompt in prompts:
            ask = Ask(way, prompt, asked.sampling(), asked.n, private, prefix, asked.stream)
            tickets.append(service.submit(ask))
    except ApiError:
        for ticket in tickets:
            ticket.cancel()
        raise
    return tickets


def _private(service: Service, trace: Trace, options: Options) -> tuple[Any, ...] | None:
    """What the sharers alone have read: messages, or the values of handoffs."""
    if options.sharer_messages is not None:
        return parse_private(options.sharer_messages)
    if options.handoff is None:
        return None
    names = [options.handoff] if isinstance(options.handoff, str) else options.handoff
    return tuple(service.handoffs.get(name, trace.owner).read.value for name in names)


async def _collect(tickets: Sequence[Ticket], n: int, seconds: float) -> tuple[list[tuple[int, Finished]], list[Done]]:
    """All answers of all prompts, in order."""
    finished: list[tuple[int, Finished]] = []
    done: list[Done] = []
    for place, ticket in enumerate(tickets):
        async for event in ticket.events(seconds):
            if isinstance(event, Finished):
                finished.append((place * n + event.choice, event))
            elif isinstance(event, Done):
                done.append(event)
    return sorted(finished, key=lambda pair: pair[0]), done
