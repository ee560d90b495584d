"""Text-to-text: the sharer writes, the receiver reads it. The usual way for two models to work together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from c2c.errors import PromptError
from c2c.generation import Cancellation, FirstTokenTimer, GenerationResult, PrefilledPrompt, unbatch
from c2c.messages import Conversation, conversations
from c2c.prompting import RenderOptions, with_passage
from c2c.systems.base import System, context_texts, count_tokens


class TextToText(System):
    """Let the sharer answer with a reason, and the receiver answer after reading that.

    The receiver reads three turns, as published: the request, the sharer's text, and the prompt. Where only the sharer
    has the context it summarises it without the question, and the receiver reads the summary in the place of the
    passage.
    """

    name: ClassVar[str] = "text"
    title: ClassVar[str] = "text-to-text"
    generates_sharer: ClassVar[bool] = True
    request: ClassVar[str] = "Answer the question briefly, and say why in one sentence: {question}"

    def prefill(
        self,
        messages: Any,
        sharer_messages: Any = None,
        *,
        options: RenderOptions | None = None,
        stops: Sequence[Cancellation] = (),
    ) -> PrefilledPrompt:
        """Let the sharer write, until one of ``stops``, and prefill the receiver on the result.

        Other arguments as in :meth:`System.prefill`.

        Raises:
            PromptError: a conversation that does not end with a user message.
        """
        batch, passages = self._inputs(messages, sharer_messages, options)
        requests, tokens = self.requests(batch, passages), self.options.message_tokens
        written: list[GenerationResult] = self.model.sharers[0].answer(
            requests, max_new_tokens=tokens, do_sample=False, stopping_criteria=list(stops)
        )
        replies = self.replies(batch, passages, [result.text for result in written])
        prompt = self.model.receiver.prefill_messages(replies, options)
        prompt.messages = tuple(written)
        return prompt

    def generate(
        self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None, **kwargs: Any
    ) -> Any:
        """Answer; a closed stream ends the sharer's writing as well. See :meth:`System.generate`."""
        timer = FirstTokenTimer()
        stops = [stop for stop in kwargs.get("stopping_criteria") or () if isinstance(stop, Cancellation)]
        prompt = self.prefill(messages, sharer_messages, options=options, stops=stops)
        return unbatch(prompt.generate(timer, **kwargs), messages)

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
        batch, single = conversations(messages)
        if options is not None and not options.chat_template:
            raise PromptError("text-to-text needs messages and their chat template rather than raw text.")
        if any(conversation[-1]["role"] != "user" for conversation in batch):
            raise PromptError("text-to-text needs conversations that end with a user message.")
        if sharer_messages is None:
            return batch, None
        return batch, ["\n\n".join(texts) for texts in context_texts(sharer_messages, len(batch), single)]

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
