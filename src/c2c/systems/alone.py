"""One model alone: the receiver, the receiver that reads the context as text, or the sharer."""

from __future__ import annotations

from typing import Any, ClassVar

from c2c.generation import PrefilledPrompt
from c2c.language_model import LanguageModel
from c2c.messages import Conversation, conversations
from c2c.prompting import RenderOptions
from c2c.systems.base import System, context_texts, count_tokens, with_passage


class ReceiverAlone(System):
    """Answer with the receiver, without what only the sharer has read."""

    name: ClassVar[str] = "receiver"
    title: ClassVar[str] = "receiver alone"
    reads_context: ClassVar[bool] = False

    def prefill(
        self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None
    ) -> PrefilledPrompt:
        """Prefill the model's own prompt; see :meth:`System.prefill`."""
        return self.language_model.prefill_messages(self._with_context(messages, sharer_messages), options)

    def check(self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None) -> int:
        """Check the model's own prompt; see :meth:`System.check`."""
        return count_tokens(self.language_model, self._with_context(messages, sharer_messages), options)

    def _with_context(self, messages: Any, sharer_messages: Any) -> list[Conversation]:
        batch, _ = conversations(messages)
        if sharer_messages is None or not self.reads_context:
            return batch
        texts = context_texts(sharer_messages, len(batch))
        return [with_passage(*pair) for pair in zip(batch, texts, strict=True)]


class Reader(ReceiverAlone):
    """Answer with the receiver, which reads the context itself: what private context is measured against."""

    name: ClassVar[str] = "reader"
    title: ClassVar[str] = "receiver that reads the text"
    reads_context: ClassVar[bool] = True


class SharerAlone(ReceiverAlone):
    """Answer with the first sharer, which reads its context and the question."""

    name: ClassVar[str] = "sharer"
    title: ClassVar[str] = "sharer alone"
    reads_context: ClassVar[bool] = True
    generates_sharer: ClassVar[bool] = True

    @property
    def language_model(self) -> LanguageModel:
        """The model that answers."""
        return self.model.sharers[0]
