"""What is asked: everything that one run of the panes needs to know."""

from __future__ import annotations

from dataclasses import dataclass

from c2c.messages import Conversation


@dataclass(frozen=True)
class Question:
    """One prompt with its options.

    Attributes:
        prompt: the user's message.
        system: the system message, empty for none.
        prefix: text that the answer continues.
        max_new_tokens: at most this many tokens per answer.
        message_tokens: at most this many of the text that is passed.
        blend: how much of what the fuser adds is taken, 0 to 1.
        misled: what the sharer reads in place of the prompt (or of the document); None for the right one.
        document: what the sharer alone reads; None where both read the prompt.
    """

    prompt: str
    system: str = ""
    prefix: str = ""
    max_new_tokens: int = 16
    message_tokens: int = 64
    blend: float = 1.0
    misled: str | None = None
    document: str | None = None

    @property
    def messages(self) -> Conversation:
        """The conversation that is answered."""
        return self._conversation(self.prompt)

    @property
    def misleading(self) -> Conversation:
        """The conversation that the sharer reads by mistake."""
        return self._conversation(self.misled or "")

    def _conversation(self, text: str) -> Conversation:
        system = [{"role": "system", "content": self.system.strip()}] if self.system.strip() else []
        return [*system, {"role": "user", "content": text}]
