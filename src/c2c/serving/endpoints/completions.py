"""``/v1/chat/completions`` and ``/v1/completions``: answers, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic_core import to_json
from sse_starlette import EventSourceResponse

from c2c.serving.engine import (
    Delta,
    Event,
    Finished,
    GenerateRequest,
    Prefilled,
    RequestHandle,
    TokenLogprob,
    TokenScore,
)
from c2c.serving.errors import ApiError, client_gone, invalid
from c2c.serving.http_server import RequestRecord, on_disconnect
from c2c.serving.json_body import json_body
from c2c.serving.protocol import ChatCompletionBody, CompletionBody, GenerateBody, conversation

if TYPE_CHECKING:
    from c2c.serving.app import Service


@dataclass(frozen=True)
class AnswerFormat:
    """Fields of one kind of answers."""

    id: str  # its prefix
    whole: str  # type of a response,
    chunk: str  # and of a part of a stream
    message: Callable[[str], dict[str, Any]]  # a whole text,
    delta: Callable[[str], dict[str, Any]]  # and a part of it
    opening: Mapping[str, Any]  # of the first chunk, which completions have only where there is something to report
    ending: Mapping[str, Any]  # of the last one
    logprobs: Callable[[Sequence[TokenLogprob]], dict[str, Any]]


def _chat_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    def entry(one: TokenScore) -> dict[str, Any]:
        return {"token": one.text, "logprob": one.logprob, "bytes": None if one.bytes is None else list(one.bytes)}

    content = [entry(one.token) | {"top_logprobs": [entry(other) for other in one.top]} for one in entries]
    return {"content": content, "refusal": None}


def _completion_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "tokens": [one.token.text for one in entries],
        "token_logprobs": [one.token.logprob for one in entries],
        "top_logprobs": [_by_text(one) for one in entries],
        "text_offset": [one.offset for one in entries],
    }


def _by_text(one: TokenLogprob) -> dict[str, float]:
    """Return log-probabilities by the names of tokens, the chosen one's under its own.

    Another of the same name, since several tokens may have one text, goes by its id.
    """
    found: dict[str, float] = {}
    for other in one.top if any(other.id == one.token.id for other in one.top) else [*one.top, one.token]:
        own = other.id == one.token.id or (other.text != one.token.text and other.text not in found)
        found[other.text if own else f"token_id:{other.id}"] = other.logprob
    return found


CHAT = AnswerFormat(
    id="chatcmpl",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    message=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    delta=lambda text: {"delta": {"content": text}},
    opening={"delta": {"role": "assistant", "content": ""}},
    ending={"delta": {}},
    logprobs=_chat_logprobs,
)
COMPLETION = AnswerFormat(
    id="cmpl",
    whole="text_completion",
    chunk="text_completion",
    message=lambda text: {"text": text},
    delta=lambda text: {"text": text},
    opening={"text": ""},
    ending={"text": ""},
    logprobs=_completion_logprobs,
)


def router(service: Service) -> APIRouter:
    """Return the routes."""
    made = APIRouter(prefix="/v1")

    async def respond(request: Request, body: GenerateBody, form: AnswerFormat) -> Response:
        record: RequestRecord = request.state.record
        completion = Completion(await _submit(service, body, record), body, form, service.config.timeout, record)
        async with on_disconnect(request, completion.cancel):
            if not body.stream:
                return Response(await completion.whole(), media_type="application/json")
            chunks = completion.chunks()
            first = await anext(chunks)  # until it is there an error can still become the status
        return EventSourceResponse(_chain(first, chunks), sep="\n")

    @made.post("/chat/completions")
    async def chat_completions(
        request: Request, body: Annotated[ChatCompletionBody, Depends(json_body(ChatCompletionBody))]
    ) -> Response:
        return await respond(request, body, CHAT)

    @made.post("/completions")
    async def completions(
        request: Request, body: Annotated[CompletionBody, Depends(json_body(CompletionBody))]
    ) -> Response:
        return await respond(request, body, COMPLETION)

    @made.post("/responses")
    async def responses() -> None:  # which some clients use unless they are set otherwise, without a word
        message = "the Responses API is not served: set the client to chat completions (/v1/chat/completions)."
        raise ApiError(404, message, code="not_found")

    return made


async def _chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for chunk in rest:
        yield chunk


async def _submit(service: Service, body: GenerateBody, record: RequestRecord) -> list[RequestHandle]:
    """Submit one request for each prompt; all are accepted, or none."""
    system = record.facts["system"] = service.system(body.model)
    record.facts["stream"] = body.stream
    prompts, most, private = body.conversations, service.config.max_batch, None
    if len(prompts) * body.n > most:
        raise invalid(
            f"{len(prompts)} prompts with {body.n} answers each: a request may have {most} answers (--max-batch).", "n"
        )
    if body.c2c.sharer_messages is not None:
        private = tuple(conversation(messages) for messages in body.c2c.sharer_messages)
    elif body.c2c.handoff is not None:
        private = _handed_over(service, body.c2c.handoffs, record.owner)
    render = body.render()
    handles: list[RequestHandle] = []
    try:
        for prompt in prompts:
            request = GenerateRequest(system, prompt, render, body.sampling(), body.n, private, body.stream)
            handles.append(await service.submit(request))
    except BaseException:
        for handle in handles:
            handle.cancel()
        raise
    return handles


def _handed_over(service: Service, ids: list[str], owner: str) -> tuple[Any, ...]:
    """Return what each sharer hands over: a handoff, or a list of several documents in the order of their ids.

    Which sharer has made a handoff is known, so that a list of ids for one sharer means what it says.
    """
    if len(ids) > service.config.handoffs_per_request:
        raise invalid(
            f"{len(ids)} handoffs: a request may name {service.config.handoffs_per_request} "
            "(--handoffs-per-request). Name those that the question is about.",
            "c2c.handoff",
            "too_many_handoffs",
        )
    by_sharer: dict[int, list[Any]] = {}
    for one in ids:
        made = service.handoffs.get(one, owner).handoff
        by_sharer.setdefault(made.index, []).append(made.handoff)
    return tuple(found[0] if len(found) == 1 else found for _, found in sorted(by_sharer.items()))


@dataclass
class Completion:
    """The answers to one HTTP request."""

    handles: Sequence[RequestHandle]  # one per prompt
    body: GenerateBody
    form: AnswerFormat
    seconds: float  # that the request may take
    record: RequestRecord  # gets the facts for logs and metrics
    finished: list[Finished] = field(default_factory=list)
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def cancel(self) -> None:
        """Give up what is not answered yet."""
        for handle in self.handles:
            handle.cancel()

    async def whole(self) -> str:
        """Return the response as JSON.

        Raises:
            ApiError: a prompt can't be answered, or it takes too long.
        """
        choices = []
        async for first, event in self._events():
            if isinstance(event, Delta):
                message = self.form.message(event.text)
                choices.append(self._choice(first + event.index, message, event.logprobs, event.reason))
        choices.sort(key=lambda choice: int(choice["index"]))
        return self._response(self.form.whole, choices, usage=self._usage(), **self._c2c())

    async def chunks(self) -> AsyncIterator[str]:
        """Iterate over the data of the events of a stream.

        With several prompts, the answers to the second begin when those to the first have ended.

        Raises:
            ApiError: something went wrong before the first chunk, so that it can still become the response's status;
                after that the error is the last event.
        """
        begun, usage = False, self.body.include_usage
        empty = {"usage": None} if usage else {}
        try:
            async for first, event in self._events():
                for choice, further in self._parts(first, event):
                    yield self._response(self.form.chunk, [choice], **empty, **further)
                    begun = True
        except ApiError as error:
            if not begun:
                raise
            self.record.fail(error)
            yield _json(error.to_dict())
            return
        except (asyncio.CancelledError, GeneratorExit):
            self.record.fail(client_gone())
            raise
        finally:
            self.cancel()
        if usage or self.body.c2c.report:
            yield self._response(self.form.chunk, [], **({"usage": self._usage()} if usage else {}), **self._c2c())
        yield "[DONE]"

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """Iterate over all events, each with the index of its prompt's first answer; record the usage at the end."""
        for place, handle in enumerate(self.handles):
            async for event in handle.events(self.seconds):
                if isinstance(event, Finished):
                    self.finished.append(event)
                yield place * self.body.n, event
        self._record_usage()

    def _parts(self, first: int, event: Event) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Return the choices of an event's chunks, each with further fields of its chunk."""
        form = self.form
        if isinstance(event, Prefilled) and (event.fallback or event.notes or form is CHAT):
            # a lost sharer, or message, is reported before the first token
            further = {"c2c": self._remarks(event)} if event.fallback or event.notes else {}
            for index in range(first, first + self.body.n):
                yield self._choice(index, form.opening), further
        elif isinstance(event, Delta):
            index = first + event.index
            if event.text or event.logprobs:
                yield self._choice(index, form.delta(event.text), event.logprobs), {}
            if event.reason is not None:
                yield self._choice(index, form.ending, reason=event.reason), {}

    def _choice(
        self,
        index: int,
        fields: Mapping[str, Any],
        entries: Sequence[TokenLogprob] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        logprobs = None if entries is None or self.body.top_count is None else self.form.logprobs(entries)
        return {"index": index, **fields, "logprobs": logprobs, "finish_reason": reason}

    def _response(self, kind: str, choices: list[dict[str, Any]], **further: Any) -> str:
        head = {"id": f"{self.form.id}-{self.number}", "object": kind, "created": self.created}
        return _json({**head, "model": self.body.model, "choices": choices, **further})

    def _usage(self) -> dict[str, int]:
        """Add up the tokens of all prompts and answers."""
        prompt = sum(one.prompt_tokens for one in self.finished)
        answers = sum(one.completion_tokens for one in self.finished)
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}

    def _c2c(self) -> dict[str, Any]:
        """Return the field ``c2c``, of the one prompt or of each.

        It is there where a report is requested, and where a sharer was lost or a message left out: no answer is
        silently another than the one requested.
        """
        report = self.body.c2c.report
        if not report and not any(one.fallback or one.notes for one in self.finished):
            return {}
        facts: list[dict[str, Any]] = []
        for one in self.finished:
            shown = {"report": one.report, "message": one.message, "batch": one.rows} if report else {}
            facts.append(self._remarks(one) | shown)
        return {"c2c": facts[0] if len(facts) == 1 else {"prompts": facts}}

    def _remarks(self, event: Prefilled | Finished) -> dict[str, Any]:
        notes = {"notes": list(event.notes)} if event.notes else {}
        return {"system": self.record.facts["system"], "fallback": event.fallback, **notes}

    def _record_usage(self) -> None:
        finished, accepted = self.finished, min(handle.created for handle in self.handles)
        usage = self._usage()
        self.record.facts |= {
            "first_token_seconds": round(min(one.first_token for one in finished) - accepted, 4),
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "batch": max(one.rows for one in finished),
            "sharer_bytes": sum(one.sharer_bytes for one in finished),
        }
        if fallbacks := sum(one.fallback is not None for one in finished):
            self.record.facts["fallbacks"] = fallbacks


def _json(data: dict[str, Any]) -> str:
    return to_json(data, inf_nan_mode="null").decode()  # JSON has no infinities
