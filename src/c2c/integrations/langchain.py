"""LangChain: a pair of models as a chat model, and what a model has read as a value that agents pass on.

Needs the extra ``langchain``.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from c2c.connection import Connection
from c2c.errors import PromptError
from c2c.generation import GenerationResult
from c2c.handoff import Handoff
from c2c.integrations import IntegrationError, MissingExtraError
from c2c.integrations.tool_calls import CLOSE, OPEN, call_prefix, read_calls
from c2c.messages import Conversation, conversations
from c2c.prompting import RenderOptions, render
from c2c.serving.outputs import StopMatcher
from c2c.systems import System
from c2c.systems.fused import CacheToCache
from c2c.utils import install_command

try:
    from langchain_core.language_models import BaseChatModel, LanguageModelInput
    from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, convert_to_openai_messages
    from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from langchain_core.prompt_values import PromptValue
    from langchain_core.runnables import Runnable, RunnableLambda
    from langchain_core.tools import BaseTool
    from langchain_core.utils.function_calling import convert_to_openai_tool
except ImportError as error:
    raise MissingExtraError(
        f"LangChain is not installed ({error}). Install it: {install_command('langchain')}."
    ) from error

from pydantic import ConfigDict, Field

Tool = dict[str, Any] | type | Callable[..., Any] | BaseTool
_RUNNING = threading.RLock()  # threads of one process take turns: together they would only take more memory


class ChatC2C(BaseChatModel):
    """A chat model of LangChain that answers with a system, such as :func:`c2c.connect` returns.

    Keywords of a call (``invoke``, ``stream``, ``batch`` and their async forms) or of ``bind``: ``context``, which is
    what only the sharer has read (a :class:`~c2c.handoff.Handoff` from :meth:`read`, a text or messages; a list of
    several of these; for several sharers a tuple), ``max_tokens``, ``temperature``, ``top_p``, and whatever the
    system's ``generate`` takes.

    Attributes:
        system: what answers.
        max_tokens: new tokens at most; None for the default of ``generate``.
        temperature: 0 is greedy; None for the model's own settings.
        top_p: sample from the fewest tokens that have this probability together.
        stop: texts before which every answer ends.
        options: how prompts are rendered.
        generate_kwargs: further keywords for every ``generate``.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    system: System = Field(exclude=True, repr=False)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: list[str] | None = None
    options: RenderOptions = RenderOptions()
    generate_kwargs: dict[str, Any] = Field(default_factory=dict)
    disable_streaming: Any = "tool_calling"  # calls are read from the whole answer

    # -- what was read, as a value ------------------------------------------------------------------------------------

    def read(self, document: Any, **kwargs: Any) -> Handoff | Conversation:
        """Let the sharer read a document, and return its cache for the ``context`` of any number of calls.

        Args:
            document: a text, a prompt value, or messages of LangChain or of the OpenAI API.
            **kwargs: whatever ``sharer.read`` takes. Where both models are the same, ``before`` is the system message
                of the chats that the handoff is for, by default none.

        Returns:
            A handoff; where these models exchange text, the document's messages, which are read anew for each question.

        Raises:
            PromptError: it can't be read.
        """
        conversation, system = to_messages(document), self.system
        if isinstance(system, Connection):
            system = system.system("private")
        if not isinstance(system, CacheToCache):
            return conversation
        index = system.model.private[0] if system.model.private else 0
        sharer, fuser = system.model.sharers[index], system.model.fusers[index]
        if fuser.keeps_tokens:
            kwargs = {"before": ""} | kwargs
        with _RUNNING:
            return sharer.for_fuser(fuser).read(conversation, **{"options": replace(self.options, tools=()), **kwargs})

    def reader(self, **kwargs: Any) -> Runnable[Any, Handoff | Conversation]:
        """Return :meth:`read` as a runnable, for chains and graphs; arguments go to every call."""
        return RunnableLambda(lambda document: self.read(document, **kwargs), name="read")

    # -- tools --------------------------------------------------------------------------------------------------------

    def bind_tools(
        self, tools: Sequence[Tool], *, tool_choice: str | bool | dict[str, Any] | None = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Show tools to the model, and read its calls of them from its answers.

        Args:
            tools: functions, pydantic classes, tools of LangChain, or schemas.
            tool_choice: None or ``auto``, ``none``, ``any`` (or ``required``, True), or the name of a tool. A call is
                forced by the beginning of the answer, for templates that have ``<tool_call>``.
            **kwargs: further keywords of every call.

        Raises:
            PromptError: the chat template of the model has no tools.
            IntegrationError: an unknown choice, or one that can't be forced.
        """
        shown = [convert_to_openai_tool(tool) for tool in tools]
        if isinstance(tool_choice, dict):
            tool_choice = tool_choice.get("function", {}).get("name")
        if tool_choice in (None, False, "auto"):
            tool_choice = None
        elif tool_choice == "none":
            return self.bind(**kwargs)
        render(
            self.system.tokenizer, [{"role": "user", "content": "?"}], replace(self.options, tools=tuple(shown))
        )  # refuses them where the template has none
        if tool_choice is not None:
            kwargs["tool_choice"] = self._forced(shown, tool_choice)
        return self.bind(tools=shown, **kwargs)

    def _forced(self, tools: list[dict[str, Any]], choice: Any) -> str:
        """Return which tool must be called: its name, or ``any``."""
        names = [tool["function"]["name"] for tool in tools]
        if choice in ("any", "required", True):
            choice = names[0] if len(names) == 1 else "any"
        elif choice not in names:
            raise IntegrationError(
                f"tool_choice is {choice!r}; expected auto, any, none, or one of {', '.join(names)}."
            )
        if OPEN not in str(self.system.tokenizer.chat_template):
            raise IntegrationError(
                f"tool_choice={choice!r}: no call can be forced, since the chat template of "
                f"{self.model_name} does not write calls as {OPEN}. Leave tool_choice out."
            )
        return str(choice)

    # -- answering ----------------------------------------------------------------------------------------------------

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        call = _Call(self, messages, stop, kwargs)
        with _RUNNING:
            results = self.system.generate(call.conversation, **call.arguments)
        results = results if isinstance(results, list) else [results]
        generations = [ChatGeneration(message=call.message(result)) for result in results]
        return ChatResult(generations=generations, llm_output={"model_name": self.model_name})

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        call = _Call(self, messages, stop, kwargs)
        matcher = StopMatcher(call.stop)
        with self.system.stream(call.conversation, **call.arguments) as stream:
            for piece in stream:
                if not matcher.found and (certain := matcher.feed(piece)):
                    yield ChatGenerationChunk(message=AIMessageChunk(content=certain))
        rest = "" if matcher.found else matcher.pending
        if stream.result is None:
            return
        last = call.message(stream.result)
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content=rest,
                usage_metadata=last.usage_metadata,
                response_metadata=last.response_metadata,
                chunk_position="last",
            )
        )

    # -- what LangChain records ---------------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        """The models' names: of the receiver, and of the sharers."""
        model = self.system.model
        return "_from_".join([model.receiver.name, *(sharer.name for sharer in model.sharers)])

    @property
    def _llm_type(self) -> str:
        return "c2c"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("max_tokens", "temperature", "top_p", "stop", "options", "generate_kwargs")
        return {"model_name": self.model_name, "system": self.system.name} | {n: getattr(self, n) for n in names}

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        """Return what tracers see: of context a hash, since a cache is as private as its text."""
        return super()._get_invocation_params(stop=stop, **_hashed(kwargs))

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Return the key of a cache of answers: the models' weights, and all context, which ``repr`` abbreviates."""
        model = self.system.model
        weights = [one.identity.weights_key or one.name for one in (model.receiver, *model.sharers)]
        fusers = [(fuser.family, fuser.config.training) for fuser in getattr(model, "fusers", ())]
        return super()._get_llm_string(stop=stop, **_hashed(kwargs), weights=weights, fusers=fusers)


class _Call:
    """Hold one call: the conversation, the arguments of ``generate``, and how its answers are read."""

    def __init__(
        self, chat: ChatC2C, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]
    ) -> None:
        arguments: dict[str, Any] = {
            "max_tokens": chat.max_tokens,
            "temperature": chat.temperature,
            "top_p": chat.top_p,
        }
        arguments |= chat.generate_kwargs | kwargs
        self.language_model = chat.system.language_model
        self.model_name = chat.model_name
        self.conversation = to_messages(messages)
        self.stop = [*(chat.stop or []), *(stop or [])]
        self.tools: list[dict[str, Any]] = arguments.pop("tools", [])
        self.prefix = call_prefix(arguments.pop("tool_choice", None))
        self.arguments = _generate_arguments(arguments)
        options = self.arguments.pop("options", chat.options)
        if self.prefix:
            options = replace(options, answer_prefix=self.prefix)
            self.arguments.setdefault("stop_strings", [CLOSE])
        self.arguments["options"] = replace(options, tools=tuple(self.tools) or options.tools)
        if self.stop:
            self.arguments["stop_strings"] = [*self.arguments.get("stop_strings", []), *self.stop]

    def message(self, result: GenerationResult) -> AIMessage:
        """Return an answer as a message."""
        whole = str(self.language_model.tokenizer.decode(result.ids))  # special tokens too, which may be stops
        ends = [at for stop in self.stop if (at := result.text.find(stop)) >= 0]
        text = result.text[: min(ends, default=None)]
        ended = int(result.ids[-1]) in self.language_model.ends or any(
            stop in whole for stop in self.arguments.get("stop_strings", ())
        )
        calls: dict[str, Any] = {}
        if self.tools:
            text, calls = read_calls(self.prefix + text, {tool["function"]["name"] for tool in self.tools})
        metadata = {
            "model_name": self.model_name,
            "finish_reason": "tool_calls" if calls.get("tool_calls") else "stop" if ended else "length",
        }
        return AIMessage(
            content=text,
            **calls,
            usage_metadata=_usage(result),
            response_metadata=metadata | _report(result),
        )


def to_messages(given: Any) -> Conversation:
    """Convert a text, a prompt value, or messages of LangChain or of the OpenAI API to one conversation.

    Raises:
        PromptError: empty, or with content that is no text.
    """
    if isinstance(given, PromptValue):
        given = given.to_messages()
    if isinstance(given, BaseMessage):
        given = [given]
    if not isinstance(given, str):
        try:
            given = convert_to_openai_messages(given, text_format="block")
        except (ValueError, TypeError, NotImplementedError) as error:
            raise PromptError(f"LangChain can't read these messages: {error}") from error
    (conversation,), _ = conversations(given)
    return conversation


def _generate_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Translate LangChain's names of settings to those of ``generate``."""
    made = {name: value for name, value in given.items() if value is not None}
    if "max_tokens" in made:
        made["max_new_tokens"] = made.pop("max_tokens")
    if "temperature" in made:
        made["do_sample"] = made["temperature"] > 0
        if not made["do_sample"]:
            del made["temperature"]
    context = made.pop("context", None)
    if context is not None:
        made["sharer_messages"] = _sharer_messages(context)
    return made


def _sharer_messages(context: Any) -> Any:
    """Return context as ``sharer_messages`` of one conversation."""
    if isinstance(context, tuple):
        return tuple(_sharer_messages(part) for part in context)
    if isinstance(context, Handoff | str):
        return context
    if isinstance(context, PromptValue | BaseMessage):
        return to_messages(context)
    if not isinstance(context, list) or not context:
        raise PromptError(f"context is {context!r:.200}; expected a handoff, a text, messages, or a list of these.")
    if all(isinstance(item, BaseMessage | dict) for item in context):
        return to_messages(context)
    parts = [_sharer_messages(item) for item in context]
    return parts[0] if len(parts) == 1 else parts


def _hashed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of a call with a hash in place of context."""
    if kwargs.get("context") is None:
        return kwargs
    return kwargs | {"context": hashlib.sha256(repr(_described(kwargs["context"])).encode()).hexdigest()}


def _described(context: Any) -> Any:
    if isinstance(context, list | tuple):
        return [type(context).__name__, *map(_described, context)]
    if isinstance(context, Handoff):
        return [context.id, context.precision, context.kept.tolist()]
    return repr(context)


def _usage(result: GenerationResult) -> UsageMetadata:
    handed = result.report.memory_slots if result.report else 0
    read = result.prompt_tokens + handed
    usage = UsageMetadata(input_tokens=read, output_tokens=result.new_tokens, total_tokens=read + result.new_tokens)
    if handed:  # entries of context: they were computed before
        usage["input_token_details"] = InputTokenDetails(cache_read=handed)
    return usage


def _report(result: GenerationResult) -> dict[str, Any]:
    data = result.to_dict()
    for name in ("text", "new_tokens", "prompt_tokens"):
        del data[name]
    return data
