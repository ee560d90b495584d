"""Request bodies: the fields of the OpenAI API that are supported, and nothing that would be ignored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from c2c.messages import Conversation
from c2c.serving.engine import SamplingParams
from c2c.serving.errors import invalid

MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # each is looked for after every token
_ANY = object()  # stands for all values
_WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
_UNSUPPORTED = ("audio", "moderation", "prediction", "reasoning_effort", "verbosity", "web_search_options")


def _text(value: Any) -> Any:
    """Join a list of text parts; refuse what is no text."""
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


def _messages(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _context(value: Any) -> Any:
    """Return one conversation for each sharer."""
    if isinstance(value, list) and value and not all(isinstance(item, dict) for item in value):
        return [_messages(item) for item in value]
    return [_messages(value)]


def _with_text(messages: list[Message]) -> list[Message]:
    if not any(message.content for message in messages):
        raise ValueError("no message has any text")
    return messages


class Body(BaseModel):
    """Base of all bodies: strict types, no unknown fields, null as if left out.

    Attributes:
        neutral: fields of the OpenAI API that are not supported, with the values that change no answer and are dropped.
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
                raise invalid(f"{name} is not supported: leave it out.", name, "unsupported_parameter")
        return kept


class Message(Body):
    """One message of a conversation; what the API adds to its own answers may be sent back."""

    neutral = {"annotations": ([],), "audio": (), "function_call": (), "refusal": (), "tool_calls": ([],)}

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]


Text = Annotated[str, BeforeValidator(_text)]
_one_or_many = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Texts = Annotated[list[Annotated[Text, Field(min_length=1)]], _one_or_many]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[list[Stop], _one_or_many, Field(max_length=MAX_STOPS)]
SomeMessages = Annotated[list[Message], Field(min_length=1), AfterValidator(_with_text)]
Messages = Annotated[SomeMessages, BeforeValidator(_messages)]  # or a text


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class C2COptions(Body):
    """The field ``c2c``: what the OpenAI API does not have."""

    # what the sharers alone read, one conversation for each of them; a text or the messages of one
    sharer_messages: Annotated[list[Messages], BeforeValidator(_context)] | None = None
    handoff: Texts | None = None  # ids of what the sharers have read already, in place of it
    report: bool = False  # whether the answer has the fusion report
    answer_prefix: Text = ""  # that the answer continues

    @model_validator(mode="after")
    def _check(self) -> C2COptions:
        if self.sharer_messages is not None and self.handoff is not None:
            raise invalid("c2c has both sharer_messages and handoff: give one of them.", "c2c.handoff")
        return self


class GenerateBody(Body, ABC):
    """Fields that chat completions and completions have in common."""

    neutral = {
        **dict.fromkeys(_WITHOUT_EFFECT, (_ANY,)),
        **dict.fromkeys(_UNSUPPORTED, ()),
        "best_of": (1,),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logit_bias": ({},),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "suffix": ("",),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
    }

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1)
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

    def sampling(self) -> SamplingParams:
        """Return how to decode."""
        same = {one.name: getattr(self, one.name) for one in fields(SamplingParams) if one.name != "logprobs"}
        return SamplingParams(**same, logprobs=self.top_count)


class ChatCompletionBody(GenerateBody):
    """Body of ``POST /v1/chat/completions``."""

    messages: SomeMessages
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatCompletionBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise invalid("max_tokens and max_completion_tokens differ: give one of them.", "max_tokens")
        self.max_tokens = next(iter(limits), None)
        return self

    @property
    def conversations(self) -> list[Conversation]:
        """The only conversation."""
        return [conversation(self.messages)]

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

    @property
    def top_count(self) -> int | None:
        """See :class:`GenerateBody`."""
        return self.logprobs


def conversation(messages: list[Message]) -> Conversation:
    """Return messages as the library takes them; a developer's are the system's."""
    return [{"role": "system" if m.role == "developer" else m.role, "content": m.content} for m in messages]
