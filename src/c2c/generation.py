"""Generation: prefilled prompts, reports and results, streams and chats."""

from __future__ import annotations

import atexit
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from c2c.decoding import as_callables
from c2c.errors import PromptError, RemoteError
from c2c.messages import Conversation, conversations
from c2c.prompting import require_tokenizer
from c2c.tokens import TokenBatch, as_list

if TYPE_CHECKING:
    from c2c.language_model import LanguageModel


class StageTimer:
    """Measure seconds per stage without synchronising the device while the work runs.

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
class RowCounts:
    """Count what was fused in one conversation.

    Attributes:
        prompt_tokens: real receiver tokens.
        fused_tokens: receiver positions that were fused with at least one sharer.
        skipped_tokens: the other positions, by reason.
        memory_slots: entries of private context in the receiver's cache.
        sharer_bytes: bytes of the sharers' cache entries that the fusers read.
    """

    prompt_tokens: int = 0
    fused_tokens: int = 0
    skipped_tokens: dict[str, int] = field(default_factory=dict)
    memory_slots: int = 0
    sharer_bytes: int = 0


@dataclass
class FusionReport(RowCounts):
    """Report what was fused and at what cost: one per call, the counts summed over the batch.

    Attributes:
        fused_layers: receiver layers that were fused, over all sharers.
        skipped_layers: receiver layers that were not, by reason.
        trained: whether every fuser has been trained.
        notes: accepted mismatches and other remarks.
        gate_values: per fuser the gates of its layers, ``[layers, 2]`` for keys and values.
        timer: of the stages.
        rows: the counts of each conversation.
        lost: why a remote sharer was not read, so that the receiver answers alone; None where nothing was lost.
        method: how the models communicate, where :func:`c2c.connection.connect` has chosen it: ``copy``, ``fuser``,
            ``text`` or ``receiver``.
        alternatives: the better methods, which these models don't have, with the reason.
    """

    fused_layers: list[int] = field(default_factory=list)
    skipped_layers: dict[int, str] = field(default_factory=dict)
    trained: bool = True
    notes: list[str] = field(default_factory=list)
    gate_values: list[Tensor] = field(default_factory=list, repr=False)
    timer: StageTimer | None = field(default=None, repr=False)
    rows: list[RowCounts] = field(default_factory=list, repr=False)
    lost: RemoteError | None = field(default=None, repr=False)
    method: str | None = None
    alternatives: dict[str, str] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        """Whether the cache may hold more than the model would make of the prompt."""
        return self.method not in ("text", "receiver")

    def add(self, counts: RowCounts) -> None:
        """Count one more conversation."""
        self.rows.append(counts)
        for name in ("prompt_tokens", "fused_tokens", "memory_slots", "sharer_bytes"):
            setattr(self, name, getattr(self, name) + getattr(counts, name))
        self.skipped_tokens = dict(Counter(self.skipped_tokens) + Counter(counts.skipped_tokens))

    def row(self, index: int) -> FusionReport:
        """Return the report of one conversation; times and gates are those of the batch."""
        if not self.rows:  # nothing was fused, and so nothing counted
            return self
        return replace(self, rows=[self.rows[index]], **vars(self.rows[index]))

    @property
    def gate_openness(self) -> float | None:
        """Mean of all layer gates, 0 closed to 1 open; None if nothing was fused. Reads from the device."""
        if not self.gate_values:
            return None
        return float(torch.cat([gate.float().cpu().flatten() for gate in self.gate_values]).mean())

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per stage: ``sharer_prefill``, ``receiver_prefill``, ``fuse``, ``first_token``, ``decode``."""
        return self.timer.seconds if self.timer else {}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        hidden = ("gate_values", "timer", "rows", "lost")
        data = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in hidden}
        layers = {str(layer): reason for layer, reason in self.skipped_layers.items()}
        return data | {"skipped_layers": layers, "gate_openness": self.gate_openness, "seconds": self.seconds}


@dataclass
class GenerationResult:
    """Hold one answer.

    Attributes:
        text: the answer, special tokens removed.
        ids: its token ids, ``[new]``, the end token included, padding not.
        prompt_tokens: tokens that the receiver read.
        report: what was fused; shared by all answers of one call. None for a model that answered alone.
        seconds_to_first_token: from the start of the call to the first new token.
        seconds_total: of the whole call.
        message: what the sharer wrote for the receiver to read, in text-to-text; its time is part of the two above.
    """

    text: str
    ids: Tensor
    prompt_tokens: int
    report: FusionReport | None
    seconds_to_first_token: float
    seconds_total: float
    message: GenerationResult | None = None

    @property
    def new_tokens(self) -> int:
        """Number of generated tokens."""
        return self.ids.numel()

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        data: dict[str, Any] = {
            "text": self.text,
            "new_tokens": self.new_tokens,
            "prompt_tokens": self.prompt_tokens,
            "seconds_to_first_token": round(self.seconds_to_first_token, 4),
            "seconds_total": round(self.seconds_total, 4),
            "report": self.report.to_dict() if self.report else None,
        }
        if self.message is not None:
            data |= {
                "message": self.message.text,
                "message_tokens": self.message.new_tokens,
                "message_seconds": round(self.message.seconds_total, 4),
            }
        return data


@dataclass
class PrefilledPrompt:
    """Hold a batch of prompts whose cache is ready to decode from.

    Attributes:
        model: the language model that decodes.
        tokens: its tokens, left-padded, ``[batch, tokens]``.
        cache: of the first columns of ``tokens``, at most all but the last. Decoding uses it up.
        report: what was fused; None for a model alone.
        slots: per row, how many columns of ``tokens`` are private context and no tokens; empty without any.
        messages: per row, what the sharer wrote, in text-to-text; else empty.
    """

    model: LanguageModel
    tokens: TokenBatch
    cache: Cache
    report: FusionReport | None = None
    slots: tuple[int, ...] = ()
    messages: tuple[GenerationResult, ...] = ()

    def generate(self, timer: FirstTokenTimer | None = None, **kwargs: Any) -> list[GenerationResult]:
        """Decode with the model's own ``generate``.

        Args:
            timer: started when the call began; by default now.
            **kwargs: whatever ``generate`` takes.

        Returns:
            One result per row and return sequence.
        """
        timer = timer or FirstTokenTimer()
        began = time.perf_counter()
        if self.report is not None and self.report.fused:  # else the cache is the model's own, and may be made anew
            kwargs["fused"] = True
        ids = self.model.generate(self.tokens, self.cache, timer=timer, **kwargs)
        ended = time.perf_counter()
        if self.report is not None:
            self.report.notes += [note for note in timer.notes if note not in self.report.notes]
        if self.report is not None and self.report.timer is not None:
            self.report.timer.add("first_token", (timer.first or ended) - began)
            self.report.timer.add("decode", ended - (timer.first or ended))
        return self._results(ids, timer, ended)

    def _results(self, ids: Tensor, timer: FirstTokenTimer, ended: float) -> list[GenerationResult]:
        sequences = ids.shape[0] // self.tokens.rows
        read = self.tokens.mask.sum(-1).tolist()
        slots, messages = self.slots or [0] * len(read), self.messages or [None] * len(read)
        rows = timer.trim(ids)
        return [
            GenerationResult(
                text=text,
                ids=row,
                prompt_tokens=read[index // sequences] - slots[index // sequences],
                report=self.report,
                seconds_to_first_token=(timer.first or ended) - timer.began,
                seconds_total=ended - timer.began,
                message=messages[index // sequences],
            )
            for index, (row, text) in enumerate(zip(rows, self.model.texts(rows), strict=True))
        ]


def unbatch(results: list[GenerationResult], messages: Any) -> Any:
    """Return the only result where ``messages`` was a single conversation, else the list."""
    return results[0] if len(results) == 1 and conversations(messages)[1] else results


class FirstTokenTimer(StoppingCriteria):
    """Measure the time of the first new token, and where rows end.

    Args:
        began: when the call began; by default now.

    Attributes:
        began: when the call began.
        first: when the first token was there.
        notes: for the report.
        lengths: of all rows, where they are known; else they are found out by :meth:`trim`.
    """

    def __init__(self, began: float | None = None) -> None:
        self.began = time.perf_counter() if began is None else began
        self.first: float | None = None
        self.notes: list[str] = []
        self.lengths: list[int] | None = None
        self._ends: list[int] = []
        self._criteria = StoppingCriteriaList()
        self._stopped: dict[int, int] = {}  # tokens of the rows that a criterion has ended
        self._prompt: int | None = None  # columns before the first new token
        self._beams = False
        self._filler: int | None = None  # what fills beams that a criterion has ended

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Record the time of the first call, which ``generate`` makes after every token; return which rows end."""
        if self.first is None:
            self.first, self._prompt = time.perf_counter(), input_ids.shape[1] - 1
        if not self._criteria:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        done: Tensor = self._criteria(input_ids, scores, **kwargs)
        if not self._beams:  # their rows change places
            length = input_ids.shape[1] - (self._prompt or 0)
            for row in done.nonzero().flatten().tolist():
                self._stopped.setdefault(row, length)
        return done

    def watch(self, kwargs: dict[str, Any], config: Any) -> None:
        """Take the place of the stopping criteria in the arguments of ``generate``, to see which rows they end."""
        self._ends = as_list(config.eos_token_id)
        self._beams = int(config.num_beams or 1) > 1
        criteria = as_callables(kwargs.get("stopping_criteria"))
        limits = [one for one in criteria if isinstance(one, MaxLengthCriteria | MaxTimeCriteria)]
        self._criteria = StoppingCriteriaList(one for one in criteria if one not in limits)
        if self._beams and criteria and config.pad_token_id not in self._ends:
            self._filler = config.pad_token_id
        kwargs["stopping_criteria"] = StoppingCriteriaList([self, *limits])

    def trim(self, ids: Tensor) -> list[Tensor]:
        """Cut each row of new ids, ``[rows, new]``, after its first end token, or where a criterion has ended it."""
        return [row[: self._length(row.tolist(), index)] for index, row in enumerate(ids.cpu())]

    def ended(self, row: Tensor, index: int) -> bool:
        """Whether a trimmed row has ended by itself, and was not cut off."""
        return int(row[-1]) in self._ends or index in self._stopped

    def _length(self, tokens: list[int], index: int) -> int:
        if self.lengths is not None:
            return self.lengths[index]
        length = min(self._stopped.get(index, len(tokens)), len(tokens))
        # beams of a model without an end token are filled with -1
        ends = (i + (token >= 0) for i, token in enumerate(tokens[:length]) if token in self._ends or token < 0)
        length = next(ends, length)
        while length > 1 and tokens[length - 1] == self._filler:
            length -= 1
        return length


class Chat:
    """Hold a conversation of several turns; each turn is fused from the receiver's clean cache.

    Entries that were fused once are never fused again: that collapses within a few turns.

    Args:
        generate: answers a conversation, such as ``C2CModel.generate`` or that of a system.
        system: the system message.
        **generate_kwargs: for every turn.

    Attributes:
        messages: the conversation so far.
    """

    def __init__(self, generate: Callable[..., Any], system: str | None = None, **generate_kwargs: Any) -> None:
        self.generate = generate
        self.messages: Conversation = [{"role": "system", "content": system}] if system else []
        self.generate_kwargs = generate_kwargs

    def send(self, text: str, **generate_kwargs: Any) -> GenerationResult:
        """Send a user message and return the answer; both are appended to :attr:`messages`."""
        turn = [*self.messages, {"role": "user", "content": text}]
        result = self.generate(turn, **(self.generate_kwargs | generate_kwargs))
        if not isinstance(result, GenerationResult):
            raise TypeError("a chat needs one answer per turn; num_return_sequences must be 1")
        self.messages = [*turn, {"role": "assistant", "content": result.text}]
        return result


class Cancellation(StoppingCriteria):
    """Stop the generation when the reader has gone."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return whether to stop, for each row."""
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class _StreamRun:
    """Hold what the thread of a stream works on. It must not hold the stream, which could never be dropped then."""

    def __init__(self, tokenizer: Any) -> None:
        self.result: GenerationResult | None = None
        self.error: BaseException | None = None
        self.cancel = Event()
        self.pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.thread: Thread | None = None

    def start(self, generate: Callable[..., Any], messages: Any, kwargs: dict[str, Any]) -> None:
        """Start to generate."""
        stops = [Cancellation(self.cancel), *as_callables(kwargs.pop("stopping_criteria", None))]
        kwargs |= {"streamer": self.pieces, "stopping_criteria": StoppingCriteriaList(stops)}
        # A daemon, since others are waited for before anything can stop them; see stop_streams.
        self.thread = Thread(target=self._work, args=(generate, messages, kwargs), name="c2c-stream", daemon=True)
        _runs.add(self)
        self.thread.start()

    def stop(self) -> None:
        """Stop the generation after its next token and wait for it."""
        self.cancel.set()
        if self.thread is not None:
            self.thread.join()

    def _work(self, generate: Callable[..., Any], messages: Any, kwargs: dict[str, Any]) -> None:
        try:
            result = generate(messages, **kwargs)
            self.result = result[0] if isinstance(result, list) else result
        except BaseException as error:
            self.error = error
        finally:
            self.pieces.text_queue.put(self.pieces.stop_signal)  # once more, where generate has put one
            _runs.discard(self)


_runs: set[_StreamRun] = set()


@atexit.register
def stop_streams() -> None:
    """Stop all streams: a thread that still computes while the interpreter goes down aborts the process."""
    runs = list(_runs)
    for run in runs:
        run.cancel.set()
    for run in runs:
        run.stop()


class TextStream(Iterator[str]):
    """Iterate over an answer's text as it is made, by a thread of its own.

    The generation stops after its next token when the stream is closed, when nobody holds it any more (a loop that was
    left by ``break``), and when the program ends.

    Attributes:
        result: the :class:`GenerationResult`, once the stream has ended.

    Raises:
        PromptError: several conversations; only one can be streamed.
    """

    def __init__(self, tokenizer: Any, generate: Callable[..., Any], messages: Any, **kwargs: Any) -> None:
        batch, _ = conversations(messages)
        if len(batch) != 1:
            raise PromptError(f"only one conversation can be streamed, got {len(batch)}. Use generate for a batch.")
        if kwargs.get("streamer") is not None:
            raise PromptError("a stream is its own streamer. Use generate to pass another.")
        require_tokenizer(tokenizer, "receiver")
        self._ended = False
        self._run = _StreamRun(tokenizer)
        weakref.finalize(self, self._run.cancel.set).atexit = False
        self._run.start(generate, messages, kwargs)

    @property
    def result(self) -> GenerationResult | None:
        """The answer, once the stream has ended."""
        return self._run.result

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        piece = self._run.pieces.text_queue.get()
        if piece != self._run.pieces.stop_signal:
            return str(piece)
        self._ended = True
        self._run.stop()
        if self._run.error is not None:
            raise self._run.error from None
        raise StopIteration

    def close(self) -> None:
        """Stop the generation after its next token and wait for it; what was not read yet is dropped."""
        self._ended = True
        self._run.stop()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
