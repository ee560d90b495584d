"""System: one way of answering with a receiver and a sharer, behind one interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from c2c.errors import PromptError
from c2c.generation import Chat, FirstTokenTimer, PrefilledPrompt, TextStream, unbatch
from c2c.handoff import Handoff
from c2c.messages import Conversation, conversations
from c2c.private_context import Document, documents
from c2c.prompting import RenderOptions, with_passage
from c2c.thinking import Realignment

if TYPE_CHECKING:
    from c2c.language_model import LanguageModel
    from c2c.model import C2CModel


@dataclass(frozen=True)
class SystemOptions:
    """Options of all systems; each takes what concerns it.

    Attributes:
        message_tokens: longest text that a sharer writes for the receiver to read.
        draft_tokens: longest draft of an answer that a sharer writes and hands over with what it has read.
        think: thinking steps that a sharer takes and hands over with what it has read.
        realign: how the state of one step becomes the input of the next, see :mod:`c2c.thinking`.
        blend: how much of what the fusers add is taken, from 0 to 1.
        adapter: folder of a LoRA adapter of the receiver.
        other: what the sharers read in place of their own part, for ``deranged`` with a single conversation.
        seed: of an untrained fuser's weights.
    """

    message_tokens: int = 128
    draft_tokens: int = 0
    think: int = 0
    realign: Realignment = "soft"
    blend: float = 1.0
    adapter: str | None = None
    other: Any = None
    seed: int = 0


class System:
    """A way of answering with a receiver and a sharer.

    A subclass sets ``name`` and ``title``, and overrides :meth:`prefill` (and :meth:`check`) or less: by default one
    language model reads :meth:`prompts`.

    Args:
        model: the receiver with its sharers and fusers.
        options: of all systems.

    Attributes:
        name: by which it is chosen, and under which results are filed.
        title: for people.
        reads_context: whether private context is read.
        needs_context: whether it must be given to models with fusers of private context.
        generates_sharer: whether the sharer generates text.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reads_context: ClassVar[bool] = True
    needs_context: ClassVar[bool] = False
    generates_sharer: ClassVar[bool] = False

    def __init__(self, model: C2CModel, options: SystemOptions | None = None) -> None:
        self.model, self.options = model, options or SystemOptions()

    @classmethod
    def unavailable(cls, model: C2CModel, options: SystemOptions) -> str | None:
        """Return why these models can't answer in this way; None where they can."""
        if cls.generates_sharer and not model.sharers[0].generates:
            return "the sharer is on another machine and only shares its cache."
        return None

    def prompts(
        self, messages: Any, sharer_messages: Any = None, options: RenderOptions | None = None
    ) -> list[Conversation]:
        """Return what one language model reads: the conversations, with private context as passages in them."""
        batch, single = conversations(messages)
        if sharer_messages is None or not self.reads_context:
            return batch
        texts = context_texts(sharer_messages, len(batch), single)
        return [with_passage(one, *passages, options=options) for one, passages in zip(batch, texts, strict=True)]

    def prefill(
        self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None
    ) -> PrefilledPrompt:
        """Prefill what :meth:`generate` decodes from.

        Args:
            messages: a text, a conversation, or a list of several of either.
            sharer_messages: what only the sharer has read (private context): messages, or a handoff where the system
                takes one; a list with several for one conversation, or with one (or a list of several) for each of a
                batch; None where both read ``messages``.
            options: how to render the prompts.

        Raises:
            PromptError: can't be read by these models.
        """
        return self.language_model.prefill_messages(self.prompts(messages, sharer_messages, options), options)

    def check(self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None) -> int:
        """Check one conversation as far as that takes no model, as a server does before a request waits.

        Arguments as in :meth:`prefill`.

        Returns:
            Entries that the prompt takes in the KV cache of the answering model, at most.

        Raises:
            PromptError: can't be read by these models.
        """
        return count_tokens(self.language_model, self.prompts(messages, sharer_messages, options), options)

    def generate(
        self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None, **kwargs: Any
    ) -> Any:
        """Answer; arguments as in :meth:`prefill`, and whatever the answering model's ``generate`` takes.

        Returns:
            A :class:`~c2c.generation.GenerationResult`, or a list for a batch or several return sequences.
        """
        timer = FirstTokenTimer()
        prompt = self.prefill(messages, sharer_messages, options=options)
        return unbatch(prompt.generate(timer, **kwargs), messages)

    def stream(self, messages: Any, sharer_messages: Any = None, **kwargs: Any) -> TextStream:
        """Answer one conversation piece by piece; arguments as in :meth:`generate`."""
        return TextStream(self.tokenizer, self.generate, messages, sharer_messages=sharer_messages, **kwargs)

    def chat(self, system: str | None = None, **kwargs: Any) -> Chat:
        """Start a conversation of several turns; ``kwargs`` go to every :meth:`generate`."""
        return Chat(self.generate, system, **kwargs)

    @property
    def language_model(self) -> LanguageModel:
        """The model that answers."""
        return self.model.receiver

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model that answers."""
        return self.language_model.tokenizer


def count_tokens(model: LanguageModel, messages: Any, options: RenderOptions | None = None) -> int:
    """Return how many tokens messages have for a model.

    Raises:
        PromptError: it can't read them.
    """
    batch = model.encode(messages, options)
    model.check_prompt(batch)
    return batch.length


def context_texts(sharer_messages: Any, rows: int, single: bool) -> list[list[str]]:
    """Return private context as the texts of each conversation, for systems that hand over text.

    Args:
        sharer_messages: texts or single messages; for one conversation several of them.
        rows: conversations.
        single: whether these were one conversation rather than a batch.

    Raises:
        PromptError: a handoff, whose text is not known, or another number than ``rows``.
    """
    if isinstance(sharer_messages, tuple):
        raise PromptError("this system hands over the text of one sharer, and was given the contexts of several.")
    return [[_text(document) for document in row] for row in documents(sharer_messages, rows, single)]


def _text(document: Document) -> str:
    if isinstance(document, Handoff):
        raise PromptError(
            "this system hands over text, and was given a handoff, whose text is not known: pass the text or message "
            "that the sharer is to read."
        )
    if len(document) != 1:
        raise PromptError(
            "this system hands over text, and was given a private context of several messages: pass one text or user "
            "message."
        )
    return str(document[0]["content"])
