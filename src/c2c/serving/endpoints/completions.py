"""``/v1/chat/completions`` and ``/v1/completions``: answers, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic_core import to_json
from sse_starlette import EventSourceResponse

from c2c.prompting import RenderOptions
from c2c.serving.engine import Delta, Event, Finished, GenerateRequest, Prefilled, RequestHandle, TokenLogprob
from c2c.serving.errors import ApiError, client_gone, invalid
from c2c.serving.http_app import RequestRecord, on_disconnect
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
    def entry(token: str, logprob: float) -> dict[str, Any]:
        # bytes are None for a part of a character
        return {"token": token, "logprob": logprob, "bytes": None if "\ufffd" in token else list(token.encode())}

    content = [entry(one.token, one.logprob) | {"top_logprobs": [entry(*top) for top in one.top]} for one in entries]
    return {"content": content, "refusal": None}


def _completion_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "tokens": [one.token for one in entries],
        "token_logprobs": [one.logprob for one in entries],
        "top_logprobs": [dict(one.top) for one in entries],
        "text_offset": [one.offset for one in entries],
    }


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
    async def chat_completions(request: Request, body: ChatCompletionBody) -> Response:
        return await respond(request, body, CHAT)

    @made.post("/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        return await respond(request, body, COMPLETION)

    return made


async def _chain(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for chunk in rest:
        yield chunk


async def _submit(service: Service, body: GenerateBody, record: RequestRecord) -> list[RequestHandle]:
    """Submit one request for each prompt; all are accepted, or none."""
    system = record.facts["system"] = service.system(body.model)
    record.facts["stream"] = body.stream
    prompts, most = body.conversations, service.config.max_batch
    if len(prompts) * body.n > most:
        raise invalid(
            f"{len(prompts)} prompts with {body.n} answers each: a request may have {most} answers (--max-batch).", "n"
        )
    private = _private(service, body, record.owner)
    render = RenderOptions(answer_prefix=body.c2c.answer_prefix, chat_template=isinstance(body, ChatCompletionBody))
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


def _private(service: Service, body: GenerateBody, owner: str) -> tuple[Any, ...] | None:
    """Return what the sharers alone have read: conversations, or handoffs of this owner."""
    if body.c2c.sharer_messages is not None:
        return tuple(conversation(messages) for messages in body.c2c.sharer_messages)
    if body.c2c.handoff is None:
        return None
    return tuple(service.handoffs.get(name, owner).handoff.handoff for name in body.c2c.handoff)


class Completion:
    """The answers to one HTTP request.

    Args:
        handles: one per prompt.
        body: what was requested.
        form: the fields of its answers.
        seconds: how long the request may take.
        record: gets the facts for logs and metrics.
    """

    def __init__(
        self,
        handles: Sequence[RequestHandle],
        body: GenerateBody,
        form: AnswerFormat,
        seconds: float,
        record: RequestRecord,
    ) -> None:
        self._handles, self._body, self._form, self._seconds, self._record = handles, body, form, seconds, record
        self._finished: list[Finished] = []
        self._head = {"id": f"{form.id}-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}

    def cancel(self) -> None:
        """Give up what is not answered yet."""
        for handle in self._handles:
            handle.cancel()

    async def whole(self) -> bytes:
        """Return the response as JSON.

        Raises:
            ApiError: a prompt can't be answered, or it takes too long.
        """
        deltas: list[list[Delta]] = [[] for _ in range(len(self._handles) * self._body.n)]
        async for first, event in self._events():
            if isinstance(event, Delta):
                deltas[first + event.index].append(event)
        choices = []
        for index, parts in enumerate(deltas):
            text, entries = "".join(part.text for part in parts), [one for part in parts for one in part.logprobs]
            choices.append(self._choice(index, self._form.message(text), entries, parts[-1].reason))
        return _json(self._response(self._form.whole, choices) | {"usage": self._usage()} | self._c2c())

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
                    yield _json(chunk).decode()
                    begun = True
        except ApiError as error:
            if not begun:
                raise
            self._record.fail(error)
            yield _json(error.to_dict()).decode()
            return
        except (asyncio.CancelledError, GeneratorExit):
            self._record.fail(client_gone())
            raise
        finally:
            self.cancel()
        usage = {"usage": self._usage()} if self._body.include_usage else {}
        if usage or self._body.c2c.report:
            yield _json(self._response(self._form.chunk, []) | usage | self._c2c()).decode()
        yield "[DONE]"

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """Iterate over all events, each with the index of its prompt's first answer; record the usage at the end."""
        for place, handle in enumerate(self._handles):
            async for event in handle.events(self._seconds):
                if isinstance(event, Finished):
                    self._finished.append(event)
                yield place * self._body.n, event
        self._record_usage()

    def _chunks(self, first: int, event: Event) -> Iterator[dict[str, Any]]:
        form = self._form
        if isinstance(event, Prefilled) and (event.fallback or form is CHAT):
            # a lost sharer is reported before the first token
            lost = {"c2c": {"system": self._record.facts["system"], "fallback": event.fallback}}
            for index in range(first, first + self._body.n):
                yield self._chunk(index, form.opening) | (lost if event.fallback else {})
        elif isinstance(event, Delta):
            index = first + event.index
            if event.text or event.logprobs:
                yield self._chunk(index, form.delta(event.text), event.logprobs)
            if event.reason is not None:
                yield self._chunk(index, form.ending, reason=event.reason)

    def _chunk(
        self,
        index: int,
        fields: Mapping[str, Any],
        entries: Sequence[TokenLogprob] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        usage = {"usage": None} if self._body.include_usage else {}
        return self._response(self._form.chunk, [self._choice(index, fields, entries, reason)]) | usage

    def _choice(
        self, index: int, fields: Mapping[str, Any], entries: Sequence[TokenLogprob] | None, reason: str | None
    ) -> dict[str, Any]:
        wanted = entries is not None and self._body.top_count is not None
        logprobs = self._form.logprobs(entries or ()) if wanted else None
        return {"index": index, **fields, "logprobs": logprobs, "finish_reason": reason}

    def _response(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}

    def _usage(self) -> dict[str, int]:
        """Add up the tokens of all prompts and answers."""
        prompt = sum(one.prompt_tokens for one in self._finished)
        answers = sum(one.completion_tokens for one in self._finished)
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}

    def _c2c(self) -> dict[str, Any]:
        """Return the field ``c2c``, of the one prompt or of each.

        It is there where a report is requested, and where a sharer was lost: no answer is silently not fused.
        """
        report = self._body.c2c.report
        if not report and not any(one.fallback for one in self._finished):
            return {}
        facts: list[dict[str, Any]] = []
        for one in self._finished:
            shown = {"report": one.report, "message": one.message, "batch": one.rows} if report else {}
            facts.append({"system": self._record.facts["system"], "fallback": one.fallback, **shown})
        return {"c2c": facts[0] if len(facts) == 1 else {"prompts": facts}}

    def _record_usage(self) -> None:
        finished, accepted = self._finished, min(handle.created for handle in self._handles)
        usage, fallbacks = self._usage(), sum(one.fallback is not None for one in finished)
        self._record.facts |= {
            "first_token_seconds": round(min(one.first_token for one in finished) - accepted, 4),
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "batch": max(one.rows for one in finished),
            "sharer_bytes": sum(one.sharer_bytes for one in finished),
        } | ({"fallbacks": fallbacks} if fallbacks else {})


def _json(data: dict[str, Any]) -> bytes:
    return to_json(data, inf_nan_mode="null")  # JSON has no infinities
