"""What happened: a report on every fusion, and the result of every answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from c2c.errors import PromptError
from c2c.messages import Conversation, conversations
from c2c.prompting import require_tokenizer

if TYPE_CHECKING:
    from c2c.model import C2CModel


class Stopwatch:
    """Seconds per stage, without waiting for the device while the work is under way.

    On CUDA events are recorded and read when the figures are asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the enclosed work under ``name``; several visits add up."""
        if self._cuda:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            stop.record()
            self._events.append((name, start, stop))
        else:
            began = time.perf_counter()
            yield
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per stage. On CUDA this waits for the device."""
        for name, start, stop in self._events:
            stop.synchronize()
            self.add(name, start.elapsed_time(stop) / 1000)
        self._events.clear()
        return dict(self._seconds)


@dataclass
class FusionReport:
    """What was fused and at what cost. One report per call, for the whole batch.

    Attributes:
        prompt_tokens: real receiver tokens, summed over the batch.
        fused_tokens: receiver positions that took something from a sharer.
        skipped_tokens: the other positions, by reason.
        fused_layers: receiver layers that were fused, over all sharers.
        skipped_layers: receiver layers that were not, by reason.
        memory_slots: entries of private context in the receiver's cache, summed over the batch.
        sharer_bytes: bytes of the sharers' cache entries that the fusers read.
        trained: whether every fuser has been trained.
        notes: accepted mismatches and other things to know.
    """

    prompt_tokens: int = 0
    fused_tokens: int = 0
    skipped_tokens: dict[str, int] = field(default_factory=dict)
    fused_layers: list[int] = field(default_factory=list)
    skipped_layers: dict[int, str] = field(default_factory=dict)
    memory_slots: int = 0
    sharer_bytes: int = 0
    trained: bool = True
    notes: list[str] = field(default_factory=list)
    gate_values: list[Tensor] = field(default_factory=list, repr=False)
    stopwatch: Stopwatch | None = field(default=None, repr=False)

    @property
    def gate_openness(self) -> float | None:
        """Mean of all layer gates, 0 closed to 1 open; None if nothing was fused. Reads from the device."""
        if not self.gate_values:
            return None
        return float(torch.cat([gate.float().cpu().flatten() for gate in self.gate_values]).mean())

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per stage: ``sharer_prefill``, ``receiver_prefill``, ``fuse``, ``first_token``, ``decode``."""
        return self.stopwatch.seconds if self.stopwatch else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "fused_tokens": self.fused_tokens,
            "skipped_tokens": self.skipped_tokens,
            "fused_layers": self.fused_layers,
            "skipped_layers": {str(layer): reason for layer, reason in self.skipped_layers.items()},
            "gate_openness": self.gate_openness,
            "memory_slots": self.memory_slots,
            "sharer_bytes": self.sharer_bytes,
            "seconds": self.seconds,
            "trained": self.trained,
            "notes": self.notes,
        }


@dataclass
class GenerationResult:
    """One answer.

    Attributes:
        text: the answer, special tokens removed.
        ids: its token ids, ``[new]``, the end token included, padding not.
        prompt_tokens: tokens that the receiver read.
        report: what was fused; shared by all answers of one call. None for a model that answered alone.
        seconds_to_first_token: from the start of the call to the first new token.
        seconds_total: of the whole call.
    """

    text: str
    ids: Tensor
    prompt_tokens: int
    report: FusionReport | None
    seconds_to_first_token: float
    seconds_total: float

    @property
    def new_tokens(self) -> int:
        """Number of generated tokens."""
        return self.ids.numel()

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "text": self.text,
            "new_tokens": self.new_tokens,
            "prompt_tokens": self.prompt_tokens,
            "seconds_to_first_token": round(self.seconds_to_first_token, 4),
            "seconds_total": round(self.seconds_total, 4),
            "report": self.report.to_dict() if self.report else None,
        }


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


class _Cancelled(StoppingCriteria):
    """Stops the generation when the reader has gone."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class TextStream(Iterator[str]):
    """Iterate over an answer's text as it is made.

    Attributes:
        result: the :class:`GenerationResult`, once the stream has ended.

    Raises:
        PromptError: several conversations; only one can be streamed.
    """

    def __init__(self, tokenizer: Any, generate: Callable[..., Any], messages: Any, **kwargs: Any) -> None:
        batch, _ = conversations(messages)
        if len(batch) != 1:
            raise PromptError(f"only one conversation can be streamed, got {len(batch)}. Use generate for a batch.")
        self.result: GenerationResult | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._cancel = Event()
        require_tokenizer(tokenizer, "receiver")
        self._pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stops = StoppingCriteriaList([_Cancelled(self._cancel), *(kwargs.pop("stopping_criteria", None) or [])])
        kwargs |= {"streamer": self._pieces, "stopping_criteria": stops}
        self._thread = Thread(target=self._run, args=(generate, messages, kwargs), daemon=True)
        self._thread.start()

    def _run(self, generate: Callable[..., Any], messages: Any, kwargs: dict[str, Any]) -> None:
        try:
            result = generate(messages, **kwargs)
            self.result = result[0] if isinstance(result, list) else result
        except BaseException as error:
            self._error = error
            self._pieces.end()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        try:
            return str(next(self._pieces))
        except StopIteration:
            self._ended = True
            self._thread.join()
            if self._error is not None:
                raise self._error from None
            raise

    def close(self) -> None:
        """Stop the generation after its next token and wait for it."""
        self._cancel.set()
        self._thread.join()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
