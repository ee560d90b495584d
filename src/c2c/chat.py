"""A conversation of several turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from c2c.messages import Conversation
from c2c.report import GenerationResult

if TYPE_CHECKING:
    from c2c.model import C2CModel


class Chat:
    """Keeps the messages of a conversation; each turn is fused from the receiver's clean cache.

    Entries that were fused once are never fused again: that collapses within a few turns.

    Attributes:
        messages: the conversation so far.
    """

    def __init__(self, model: C2CModel, system: str | None = None, **generate_kwargs: Any) -> None:
        self.model = model
        self.messages: Conversation = [{"role": "system", "content": system}] if system else []
        self.generate_kwargs = generate_kwargs

    def send(self, text: str, **generate_kwargs: Any) -> GenerationResult:
        """Say something and get the answer; both join :attr:`messages`."""
        turn = [*self.messages, {"role": "user", "content": text}]
        result = self.model.generate(turn, **(self.generate_kwargs | generate_kwargs))
        if not isinstance(result, GenerationResult):
            raise TypeError("a chat needs one answer per turn; num_return_sequences must be 1")
        self.messages = [*turn, {"role": "assistant", "content": result.text}]
        return result
