"""Interface between the HTTP server and an engine: requests, events, and the handle that connects them.

The server knows no tokens, models or devices. An engine accepts a request, batches it as it likes, and reports progress
by events on the request's handle; :class:`~c2c.serving.transformers_engine.TransformersEngine` is one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from c2c.errors import C2CError
from c2c.messages import Conversation
from c2c.prompting import RenderOptions
from c2c.serving.errors import ApiError, client_gone, timed_out, to_api_error

FinishReason = Literal["stop", "length"]
# Below these the likeliest token is all that is left: a smaller temperature would overflow the logits, and one of the
# tokens of a vocabulary, which are fewer than a million, has more probability than this.
_GREEDY_TEMPERATURE, _GREEDY_TOP_P = 1e-5, 1e-6


@dataclass(frozen=True)
class SamplingParams:
    """Decoding parameters of a request."""

    max_tokens: int | None = None  # new tokens at most; None for the server's default
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # sample from the fewest tokens that have this probability together
    seed: int | None = None  # of the first answer; the next ones take the numbers after it; None draws one
    stop: Sequence[str] = ()  # strings before which an answer ends
    logprobs: int | None = None  # how many of the likeliest tokens are reported beside each one; None reports nothing
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that the answer has already
    frequency_penalty: float = 0.0  # the same, times how often

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < _GREEDY_TEMPERATURE or self.top_p < _GREEDY_TOP_P

    @property
    def penalised(self) -> bool:
        """Whether tokens that the answer has already become less likely."""
        return bool(self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True, eq=False)
class GenerateRequest:
    """Request one or several answers to one prompt."""

    system: str  # that answers, one of the engine's
    prompt: Conversation  # for raw text its only message
    render: RenderOptions = field(default_factory=RenderOptions)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1  # answers
    # what the sharers alone have read, for each: a conversation, a handoff, or a list of handoffs
    private: tuple[Any, ...] | None = None
    stream: bool = False  # send text as soon as it is there, else each answer at once


@dataclass(frozen=True, eq=False)
class HandoffRequest:
    """Request that a sharer prefills messages, to be handed over later."""

    messages: Conversation
    sharer: int | None = None  # its index; None for the first that hands over private context
    draft_tokens: int = 0  # tokens of an answer that it generates first
    precision: str | None = None  # how the entries are kept, such as bfloat16 or int8; None for the model's own
    before: Conversation | None = None  # what prompts about it begin with; None for what its fuser needs by default
    among: bool | str = False  # it will stand among others, and is read behind another passage


Request = GenerateRequest | HandoffRequest


@dataclass(frozen=True)
class TokenScore:
    """One token of the vocabulary with its log-probability at some position."""

    id: int
    text: str  # its name
    bytes: bytes | None  # of it; None for an id without any
    logprob: float  # natural logarithm of its probability, before temperature, top_p and penalties


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one token of an answer."""

    token: TokenScore
    offset: int  # where it begins in the answer, in characters
    top: list[TokenScore]  # the likeliest tokens at this position


@dataclass(frozen=True)
class Prefilled:
    """The prompt is prefilled; decoding begins."""

    fallback: str | None = None  # why the receiver answers alone although a sharer should have been read
    notes: Sequence[str] = ()  # on the prompt, such as messages that a template leaves out


@dataclass(frozen=True)
class Delta:
    """More text of one answer; all of it where the request is no stream."""

    index: int  # which of the request's answers
    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of its tokens without the end token, if requested
    reason: FinishReason | None = None  # of the last one: ``stop`` at an end token or stop string, ``length`` at limit


@dataclass(frozen=True)
class Finished:
    """All answers of a request are there."""

    prompt_tokens: int  # that the answering model has read
    completion_tokens: int  # of all answers, end tokens included
    first_token: float  # ``time.monotonic()``
    rows: int  # answers in the batch that it was part of
    sharer_bytes: int = 0  # from sharer to receiver: cache entries, or text
    report: dict[str, Any] | None = None  # the fusion report; None where nothing was fused
    message: str | None = None  # the sharer's text, in text-to-text
    fallback: str | None = None  # as in :class:`Prefilled`
    notes: Sequence[str] = ()  # the same


@dataclass(frozen=True)
class HandoffCreated:
    """A sharer has prefilled what it is to hand over."""

    handoff: Any  # what a later request passes as private context
    nbytes: int  # memory that keeping it takes
    tokens: int
    sharer: str  # its name
    index: int  # its index
    precision: str
    notes: Sequence[str] = ()  # as in :class:`Prefilled`


@dataclass(frozen=True)
class Failed:
    """The request ends without an answer."""

    error: ApiError


Event = Prefilled | Delta | Finished | HandoffCreated | Failed


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
                async with asyncio.timeout(max(self.created + seconds - time.monotonic(), 0)):
                    event = await self._events.get()
                if isinstance(event, Failed):
                    raise event.error
                self.ended = isinstance(event, Finished | HandoffCreated)
                yield event
        except TimeoutError:
            raise timed_out(seconds) from None
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Give the request up, unless it has ended; whoever waits for it gets an error."""
        callback, self._on_cancel = self._on_cancel, None
        if self.ended or self.cancelled:
            return
        self.cancelled = True
        if callback is not None:
            callback()
        self._events.put_nowait(Failed(client_gone()))


class Engine(Protocol):
    """Answer requests.

    Attributes:
        on_batch: called with the system's name and the number of answers when decoding of a batch begins; from any
            thread.
    """

    on_batch: Callable[[str, int], object]

    @property
    def systems(self) -> Iterable[str]:
        """Names of the systems that can answer."""

    @property
    def info(self) -> dict[str, Any]:
        """Facts for clients: names of ``receiver`` and ``sharers``, ``context``, and whether fusers are ``trained``."""

    @property
    def sharers(self) -> Sequence[dict[str, Any]]:
        """Health of each sharer: its ``state``, ``ok`` or ``lost``; of a lost one ``code`` and time (``since``) too."""

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

        A :class:`GenerateRequest` yields :class:`Prefilled`, at least one :class:`Delta` for each answer and
        :class:`Finished`; a :class:`HandoffRequest` yields :class:`HandoffCreated`; both :class:`Failed` in place of
        these if they can't be answered.

        Raises:
            ApiError: too many requests wait, or the engine can't do what is requested.
        """

    def restore_handoff(self, handoff: Any, index: int) -> HandoffCreated:
        """Take up a handoff that was made before a restart, by the sharer of this index.

        Raises:
            C2CError: it is another model's than that sharer.
        """

    def close(self) -> None:
        """Finish what was accepted, and stop."""
