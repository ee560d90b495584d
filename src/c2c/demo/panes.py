"""Questions, and panes that show the answers of four systems to them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from c2c.demo.examples import OTHER_DOCUMENT, other_question
from c2c.errors import PromptError
from c2c.messages import Conversation

if TYPE_CHECKING:
    from c2c.generation import GenerationResult

SYSTEMS = ("receiver", "sharer", "text", "c2c")  # in the order of the panes
State = Literal["idle", "waiting", "running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Question:
    """One prompt with its options.

    Attributes:
        message_tokens: longest text that is passed in text-to-text.
        document: what the sharer alone reads; None where both read the prompt.
        wrong_message: whether the sharer reads another question (or document) for cache-to-cache.
    """

    prompt: str
    system: str = ""
    answer_prefix: str = ""
    max_new_tokens: int = 16
    message_tokens: int = 64
    blend: float = 1.0
    document: str | None = None
    wrong_message: bool = False

    @property
    def messages(self) -> Conversation:
        """The conversation that is answered."""
        return self._conversation(self.prompt)

    @property
    def other(self) -> str | None:
        """Text that the sharer reads instead; None where it reads the right one."""
        if not self.wrong_message:
            return None
        return other_question(self.prompt) if self.document is None else OTHER_DOCUMENT

    @property
    def other_messages(self) -> Conversation | str | None:
        """What the sharer reads instead, as :class:`~c2c.systems.SystemOptions` takes it."""
        return self.other if self.other is None or self.document is not None else self._conversation(self.other)

    def check(self) -> None:
        """Raise PromptError where there is no prompt, or no document."""
        if not self.prompt.strip():
            raise PromptError("there is no prompt. Write one above, or take an example.")
        if self.document is not None and not self.document.strip():
            raise PromptError("there is no document. Paste or upload a text that only the sharer shall read.")

    def _conversation(self, text: str) -> Conversation:
        system = [{"role": "system", "content": self.system.strip()}] if self.system.strip() else []
        return [*system, {"role": "user", "content": text}]


@dataclass(frozen=True)
class Pane:
    """The answer of one system.

    Attributes:
        text: the answer so far.
        seconds: since the system began, while it runs.
        result: the whole answer, once it is done.
        previous: the answer that stood here before one thing was changed.
        error: why there is none.
    """

    name: str
    state: State = "idle"
    question: Question | None = None
    text: str = ""
    seconds: float | None = None
    result: GenerationResult | None = None
    previous: str | None = None
    error: str = ""

    @property
    def other(self) -> str | None:
        """What the sharer read in place of the prompt or document, for this answer."""
        return self.question.other if self.question is not None and self.name == "c2c" else None

    @property
    def letter(self) -> str | None:
        """The letter that the answer names; None where it names none."""
        found = re.match(r"([A-J])(?![A-Za-z])", self.text.strip())
        return found[1] if found else None
