"""From the events of a request's prompts to a response: at once, or as a stream of chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence

from c2c.serving.engine import Answer, Delta, Event, Finished, Prefilled, RequestHandle
from c2c.serving.errors import ApiError, client_gone
from c2c.serving.http_app import RequestRecord
from c2c.serving.protocol import GenerateBody
from c2c.serving.responses import Response, ResponseBuilder, Usage, c2c_field

_DONE = "[DONE]"


class Completion:
    """The answers to one HTTP request.

    Args:
        handles: one per prompt.
        body: what was requested.
        builder: builds the response.
        seconds: how long the request may take.
        record: gets the facts for logs and metrics.
    """

    def __init__(
        self,
        handles: Sequence[RequestHandle],
        body: GenerateBody,
        builder: ResponseBuilder,
        seconds: float,
        record: RequestRecord,
    ) -> None:
        self._handles, self._body, self._builder, self._seconds = handles, body, builder, seconds
        self._record, self._system = record, record.facts["system"]
        self._finished: list[Finished] = []

    def cancel(self) -> None:
        """Give up what is not answered yet."""
        for handle in self._handles:
            handle.cancel()

    async def whole(self) -> str:
        """Return the response as JSON.

        Raises:
            ApiError: a prompt can't be answered, or it takes too long.
        """
        answers: list[tuple[int, Answer]] = []
        async for first, event in self._events():
            if isinstance(event, Answer):
                answers.append((first + event.index, event))
        answers.sort(key=lambda pair: pair[0])
        return self._builder.whole(answers, Usage.of(self._finished), self._c2c(self._body.c2c.report)).to_json()

    async def chunks(self) -> AsyncIterator[str]:
        """Iterate over the data of the events of a stream.

        With several prompts, the answers to the second begin when those to the first have ended.

        Raises:
            ApiError: something went wrong before the first chunk, so that it can still become the response's status;
                after that the error is the last event.
        """
        begun = False
        try:
            async for first, event in self._events():
                for chunk in self._chunks(first, event):
                    yield chunk.to_json()
                    begun = True
        except ApiError as error:
            if not begun:
                raise
            self._record.fail(error)
            yield error.to_json()
            return
        except (asyncio.CancelledError, GeneratorExit):
            self._record.fail(client_gone())
            raise
        finally:
            self.cancel()
        usage = Usage.of(self._finished) if self._body.include_usage else None
        if usage or self._body.c2c.report:
            yield self._builder.closing(usage, self._c2c(self._body.c2c.report)).to_json()
        yield _DONE

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """Iterate over all events, each with the index of its prompt's first answer; record the usage at the end."""
        for place, handle in enumerate(self._handles):
            async for event in handle.events(self._seconds):
                if isinstance(event, Finished):
                    self._finished.append(event)
                yield place * self._body.n, event
        self._record_usage()

    def _chunks(self, first: int, event: Event) -> Iterator[Response]:
        if isinstance(event, Prefilled):
            # a lost sharer is reported before the first token
            lost = {"system": self._system, "fallback": event.fallback} if event.fallback else {}
            openings = [self._builder.opening(first + index, lost) for index in range(self._body.n)]
            yield from (opening for opening in openings if opening is not None)
        elif isinstance(event, Delta):
            yield self._builder.delta(first + event.index, event)
        elif isinstance(event, Answer):
            yield self._builder.ending(first + event.index, event)

    def _c2c(self, report: bool) -> dict[str, object]:
        return c2c_field(self._system, self._finished, report)

    def _record_usage(self) -> None:
        finished, accepted = self._finished, min(handle.created for handle in self._handles)
        self._record.facts |= {
            "first_token_seconds": round(min(one.first_token for one in finished) - accepted, 4),
            "prompt_tokens": sum(one.prompt_tokens for one in finished),
            "completion_tokens": sum(one.completion_tokens for one in finished),
            "batch": max(one.rows for one in finished),
            "sharer_bytes": sum(one.sharer_bytes for one in finished),
        }
        if fallbacks := sum(one.fallback is not None for one in finished):
            self._record.facts["fallbacks"] = fallbacks
