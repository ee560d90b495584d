"""Text-to-text: the sharer writes, the receiver reads it. The usual way for two models to work together."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

from c2c.errors import PromptError
from c2c.generation import GenerationResult
from c2c.language_model import LanguageModel
from c2c.messages import Conversation, conversations

Variant = Literal["published", "fair"]

# The published baseline forbids the answer, so that the receiver can only profit from background knowledge; the fair
# one lets the sharer say what it thinks.
REQUESTS: dict[Variant, str] = {
    "published": (
        "In one clear sentence, describe the most essential background knowledge needed to answer the question: "
        "{question} Do NOT directly solve or give answer to the question."
    ),
    "fair": "Answer the question briefly, and say why in one sentence: {question}",
}


@dataclass(frozen=True)
class TextToTextResult:
    """The receiver's answer and what it had been told.

    Attributes:
        answer: the receiver's answer; its times include the sharer's.
        message: the sharer's text.
    """

    answer: GenerationResult
    message: GenerationResult

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return self.answer.to_dict() | {
            "message": self.message.text,
            "message_tokens": self.message.new_tokens,
            "message_seconds": round(self.message.seconds_total, 4),
        }


def text_to_text(
    receiver: LanguageModel,
    sharer: LanguageModel,
    messages: Any,
    *,
    variant: Variant = "fair",
    message_tokens: int = 128,
    **generate_kwargs: Any,
) -> TextToTextResult:
    """Let the sharer write about the last user message, and the receiver answer after reading it.

    The receiver sees three turns, as published: the request, the sharer's text, and the prompt.

    Args:
        receiver: answers.
        sharer: writes, greedily.
        messages: one text or conversation that ends with a user message.
        variant: ``fair`` (the sharer may give the answer) or ``published`` (it must not).
        message_tokens: at most this many tokens from the sharer (256 in the paper's evaluation).
        **generate_kwargs: for the receiver's :meth:`~c2c.language_model.LanguageModel.answer`.

    Raises:
        PromptError: several conversations, or the last message is not the user's.
    """
    batch, _ = conversations(messages)
    if len(batch) != 1 or batch[0][-1]["role"] != "user":
        raise PromptError("text-to-text needs one conversation that ends with a user message.")
    conversation = batch[0]
    began = time.perf_counter()
    message = sharer.answer(request(conversation, variant), max_new_tokens=message_tokens, do_sample=False)
    told = hand_over(conversation, variant, message.text)
    before = time.perf_counter() - began
    answer = receiver.answer(told, **generate_kwargs)
    answer.seconds_to_first_token += before
    answer.seconds_total += before
    return TextToTextResult(answer, message)


def request(conversation: Conversation, variant: Variant) -> Conversation:
    """What the sharer is asked, in place of the last user message."""
    return [*conversation[:-1], _user(REQUESTS[variant].format(question=conversation[-1]["content"]))]


def hand_over(conversation: Conversation, variant: Variant, message: str) -> Conversation:
    """What the receiver reads: the request, the sharer's text as its own turn, and the prompt."""
    return [*request(conversation, variant), {"role": "assistant", "content": message}, conversation[-1]]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def summary_request(passage: str, tokens: int) -> Conversation:
    """What the sharer is asked; in words fewer than ``tokens``, so that the summary comes to its end."""
    request = f"Summarise the following text in at most {tokens * 2 // 3} words, with all names and numbers."
    return [{"role": "user", "content": f"{request}\n\n{passage}"}]


def with_passage(messages: Conversation, passage: str) -> Conversation:
    """A conversation whose last message asks about a passage, with the passage before it."""
    content = f"Answer the question briefly, from the passage.\n\nPassage: {passage}\n\n{messages[-1]['content']}"
    return [*messages[:-1], {"role": "user", "content": content}]


def passage_to_text(
    receiver: LanguageModel,
    sharer: LanguageModel,
    messages: Conversation,
    request: Conversation,
    *,
    message_tokens: int = 128,
    **generate_kwargs: Any,
) -> TextToTextResult:
    """Let the sharer write about a passage, and the receiver answer from what it wrote.

    Args:
        receiver: answers.
        sharer: writes, greedily.
        messages: what the receiver is asked.
        request: what the sharer is asked; it holds the passage.
        message_tokens: at most this many tokens from the sharer.
        **generate_kwargs: for the receiver's :meth:`~c2c.language_model.LanguageModel.answer`.

    Returns:
        Both texts; the answer's times include the sharer's.
    """
    message = sharer.answer(request, max_new_tokens=message_tokens, do_sample=False)
    answer = receiver.answer(with_passage(messages, message.text), **generate_kwargs)
    answer.seconds_to_first_token += message.seconds_total
    answer.seconds_total += message.seconds_total
    return TextToTextResult(answer, message)
