"""What clients send: the fields of the OpenAI API that are supported, and nothing that would be ignored."""

from __future__ import annotations

import json
from abc import abstractmethod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from c2c.messages import Conversation
from c2c.serving.errors import ApiError, invalid
from c2c.serving.sampling import Sampling

_MOST_STOPS = 16
_INERT = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}  # change no answer
# Fields of the OpenAI API that are not supported, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_OF_ANSWERS: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "name": (),
    "function_call": (),
    "refusal": (),
    "tool_calls": ([],),
}


def _text(value: Any) -> Any:
    """Content as text: a string, or a list of text parts."""
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError('only text can be read: expected parts {"type": "text", "text": ...}')
        value = "".join(part["text"] for part in value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair is no text") from None
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_text)]
Texts = Annotated[list[Annotated[Text, Field(min_length=1)]], BeforeValidator(_listed)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class StreamOptions(_Strict):
    """How to stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Options(_Strict):
    """The field ``c2c``: what the OpenAI API does not have.

    Attributes:
        sharer_messages: what the sharer alone reads; a list with one entry for each sharer where there are several.
        handoff: id of what a sharer has read already, in place of it.
        report: say what was fused.
        answer_prefix: what the answer goes on from.
    """

    sharer_messages: Any = None
    handoff: str | list[str] | None = None
    report: bool = False
    answer_prefix: Text = ""


class Request(_Strict):
    """What chat completions and completions have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1)
    stop: Texts = Field(default_factory=list, max_length=_MOST_STOPS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    stream: bool = False
    stream_options: StreamOptions | None = None
    c2c: Options = Field(default_factory=Options)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> Sampling:
        """How to decode."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(self.stop),
            logprobs=self.wanted_logprobs,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )

    @property
    @abstractmethod
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported at each position; None for no log-probabilities at all."""


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def wanted_logprobs(self) -> int | None:
        """See :class:`Request`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def conversation(self) -> Conversation:
        """The messages; a developer's are the system's."""
        return _conversation(self.messages)


class CompletionRequest(Request):
    """``POST /v1/completions``."""

    prompt: Texts = Field(min_length=1)
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def wanted_logprobs(self) -> int | None:
        """See :class:`Request`."""
        return self.logprobs


class HandoffRequest(_Strict):
    """``POST /v1/c2c/handoffs``.

    Attributes:
        messages: what the sharer reads: a text, or messages.
        sharer: which one, where several hand over private context.
        draft_tokens: let it write so many tokens of an answer, which are handed over as well.
        precision: how the entries are kept.
        ttl_seconds: how long; at most as long as the server keeps any.
    """

    messages: Any
    sharer: int | None = Field(None, ge=0)
    draft_tokens: int = Field(0, ge=0, le=1024)
    precision: Literal["float32", "bfloat16", "float16", "int8", "float8"] | None = None
    ttl_seconds: float | None = Field(None, gt=0)


_Model = TypeVar("_Model", bound=BaseModel)


def parse(model: type[_Model], body: bytes) -> _Model:
    """A request from its bytes.

    Raises:
        ApiError: no JSON object, or fields that are missing, wrong, unknown or not supported.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is no JSON: {error}. Send one JSON object.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise invalid(f"the body is a JSON {type(data).__name__}; expected an object.", code="invalid_json")
    data = {key: value for key, value in data.items() if value is not None}
    if issubclass(model, Request):
        data = _supported(data)
    request = _validated(model, data)
    if isinstance(request, Request):
        _check_together(request)
    return request


def parse_messages(value: Any, param: str) -> Conversation:
    """A text or a list of messages as a conversation.

    Raises:
        ApiError: neither.
    """
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not messages:
        raise invalid(f"{param} is {type(value).__name__}; expected a text or a list of messages.", param)
    checked = [
        _validated(Message, _plain(message) if isinstance(message, dict) else message, f"{param}.{index}")
        for index, message in enumerate(messages)
    ]
    if not any(message.content for message in checked):
        raise invalid(f"no message of {param} has any text.", param)
    return _conversation(checked)


def parse_private(value: Any) -> tuple[Conversation, ...]:
    """``sharer_messages`` as one conversation for each sharer.

    Raises:
        ApiError: no texts or messages.
    """
    param = "c2c.sharer_messages"
    if isinstance(value, list) and value and not all(isinstance(item, dict) for item in value):
        return tuple(parse_messages(item, f"{param}.{index}") for index, item in enumerate(value))
    return (parse_messages(value, param),)


def _supported(data: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that ask for nothing."""
    for name, neutral in _NEUTRAL.items():
        if name in data and not any(data[name] == value and type(data[name]) is type(value) for value in neutral):
            raise invalid(f"{name} is not supported: leave it out.", name, "unsupported_parameter")
    kept = {name: value for name, value in data.items() if name not in _NEUTRAL and name not in _INERT}
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [_plain(m) if isinstance(m, dict) else m for m in kept["messages"]]
    return kept


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what the API puts into its answers and that says nothing here."""
    return {
        key: value
        for key, value in message.items()
        if not (key in _OF_ANSWERS and (value is None or value in _OF_ANSWERS[key]))
    }


def _validated(model: type[_Model], data: Any, prefix: str = "") -> _Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _refused(error, prefix) from None


def _refused(error: ValidationError, prefix: str) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(str(part) for part in ([prefix] if prefix else []) + list(first["loc"]))
    if first["type"] == "extra_forbidden":
        return invalid(f"unknown parameter {param}: leave it out.", param, "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"{param} is missing.", param, "missing_parameter")
    return invalid(f"{param or 'the body'}: {first['msg'].removeprefix('Value error, ')}.", param or None)


def _check_together(request: Request) -> None:
    """What no field says by itself."""
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options are for streams: set stream to true, or leave them out.", "stream_options")
    if request.c2c.sharer_messages is not None and request.c2c.handoff is not None:
        raise invalid("c2c has both sharer_messages and handoff: give one of them.", "c2c.handoff")
    if isinstance(request, ChatRequest):
        if request.top_logprobs is not None and not request.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
        both = {request.max_tokens, request.max_completion_tokens} - {None}
        if len(both) > 1:
            raise invalid("max_tokens and max_completion_tokens differ: give one of them.", "max_tokens")
        request.max_tokens = next(iter(both), None)


def _conversation(messages: list[Message]) -> Conversation:
    return [{"role": "system" if m.role == "developer" else m.role, "content": m.content} for m in messages]
