"""Response bodies and chunks of streams in the shape of the OpenAI API."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from c2c.serving.engine import Answer, Delta, Finished, FinishReason, TokenLogprob


class Logprob(BaseModel):
    """One token with its log-probability; ``bytes`` is None for part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[Logprob] | None = None


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat completion."""

    content: list[Logprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion, one list per fact."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChatText(BaseModel):
    """Message of a chat completion, or the part of it in a chunk."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class Choice(BaseModel):
    """One answer, or what a chunk adds to it; completions have ``text``, chat completions one of the others."""

    index: int
    message: ChatText | None = None
    delta: ChatText | None = None
    text: str | None = None
    logprobs: ChatLogprobs | CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Usage(BaseModel):
    """Tokens of all prompts and answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, finished: Sequence[Finished]) -> Usage:
        """Add up the requests of one response."""
        prompt = sum(one.prompt_tokens for one in finished)
        completion = sum(one.completion_tokens for one in finished)
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class Response(BaseModel):
    """A whole response, or a chunk of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    c2c: dict[str, Any] | None = None

    def to_json(self) -> str:
        """Return JSON without fields that were not set."""
        return self.model_dump_json(exclude_unset=True)


class ResponseBuilder:
    """Build the response to one request.

    Args:
        model: what the client called it.
        chat: whether it is a chat completion.
        logprobs: whether log-probabilities were requested.
        usage: whether every chunk of a stream has the field ``usage``.
    """

    def __init__(self, model: str, *, chat: bool, logprobs: bool, usage: bool = False) -> None:
        self._chat, self._logprobs, self._usage = chat, logprobs, usage
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: Sequence[tuple[int, Answer]], usage: Usage, c2c: dict[str, Any]) -> Response:
        """Return all answers at once."""
        kind = "chat.completion" if self._chat else "text_completion"
        choices = []
        for index, one in answers:
            message = ChatText(role="assistant", content=one.text, refusal=None)
            part = {"message": message} if self._chat else {"text": one.text}
            logprobs = self._logprobs_of(one.logprobs)
            choices.append(Choice(index=index, **part, logprobs=logprobs, finish_reason=one.reason))
        return Response(**self._head, object=kind, choices=choices, usage=usage, **_field(c2c))

    def opening(self, index: int, c2c: dict[str, Any]) -> Response | None:
        """Return the chunk that begins an answer; completions have none unless there is something to say."""
        if self._chat:
            return self._chunk(index, ChatText(role="assistant", content=""), c2c=c2c)
        return self._chunk(index, "", [], c2c=c2c) if c2c else None

    def delta(self, index: int, delta: Delta) -> Response:
        """Return a chunk with more text."""
        return self._chunk(index, ChatText(content=delta.text) if self._chat else delta.text, delta.logprobs)

    def ending(self, index: int, answer: Answer) -> Response:
        """Return the chunk with the reason why an answer ends."""
        return self._chunk(index, ChatText() if self._chat else "", reason=answer.reason)

    def closing(self, usage: Usage | None, c2c: dict[str, Any]) -> Response:
        """Return the chunk without choices, for what is about all answers."""
        return Response(**self._head, object=self._chunk_kind, choices=[], **_field(c2c), **_field(usage, "usage"))

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(
        self,
        index: int,
        part: ChatText | str,
        logprobs: Sequence[TokenLogprob] | None = None,
        reason: FinishReason | None = None,
        c2c: dict[str, Any] | None = None,
    ) -> Response:
        fields: dict[str, Any] = {"delta" if self._chat else "text": part}
        given = None if logprobs is None else self._logprobs_of(logprobs)
        choice = Choice(index=index, **fields, logprobs=given, finish_reason=reason)
        usage: dict[str, Any] = {"usage": None} if self._usage else {}
        return Response(**self._head, object=self._chunk_kind, choices=[choice], **usage, **_field(c2c))

    def _logprobs_of(self, entries: Sequence[TokenLogprob]) -> ChatLogprobs | CompletionLogprobs | None:
        if not self._logprobs:
            return None
        if self._chat:
            content = [_logprob(one.token, one.logprob, one.top) for one in entries]
            return ChatLogprobs(content=content, refusal=None)
        return CompletionLogprobs(
            tokens=[one.token for one in entries],
            token_logprobs=[one.logprob for one in entries],
            top_logprobs=[dict(one.top) for one in entries],
            text_offset=[one.offset for one in entries],
        )


def c2c_field(system: str, finished: Sequence[Finished], report: bool) -> dict[str, Any]:
    """Return the field ``c2c``, of the one prompt or of each.

    It is there where ``report`` requests it, and where a sharer was lost: no answer is silently not fused.
    """
    if not report and not any(one.fallback for one in finished):
        return {}
    facts: list[dict[str, Any]] = [{"system": system, "fallback": one.fallback} for one in finished]
    if report:
        for fact, one in zip(facts, finished, strict=True):
            fact |= {"report": one.report, "message": one.message, "batch": one.rows}
    return facts[0] if len(facts) == 1 else {"prompts": facts}


def _field(value: Any, name: str = "c2c") -> dict[str, Any]:
    """Return a field that is left out where it is empty."""
    return {name: value} if value else {}


def _logprob(token: str, logprob: float, top: Sequence[tuple[str, float]] | None = None) -> Logprob:
    spelled = None if "\ufffd" in token else list(token.encode())
    found = {} if top is None else {"top_logprobs": [_logprob(*other) for other in top]}
    return Logprob(token=token, logprob=logprob, bytes=spelled, **found)
