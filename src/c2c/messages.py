"""Messages: what users pass, normalised to conversations.

Layouts of the OpenAI API are read: text parts, tool calls and their answers, reasoning, refusals, the developer role.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from c2c.errors import PromptError

# {"role", "content"}, both texts; perhaps "tool_calls", "tool_call_id", "name" and "reasoning_content".
Message = dict[str, Any]
Conversation = list[Message]

_EXPECTED = (
    "Expected a text, a list of messages {'role': ..., 'content': ...}, or a list of several texts or conversations."
)
_ROLES = {"developer": "system", "function": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def conversations(messages: Any) -> tuple[list[Conversation], bool]:
    """Normalise ``messages`` to a batch of conversations.

    Args:
        messages: a text, one conversation, or a sequence of texts and conversations.

    Returns:
        The conversations, and whether ``messages`` was a single one.

    Raises:
        PromptError: empty, or not one of these forms.
    """
    if isinstance(messages, str):
        return [_conversation(messages)], True
    if isinstance(messages, bytes) or not isinstance(messages, Sequence) or not messages:
        raise PromptError(f"empty or unreadable prompt: got {messages!r}. {_EXPECTED}")
    if all(isinstance(item, Mapping) for item in messages):
        return [_conversation(messages)], True
    return [_conversation(item) for item in messages], False


def _conversation(item: Any) -> Conversation:
    if isinstance(item, str):
        item = [{"role": "user", "content": item}]
    if isinstance(item, bytes) or not isinstance(item, Sequence) or not item:
        raise PromptError(f"empty or unreadable conversation: got {item!r}. {_EXPECTED}")
    result = [message(given) for given in item]
    if not any(found["content"] or found.get("tool_calls") for found in result):
        raise PromptError("empty prompt: no message has any text. Pass at least one non-empty message.")
    return result


def message(given: Any) -> Message:
    """Normalise one message.

    Raises:
        PromptError: no message, or with content that is no text.
    """
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str) or not given["role"].strip():
        raise PromptError(f"got {given!r:.200} as a message. {_EXPECTED}")
    calls = given.get("tool_calls") or []
    if given.get("function_call"):
        raise PromptError("'function_call' is the old form of a tool call: pass tool_calls=[{'function': {...}}].")
    content = given.get("content")
    if content is None and given.get("refusal"):
        content = given["refusal"]
    if content is None and calls:
        content = ""
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "".join(_text_part(part) for part in content)
    if not isinstance(content, str):
        raise PromptError(f"message content must be text, got {type(content).__name__} in {given!r:.200}.")
    made: Message = {"role": _ROLES.get(given["role"], given["role"]), "content": text(content)}
    if calls:
        made["tool_calls"] = _tool_calls(calls)
    for name in ("tool_call_id", "name"):
        if given.get(name) is not None:
            made[name] = text(given[name])
    if reasoning := given.get("reasoning_content") or given.get("reasoning"):
        made["reasoning_content"] = text(reasoning)
    return made


def text(given: Any) -> str:
    """Return a text that can be encoded.

    Raises:
        PromptError: no text, or with half a surrogate pair, as a wrong decoding leaves it.
    """
    if not isinstance(given, str):
        raise PromptError(f"expected a text, got {type(given).__name__}: {given!r:.80}.")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"character {error.start} of the text ({given[error.start]!r}) is half a surrogate pair and no character: "
            "the text was decoded wrongly. Decode its bytes as UTF-8, with errors='replace' if need be."
        ) from None
    return given


def _text_part(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS:
        found = part.get("refusal" if part["type"] == "refusal" else "text")
        if isinstance(found, str):
            return found
        raise PromptError(f"a part of type {part['type']!r} must have a text, got {part!r:.200}.")
    raise PromptError(
        f"only parts of text {{'type': 'text', 'text': ...}} can be read, got {part!r:.200}. Images and audio are not "
        "supported."
    )


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """Normalise tool calls; arguments become an object, which is what chat templates expect."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise PromptError(f"'tool_calls' is {calls!r:.200}; expected a list.")
    made = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PromptError(
                f"a tool call is {call!r:.200}; expected {{'function': {{'name': ..., 'arguments': ...}}}}."
            )
        name, arguments = text(function["name"]), function.get("arguments", {})
        try:
            if isinstance(arguments, str):
                arguments = json.loads(arguments) if arguments.strip() else {}
            text(json.dumps(arguments, ensure_ascii=False))
        except (ValueError, TypeError, RecursionError) as error:
            raise PromptError(f"the arguments of tool call {name!r:.80} are no JSON object: {error!s:.80}.") from None
        if not isinstance(arguments, Mapping):
            raise PromptError(f"the arguments of tool call {name!r:.80} are a {type(arguments).__name__}, no object.")
        known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made.append(known | {"type": "function", "function": {"name": name, "arguments": dict(arguments)}})
    return made
