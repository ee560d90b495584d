"""What clients get: answers and chunks of streams in the shape of the OpenAI API."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from c2c.serving.events import Done, Finished, Piece, TokenLogprob

Data = dict[str, Any]


class Shape(Protocol):
    """How one API writes its answers. ``first`` is the index of a prompt's first answer."""

    def body(self, finished: Sequence[tuple[int, Finished]], usage: Data) -> Data:
        """All answers at once."""
        ...

    def opening(self, index: int) -> Data | None:
        """The chunk that begins an answer, if there is one."""
        ...

    def piece(self, index: int, piece: Piece) -> Data:
        """A chunk with more text."""
        ...

    def ending(self, index: int, finished: Finished) -> Data:
        """The chunk that ends an answer."""
        ...

    def closing(self) -> Data:
        """A chunk without any answer, for what is said about all of them."""
        ...


class ChatShape:
    """Chat completions.

    Args:
        model: what the client called it.
        logprobs: whether they were asked for.
    """

    def __init__(self, model: str, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._head = _head("chatcmpl", model)

    def body(self, finished: Sequence[tuple[int, Finished]], usage: Data) -> Data:
        """All answers at once."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": self._chat_logprobs(one.logprobs),
                "finish_reason": one.reason,
            }
            for index, one in finished
        ]
        return self._head | {"object": "chat.completion", "choices": choices, "usage": usage}

    def opening(self, index: int) -> Data:
        """The chunk with the role."""
        return self._chunk([self._choice(index, {"role": "assistant", "content": ""})])

    def piece(self, index: int, piece: Piece) -> Data:
        """A chunk with more text."""
        return self._chunk([self._choice(index, {"content": piece.text}, self._chat_logprobs(piece.logprobs))])

    def ending(self, index: int, finished: Finished) -> Data:
        """The chunk with the reason why the answer ends."""
        return self._chunk([self._choice(index, {}, None, finished.reason)])

    def closing(self) -> Data:
        """A chunk without choices."""
        return self._chunk([])

    def _chunk(self, choices: list[Data]) -> Data:
        return self._head | {"object": "chat.completion.chunk", "choices": choices}

    @staticmethod
    def _choice(index: int, delta: Data, logprobs: Data | None = None, reason: str | None = None) -> Data:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _chat_logprobs(self, entries: Sequence[TokenLogprob]) -> Data | None:
        if not self._logprobs:
            return None
        content = [
            _named(entry.token, entry.logprob) | {"top_logprobs": [_named(*other) for other in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}


class CompletionShape:
    """Completions of raw text.

    Args:
        model: what the client called it.
        logprobs: whether they were asked for.
    """

    def __init__(self, model: str, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._head = _head("cmpl", model) | {"object": "text_completion"}

    def body(self, finished: Sequence[tuple[int, Finished]], usage: Data) -> Data:
        """All answers at once."""
        choices = [self._choice(index, one.text, one.logprobs, one.reason) for index, one in finished]
        return self._head | {"choices": choices, "usage": usage}

    def opening(self, index: int) -> None:
        """Completions begin with their text."""

    def piece(self, index: int, piece: Piece) -> Data:
        """A chunk with more text."""
        return self._head | {"choices": [self._choice(index, piece.text, piece.logprobs, None)]}

    def ending(self, index: int, finished: Finished) -> Data:
        """The chunk with the reason why the answer ends."""
        return self._head | {"choices": [self._choice(index, "", None, finished.reason)]}

    def closing(self) -> Data:
        """A chunk without choices."""
        return self._head | {"choices": []}

    def _choice(self, index: int, text: str, entries: Sequence[TokenLogprob] | None, reason: str | None) -> Data:
        given = None
        if self._logprobs and entries is not None:
            given = {
                "tokens": [entry.token for entry in entries],
                "token_logprobs": [entry.logprob for entry in entries],
                "top_logprobs": [dict(entry.top) for entry in entries],
                "text_offset": [entry.offset for entry in entries],
            }
        return {"index": index, "text": text, "logprobs": given, "finish_reason": reason}


def usage(done: Sequence[Done]) -> Data:
    """Tokens of all prompts and answers."""
    prompt = sum(one.prompt_tokens for one in done)
    completion = sum(one.completion_tokens for one in done)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def about(way: str | None, done: Sequence[Done], report: bool) -> Data:
    """The field ``c2c``, of the one prompt or of each: where it is asked for, and unasked where a sharer was lost."""
    if not report and not any(one.fallback for one in done):
        return {}
    facts: list[Data] = [{"way": way, "fallback": one.fallback} for one in done]
    if report:
        for fact, one in zip(facts, done, strict=True):
            fact |= {"report": one.report, "message": one.message, "batch": one.rows}
    return {"c2c": facts[0] if len(facts) == 1 else {"prompts": facts}}


def _head(prefix: str, model: str) -> Data:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}


def _named(token: str, logprob: float) -> Data:
    return {"token": token, "logprob": logprob, "bytes": None if "\ufffd" in token else list(token.encode())}
