"""What the server needs of an engine. :class:`~c2c.serving.huggingface.HuggingFaceEngine` is one.

An engine takes requests, answers them in its own time, and tells about it by events on their tickets. How it batches
is its own affair; the server knows nothing of tokens, models or devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

from c2c.messages import Conversation
from c2c.serving.sampling import Sampling
from c2c.serving.ticket import Ticket


class Way(StrEnum):
    """Who answers."""

    C2C = "c2c"
    RECEIVER = "receiver"
    SHARER = "sharer"
    TEXT = "text"


@dataclass(frozen=True)
class Ask:
    """A request for one or several answers to one prompt.

    Attributes:
        way: who answers.
        prompt: a conversation, or raw text to go on from.
        sampling: how the answers are decoded.
        n: how many answers.
        private: what the sharers alone have read, one entry for each sharer of private context: a conversation, or the
            value of an earlier :class:`~c2c.serving.events.Read`.
        answer_prefix: what the answer goes on from.
        stream: tell about every piece of text.
    """

    way: Way
    prompt: Conversation | str
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    private: tuple[Any, ...] | None = None
    answer_prefix: str = ""
    stream: bool = False


@dataclass(frozen=True)
class AskToRead:
    """A request that a sharer reads something, to be handed over later.

    Attributes:
        messages: what it reads.
        sharer: which one; None for the first that hands over private context.
        draft_tokens: write so many tokens of an answer first.
        precision: how the entries are kept, such as ``bfloat16`` or ``int8``; None for the model's own.
    """

    messages: Conversation
    sharer: int | None = None
    draft_tokens: int = 0
    precision: str | None = None


@dataclass(frozen=True)
class Description:
    """What an engine serves.

    Attributes:
        ways: who can answer.
        receiver: its name.
        sharers: their names.
        trained: whether the fusers are trained; untrained ones leave the receiver as it is.
        context: ``private`` where sharers hand over what the receiver has not read, else ``shared``.
    """

    ways: tuple[Way, ...]
    receiver: str
    sharers: tuple[str, ...]
    trained: bool
    context: Literal["shared", "private"]


@dataclass(frozen=True)
class SharerState:
    """Whether a sharer can be asked, as far as is known.

    Attributes:
        lost: why not, in one word, as the last request to it showed; None if it was answered, or is in this process.
        since: seconds since 1970 of that request.
    """

    lost: str | None = None
    since: float | None = None


class Engine(Protocol):
    """Answers requests.

    Attributes:
        on_batch: called with way and number of answers when a batch begins to be decoded; from any thread.
    """

    on_batch: Callable[[Way, int], object]

    @property
    def description(self) -> Description:
        """What it serves."""
        ...

    @property
    def sharers(self) -> tuple[SharerState, ...]:
        """Whether its sharers can be asked, in the order of the description."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""
        ...

    @property
    def waiting(self) -> int:
        """Accepted requests that it has not begun."""
        ...

    def start(self) -> None:
        """Begin to work."""
        ...

    def submit(self, ask: Ask | AskToRead) -> Ticket:
        """Accept a request, on the event loop. What is accepted is answered, refused or cancelled on its ticket.

        An ``Ask`` is told about by ``Started``, ``Piece`` (streams), a ``Finished`` for each answer and ``Done``; an
        ``AskToRead`` by ``Read``; both by ``Failed`` if they can't be answered.

        Raises:
            ApiError: too many requests wait, or the engine can't do what is asked.
        """
        ...

    def close(self) -> None:
        """Finish what was accepted, and stop."""
        ...
