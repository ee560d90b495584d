"""Interface between the HTTP server and an engine: requests, events, and the handle that connects them.

The server knows no tokens, models or devices. An engine accepts a request, batches it as it likes, and reports progress
by events on the request's handle; :class:`~c2c.serving.transformers_engine.TransformersEngine` is one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from c2c.errors import C2CError
from c2c.messages import Conversation
from c2c.prompting import RenderOptions
from c2c.serving.errors import ApiError, client_gone, timed_out, to_api_error
from c2c.serving.sampling import SamplingParams

FinishReason = Literal["stop", "length"]

# -- requests ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GenerateRequest:
    """Request for one or several answers to one prompt.

    Attributes:
        system: name of the system that answers, see :func:`c2c.systems.systems`.
        prompt: the conversation; for raw text its only message.
        render: how the prompt is rendered.
        sampling: how the answers are decoded.
        n: number of answers.
        private: what the sharers alone have read, one entry for each sharer of private context: a conversation, or the
            handoff of an earlier :class:`HandoffCreated`.
        stream: send a :class:`Delta` for every piece of text.
    """

    system: str
    prompt: Conversation
    render: RenderOptions = field(default_factory=RenderOptions)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    private: tuple[Any, ...] | None = None
    stream: bool = False


@dataclass(frozen=True, eq=False)
class HandoffRequest:
    """Request that a sharer prefills messages, to be handed over later.

    Attributes:
        messages: what it reads.
        sharer: index of the sharer; None for the first that hands over private context.
        draft_tokens: tokens of an answer that it generates first.
        precision: how the entries are kept, such as ``bfloat16`` or ``int8``; None for the model's own.
    """

    messages: Conversation
    sharer: int | None = None
    draft_tokens: int = 0
    precision: str | None = None


Request = GenerateRequest | HandoffRequest

# -- events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one token of an answer.

    Attributes:
        token: its text.
        logprob: natural logarithm of its probability, before temperature, ``top_p`` and penalties.
        offset: where it begins in the answer, in characters.
        top: the likeliest tokens at this position with theirs.
    """

    token: str
    logprob: float
    offset: int
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Prefilled:
    """The prompt is prefilled; decoding begins.

    Attributes:
        fallback: why the receiver answers alone although a sharer should have been read; None where it does not.
    """

    fallback: str | None = None


@dataclass(frozen=True)
class Delta:
    """More text of one answer of a stream."""

    index: int
    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """One whole answer.

    Attributes:
        index: which of the request's answers.
        text: all of it.
        reason: ``stop`` at an end token or stop string, ``length`` at the limit.
        tokens: number of generated tokens, an end token included.
        logprobs: of its tokens without the end token; empty if not requested.
    """

    index: int
    text: str
    reason: FinishReason
    tokens: int
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    """All answers of a request are there.

    Attributes:
        prompt_tokens: tokens that the answering model has read.
        completion_tokens: tokens of all answers.
        first_token: ``time.monotonic()`` at the first one.
        rows: answers in the batch that it was part of.
        sharer_bytes: bytes that went from sharer to receiver: cache entries, or text.
        report: the fusion report; None where nothing was fused.
        message: the sharer's text, in text-to-text.
        fallback: as in :class:`Prefilled`.
    """

    prompt_tokens: int
    completion_tokens: int
    first_token: float
    rows: int
    sharer_bytes: int = 0
    report: dict[str, Any] | None = None
    message: str | None = None
    fallback: str | None = None


@dataclass(frozen=True)
class HandoffCreated:
    """A sharer has prefilled what it is to hand over.

    Attributes:
        handoff: what a later request passes as private context.
        nbytes: memory that keeping it takes.
        tokens: tokens read.
        sharer: name of the sharer.
        index: index of the sharer.
        precision: how its numbers are kept.
    """

    handoff: Any
    nbytes: int
    tokens: int
    sharer: str
    index: int
    precision: str


@dataclass(frozen=True)
class Failed:
    """The request ends without an answer."""

    error: ApiError


Event = Prefilled | Delta | Answer | Finished | HandoffCreated | Failed


class RequestHandle:
    """Connect a request, which waits on the event loop, with its engine, which works in a thread.

    Made on the event loop. :meth:`push` and :meth:`fail` may be called from any thread, the rest on the event loop.

    Attributes:
        cancelled: nobody waits for the request any more; the engine drops it as soon as it can.
        created: ``time.monotonic()`` when the request was accepted.
        ended: its last event was received.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._on_cancel: Callable[[], object] | None = None
        self.cancelled = self.ended = False
        self.created = time.monotonic()

    def push(self, event: Event) -> None:
        """Send an event to whoever waits for it."""
        if self.cancelled or self._loop.is_closed():
            return
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # closed since: nobody waits
            self.cancelled = True

    def fail(self, error: C2CError, param: str | None = None) -> None:
        """End the request with an error; ``param`` is the field of the request that would be wrong."""
        self.push(Failed(to_api_error(error, param)))

    def on_cancel(self, callback: Callable[[], object]) -> None:
        """Register what the engine does when the request is cancelled."""
        self._on_cancel = callback

    async def events(self, seconds: float) -> AsyncIterator[Event]:
        """Iterate over the events up to the last one; leaving early cancels the request.

        Args:
            seconds: how long after its acceptance the request may take.

        Raises:
            ApiError: it failed, or took too long.
        """
        try:
            while not self.ended:
                event = await self._next(seconds)
                if isinstance(event, Failed):
                    raise event.error
                self.ended = isinstance(event, Finished | HandoffCreated)
                yield event
        finally:
            self.cancel()

    async def _next(self, seconds: float) -> Event:
        try:
            async with asyncio.timeout(max(self.created + seconds - time.monotonic(), 0)):
                return await self._events.get()
        except TimeoutError:
            raise timed_out(seconds) from None

    def cancel(self) -> None:
        """Give the request up, unless it has ended; whoever waits for it gets an error."""
        callback, self._on_cancel = self._on_cancel, None
        if self.ended or self.cancelled:
            return
        self.cancelled = True
        if callback is not None:
            callback()
        self._events.put_nowait(Failed(client_gone()))


# -- engines -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineInfo:
    """Describe what an engine serves.

    Attributes:
        systems: names of the systems that can answer.
        receiver: its name.
        sharers: their names.
        trained: whether the fusers are trained; untrained ones leave the receiver as it is.
        context: ``private`` where sharers hand over what the receiver has not read, else ``shared``.
    """

    systems: tuple[str, ...]
    receiver: str
    sharers: tuple[str, ...]
    trained: bool
    context: Literal["shared", "private"]


@dataclass(frozen=True)
class SharerHealth:
    """State whether a sharer is reachable.

    Attributes:
        lost: why not, in one word, as the last request to it showed; None if it answered, or is in this process.
        since: seconds since 1970 of that request.
    """

    lost: str | None = None
    since: float | None = None


class Engine(Protocol):
    """Answer requests.

    Attributes:
        on_batch: called with the system's name and the number of answers when decoding of a batch begins; from any
            thread.
    """

    on_batch: Callable[[str, int], object]

    @property
    def info(self) -> EngineInfo:
        """What it serves."""

    @property
    def sharers(self) -> tuple[SharerHealth, ...]:
        """Health of the sharers, in the order of :attr:`info`."""

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""

    @property
    def waiting(self) -> int:
        """Accepted requests that have not begun."""

    def start(self) -> None:
        """Start to work."""

    async def submit(self, request: Request) -> RequestHandle:
        """Accept a request. Each that was accepted is answered, failed or cancelled on its handle.

        A :class:`GenerateRequest` yields :class:`Prefilled`, :class:`Delta` (streams), an :class:`Answer` for each
        answer and :class:`Finished`; a :class:`HandoffRequest` yields :class:`HandoffCreated`; both
        :class:`Failed` in place of these if they can't be answered.

        Raises:
            ApiError: too many requests wait, or the engine can't do what is requested.
        """

    def close(self) -> None:
        """Finish what was accepted, and stop."""
