"""Prompts that are no conversation: text that a model goes on from, without any template."""

from __future__ import annotations

from typing import Any

from c2c.messages import Conversation


class RawText:
    """A tokenizer whose chat template shows a message as it stands, with the special tokens that texts begin with.

    An aligner takes it for any other, so that raw text is aligned as a message is.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.chat_template = "the message as it stands"

    def apply_chat_template(self, conversation: Conversation, **kwargs: Any) -> str:
        """The texts of the messages, and nothing else."""
        return "".join(message["content"] for message in conversation)

    def __call__(self, text: str, **kwargs: Any) -> Any:
        """Tokens of a text."""
        return self._tokenizer(text, **kwargs | {"add_special_tokens": not self._opens(text)})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def _opens(self, text: str) -> bool:
        """Whether a text brings the token that texts begin with."""
        opening = self._tokenizer.bos_token
        return bool(opening) and text.startswith(opening)


def as_message(text: str) -> Conversation:
    """A text as the one message that :class:`RawText` shows."""
    return [{"role": "user", "content": text}]
