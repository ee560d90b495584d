"""Text-to-text: the sharer writes, the receiver reads it. The usual way for two models to work together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from c2c.errors import PromptError
from c2c.generation import Cancellation, FirstTokenTimer, GenerationResult, PrefilledPrompt, unbatch
from c2c.language_model import LanguageModel
from c2c.messages import Conversation, conversations
from c2c.model import C2CModel
from c2c.prompting import RenderOptions
from c2c.systems.base import System, SystemOptions, context_texts, count_tokens, with_passage


class TextToText(System):
    """Let the sharer answer with a reason, and the receiver answer after reading that.

    The receiver reads three turns, as published: the request, the sharer's text, and the prompt. Where only the sharer
    has the context it summarises it without the question, and the receiver reads the summary in the place of the
    passage.
    """

    name: ClassVar[str] = "text"
    title: ClassVar[str] = "text-to-text"
    request: ClassVar[str] = "Answer the question briefly, and say why in one sentence: {question}"

    @classmethod
    def unavailable(cls, model: C2CModel, options: SystemOptions) -> str | None:
        """A sharer on another machine hands over its cache and does not generate."""
        return None if model.sharers[0].generates else "the sharer is on another machine and only shares its cache."

    def prefill(
        self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None
    ) -> PrefilledPrompt:
        """Let the sharer write and prefill the receiver on the result; see :meth:`System.prefill`.

        Raises:
            PromptError: a conversation that does not end with a user message.
        """
        return self._prefill(messages, sharer_messages, options, ())

    def generate(
        self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None, **kwargs: Any
    ) -> Any:
        """Answer; a closed stream ends the sharer's writing as well. See :meth:`System.generate`."""
        timer = FirstTokenTimer()
        stops = [stop for stop in kwargs.get("stopping_criteria") or () if isinstance(stop, Cancellation)]
        prompt = self._prefill(messages, sharer_messages, options, stops)
        return unbatch(prompt.generate(timer, **kwargs), messages)

    def _prefill(
        self, messages: Any, sharer_messages: Any, options: RenderOptions | None, stops: Sequence[Cancellation]
    ) -> PrefilledPrompt:
        batch, passages = self._inputs(messages, sharer_messages, options)
        written = self.write(self.requests(batch, passages), stops)
        texts = [result.text for result in written]
        prompt = self.model.receiver.prefill_messages(self.replies(batch, passages, texts), options)
        prompt.messages = tuple(written)
        return prompt

    def check(self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None) -> int:
        """Check the sharer's prompt, and the receiver's with room for the sharer's text; see :meth:`System.check`."""
        batch, passages = self._inputs(messages, sharer_messages, options)
        count_tokens(self.model.sharers[0], self.requests(batch, passages))
        replies = self.replies(batch, passages, ["..."] * len(batch))
        return count_tokens(self.model.receiver, replies, options) + self.options.message_tokens

    def _inputs(
        self, messages: Any, sharer_messages: Any, options: RenderOptions | None
    ) -> tuple[list[Conversation], list[str] | None]:
        """Return the conversations, and for private context the passage of each."""
        batch, _ = conversations(messages)
        if options is not None and not options.chat_template:
            raise PromptError("text-to-text needs messages and their chat template rather than raw text.")
        if any(conversation[-1]["role"] != "user" for conversation in batch):
            raise PromptError("text-to-text needs conversations that end with a user message.")
        return batch, None if sharer_messages is None else context_texts(sharer_messages, len(batch))

    def write(self, requests: Sequence[Conversation], stops: Sequence[Cancellation] = ()) -> list[GenerationResult]:
        """Generate the sharer's texts, greedily, until one of ``stops``."""
        longest = self.options.message_tokens
        results: list[GenerationResult] = self.model.sharers[0].answer(
            list(requests), max_new_tokens=longest, do_sample=False, stopping_criteria=list(stops)
        )
        return results

    def requests(self, batch: Sequence[Conversation], passages: Sequence[str] | None) -> list[Conversation]:
        """Return the sharer's prompts."""
        if passages is not None:
            return [summary_request(passage, self.options.message_tokens) for passage in passages]
        return [self._with_request(conversation) for conversation in batch]

    def replies(
        self, batch: Sequence[Conversation], passages: Sequence[str] | None, texts: Sequence[str]
    ) -> list[Conversation]:
        """Return the receiver's prompts, given what the sharer wrote."""
        if passages is not None:
            return [with_passage(*pair) for pair in zip(batch, texts, strict=True)]
        return [
            [*self._with_request(conversation), {"role": "assistant", "content": text}, conversation[-1]]
            for conversation, text in zip(batch, texts, strict=True)
        ]

    def _with_request(self, conversation: Conversation) -> Conversation:
        content = self.request.format(question=conversation[-1]["content"])
        return [*conversation[:-1], {"role": "user", "content": content}]


class PublishedTextToText(TextToText):
    """Text-to-text as published: the answer is forbidden, so that the receiver can only gain background knowledge."""

    name: ClassVar[str] = "text_published"
    title: ClassVar[str] = "text-to-text as published"
    request: ClassVar[str] = (
        "In one clear sentence, describe the most essential background knowledge needed to answer the question: "
        "{question} Do NOT directly solve or give answer to the question."
    )


class Summary(TextToText):
    """Private context as text: the sharer summarises it without the question."""

    name: ClassVar[str] = "summary"
    title: ClassVar[str] = "summary"


class DraftText(TextToText):
    """Private context as text: the sharer reads context and question, and its draft of an answer is handed over."""

    name: ClassVar[str] = "draft_text"
    title: ClassVar[str] = "draft as text"

    def requests(self, batch: Sequence[Conversation], passages: Sequence[str] | None) -> list[Conversation]:
        """Return the sharer's prompts: passage and question."""
        if passages is None:
            raise PromptError("a draft as text needs what only the sharer has read: pass sharer_messages=....")
        return [with_passage(*pair) for pair in zip(batch, passages, strict=True)]


def summary_request(passage: str, tokens: int) -> Conversation:
    """Return the request for a summary; in words fewer than ``tokens``, so that the summary comes to its end."""
    request = f"Summarise the following text in at most {tokens * 2 // 3} words, with all names and numbers."
    return [{"role": "user", "content": f"{request}\n\n{passage}"}]


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
