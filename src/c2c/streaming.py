"""Streaming: an answer piece by piece, from a ``generate`` that runs in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from c2c.errors import PromptError
from c2c.messages import conversations
from c2c.prompting import require_tokenizer
from c2c.report import GenerationResult


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
