"""Request bodies: the fields of the OpenAI API that are supported, and nothing that would be ignored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)
from pydantic_core import PydanticCustomError

from c2c.errors import PromptError
from c2c.messages import Conversation, message
from c2c.prompting import RenderOptions
from c2c.serving.engine import SamplingParams
from c2c.serving.errors import invalid

MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # each is looked for after every token
_MOST = 2**31 - 1  # of counts
_ANY = object()  # stands for all values
_BOOL, _NO_NUMBER = (True, False), (0, 0.0)


def _messages(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _context(value: Any) -> Any:
    """Return one conversation for each sharer."""
    if isinstance(value, list) and value and not all(isinstance(item, dict) for item in value):
        return [_messages(item) for item in value]
    return [_messages(value)]


def _before(value: Any) -> Any:
    """Return messages; a text is a system message, and an empty one is none."""
    return ([{"role": "system", "content": value}] if value else []) if isinstance(value, str) else value


def _ids(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _with_text(messages: list[Message]) -> list[Message]:
    if not any(one.normalised["content"] or "tool_calls" in one.normalised for one in messages):
        raise ValueError("no message has any text")
    return messages


def _one_or_many(value: Any) -> Any:
    """Return a list of texts; what other servers take as token ids is named."""
    values = [value] if isinstance(value, str) else value
    if isinstance(values, list) and values and isinstance(values[0], int | list):
        raise ValueError("token ids are not read, since each model has its own: send texts")
    return values


class Body(BaseModel):
    """Base of all bodies: strict types, no unknown fields, null as if left out.

    Attributes:
        neutral: fields of the OpenAI API, and of servers like it, that are not supported, with the values that change
            no answer and are dropped.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None:
                continue
            if name not in cls.neutral:
                kept[name] = value
            elif not any(
                known is _ANY or (known == value and type(known) is type(value)) for known in cls.neutral[name]
            ):
                raise PydanticCustomError(
                    "unsupported_parameter", "{name} is not supported: leave it out", {"name": name}
                )
        return kept


class Message(Body):
    """One message of a conversation, in the layout of the OpenAI API; what servers add to their answers is dropped.

    Attributes:
        normalised: the message as the library takes it.
    """

    neutral = {
        "annotations": (_ANY,),  # where citations stand in the text
        "audio": (),
        "function_call": (),
        "id": (_ANY,),
        "provider_specific_fields": (_ANY,),  # of LiteLLM
    }
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None
    name: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    _normalised: dict[str, Any] = PrivateAttr()

    @model_validator(mode="after")
    def _normalise(self) -> Message:
        try:
            self._normalised = message({name: value for name, value in self if value is not None})
        except PromptError as error:
            raise ValueError(str(error).removesuffix(".")) from None
        return self

    @property
    def normalised(self) -> dict[str, Any]:
        """The message as :func:`c2c.messages.message` makes it."""
        return self._normalised


class Function(Body):
    """A function that the model may call; ``strict`` changes nothing, since no answer is parsed."""

    neutral = {"strict": _BOOL}
    name: str = Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,256}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """A tool: chat templates list it."""

    type: Literal["function"]
    function: Function


Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True), BeforeValidator(_one_or_many)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True), BeforeValidator(_one_or_many)]
SomeMessages = Annotated[list[Message], Field(min_length=1, fail_fast=True), AfterValidator(_with_text)]
Messages = Annotated[SomeMessages, BeforeValidator(_messages)]  # or a text
Before = Annotated[list[Message], Field(fail_fast=True), BeforeValidator(_before)]  # or a text
Id = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Id], Field(min_length=1, fail_fast=True), BeforeValidator(_ids)]


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class C2COptions(Body):
    """The field ``c2c``: what the OpenAI API does not have."""

    # what the sharers alone read, one conversation for each of them; a text or the messages of one
    sharer_messages: Annotated[list[Messages], BeforeValidator(_context)] | None = None
    # ids of what the sharers have read already, in place of it; of several documents of one sharer a list in the list
    handoff: Annotated[list[Ids], Field(min_length=1, fail_fast=True), BeforeValidator(_ids)] | None = None
    report: bool = False  # whether the answer has the fusion report
    answer_prefix: str = ""  # that the answer continues

    @model_validator(mode="after")
    def _check(self) -> C2COptions:
        if self.sharer_messages is not None and self.handoff is not None:
            raise invalid("c2c has both sharer_messages and handoff: give one of them.", "c2c.handoff")
        if len(set(self.handoffs)) < len(self.handoffs):
            raise invalid("c2c.handoff has an id twice: name each document once.", "c2c.handoff")
        return self

    @property
    def handoffs(self) -> list[str]:
        """All ids of handoffs, in their order."""
        return [one for ids in self.handoff or () for one in ids]


class GenerateBody(Body, ABC):
    """Fields that chat completions and completions have in common."""

    neutral = {
        # about the account, the cost or the speed
        "metadata": (_ANY,),
        "prediction": (_ANY,),
        "prompt_cache_key": (_ANY,),
        "prompt_cache_options": (_ANY,),
        "prompt_cache_retention": (_ANY,),
        "safety_identifier": (_ANY,),
        "user": (_ANY,),
        "service_tier": (_ANY,),
        "store": (False,),
        # what would change an answer, with the values that don't
        "audio": (),
        "best_of": (1,),
        "chat_template_kwargs": ({}, {"enable_thinking": False}),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logit_bias": ({},),
        "min_p": _NO_NUMBER,
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": _BOOL,
        "reasoning_effort": ("none",),
        "repetition_penalty": (1, 1.0),
        "response_format": ({"type": "text"},),
        "suffix": ("",),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_k": (-1, 0),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    model: str
    max_tokens: int | None = Field(None, ge=1, le=_MOST)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=_MOST)
    stop: Stops = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    stream: bool = False
    stream_options: StreamOptions | None = None
    c2c: C2COptions = Field(default_factory=C2COptions)

    @model_validator(mode="after")
    def _check_stream(self) -> GenerateBody:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options are for streams: set stream to true, or leave them out.", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    @abstractmethod
    def conversations(self) -> list[Conversation]:
        """One conversation per prompt; for raw text its only message."""

    @property
    @abstractmethod
    def top_count(self) -> int | None:
        """How many of the likeliest tokens are reported at each position; None for no log-probabilities at all."""

    @abstractmethod
    def render(self) -> RenderOptions:
        """Return how prompts are rendered."""

    def sampling(self) -> SamplingParams:
        """Return how to decode."""
        same = {one.name: getattr(self, one.name) for one in fields(SamplingParams) if one.name != "logprobs"}
        return SamplingParams(**same, logprobs=self.top_count)


class ChatCompletionBody(GenerateBody):
    """Body of ``POST /v1/chat/completions``."""

    neutral = {name: values for name, values in GenerateBody.neutral.items() if name not in ("tools", "tool_choice")}

    messages: SomeMessages
    max_completion_tokens: int | None = Field(None, ge=1, le=_MOST)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(fail_fast=True)] = Field(default_factory=list)
    tool_choice: Any = "auto"

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatCompletionBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
        if self.tool_choice not in ("none", "auto"):
            message = "tool_choice must be 'none' or 'auto': answers are plain text, so that no call can be forced."
            raise invalid(message, "tool_choice")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise invalid("max_tokens and max_completion_tokens differ: give one of them.", "max_tokens")
        self.max_tokens = next(iter(limits), None)
        return self

    @property
    def conversations(self) -> list[Conversation]:
        """The only conversation."""
        return [conversation(self.messages)]

    def render(self) -> RenderOptions:
        """See :class:`GenerateBody`; with ``tool_choice: "none"`` the models are not shown the tools."""
        tools = self.tools if self.tool_choice == "auto" else ()
        shown = tuple(tool.model_dump(exclude_none=True) for tool in tools)
        return RenderOptions(answer_prefix=self.c2c.answer_prefix, tools=shown)

    @property
    def top_count(self) -> int | None:
        """See :class:`GenerateBody`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerateBody):
    """Body of ``POST /v1/completions``."""

    prompt: Texts = Field(min_length=1)
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def conversations(self) -> list[Conversation]:
        """One per text."""
        return [[{"role": "user", "content": text}] for text in self.prompt]

    def render(self) -> RenderOptions:
        """See :class:`GenerateBody`."""
        return RenderOptions(answer_prefix=self.c2c.answer_prefix, chat_template=False)

    @property
    def top_count(self) -> int | None:
        """See :class:`GenerateBody`."""
        return self.logprobs


def conversation(messages: list[Message]) -> Conversation:
    """Return messages as the library takes them."""
    return [one.normalised for one in messages]
