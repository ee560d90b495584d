"""Text-to-text with private context: the sharer sums up what it has read, and the receiver reads the summary."""

from __future__ import annotations

from typing import Any

from c2c.baselines.text_to_text import TextToTextResult
from c2c.language_model import LanguageModel
from c2c.messages import Conversation


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
