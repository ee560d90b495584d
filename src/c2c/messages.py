"""Messages: what users pass, normalised to conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from c2c.errors import PromptError

Message = dict[str, str]
Conversation = list[Message]

_EXPECTED = (
    "Expected a text, a list of messages {'role': ..., 'content': ...}, or a list of several texts or conversations."
)


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
    if not isinstance(messages, Sequence) or not messages:
        raise PromptError(f"empty or unreadable prompt: got {messages!r}. {_EXPECTED}")
    if all(isinstance(item, Mapping) for item in messages):
        return [_conversation(messages)], True
    return [_conversation(item) for item in messages], False


def _conversation(item: Any) -> Conversation:
    if isinstance(item, str):
        item = [{"role": "user", "content": item}]
    if not isinstance(item, Sequence) or not item:
        raise PromptError(f"empty or unreadable conversation: got {item!r}. {_EXPECTED}")
    result = [_message(message) for message in item]
    if not any(message["content"] for message in result):
        raise PromptError("empty prompt: no message has any text. Pass at least one non-empty message.")
    return result


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(f"got {message!r} as a message. {_EXPECTED}")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_text_part(part) for part in content)
    if not isinstance(content, str):
        raise PromptError(f"message content must be text, got {type(content).__name__} in {message!r}.")
    return {"role": message["role"], "content": content}


def _text_part(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        return str(part.get("text", ""))
    raise PromptError(f"only text parts can be read, got {part!r}. Images and audio are not supported.")
