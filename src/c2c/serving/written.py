"""Text-to-text: the sharer writes, the receiver reads what it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from c2c.language_model import LanguageModel
from c2c.messages import Conversation
from c2c.serving.batch import ends_of, write
from c2c.serving.errors import invalid
from c2c.serving.queue import Job
from c2c.serving.raw_text import as_message
from c2c.serving.reading import Batch, ask_of, read_alone
from c2c.serving.sampling import Sampling
from c2c.serving.writer import Writer
from c2c.systems.base import with_passage
from c2c.systems.text_to_text import hand_over, request, summary_request


class Written:
    """Reads for the receiver what the sharer has written to it.

    Args:
        receiver: the model that answers.
        sharer: the model that writes.
        tokens: of its text at most.
    """

    def __init__(self, receiver: LanguageModel, sharer: LanguageModel, tokens: int) -> None:
        self._receiver, self._sharer, self._tokens = receiver, sharer, tokens

    def read(self, jobs: Sequence[Job]) -> Batch | None:
        """Let the sharer write to each request, and the receiver read it."""
        messages = self._messages(jobs)
        heard = [job for job in jobs if job in messages]
        batch = read_alone(self._receiver, heard, lambda job: _told(job, messages[job]))
        for prompted in batch.prompted if batch else []:
            prompted.message = messages[prompted.job]
            prompted.crossed = len(prompted.message.encode())
        return batch

    def _messages(self, jobs: Sequence[Job]) -> dict[Job, str]:
        """What the sharer writes to each request, greedily."""
        batch = read_alone(self._sharer, jobs, self._request, new_tokens=1, prefix=False)
        if batch is None:
            return {}
        writers = [
            Writer(
                self._sharer.tokenizer,
                Sampling(max_tokens=self._within(prompted.room), temperature=0),
                ends=ends_of(self._sharer),
                gone=prompted.job.ticket.gone,
            )
            for prompted in batch.prompted
        ]
        write(self._sharer, batch.prefilled, writers)
        pairs = zip(batch.prompted, writers, strict=True)
        return {prompted.job: writer.text for prompted, writer in pairs if not prompted.job.ticket.cancelled}

    def _request(self, job: Job) -> Conversation | str:
        ask = ask_of(job)
        if ask.private is not None:
            return summary_request(passage_of(ask.private), self._tokens)
        return request(_conversation(ask.prompt), "fair")

    def _within(self, room: int | None) -> int:
        return self._tokens if room is None else min(self._tokens, room)


def passage_of(private: tuple[Any, ...]) -> str:
    """Private context as text, for ways that hand over text.

    Raises:
        ApiError: it is none.
    """
    given = private[0] if len(private) == 1 else None
    if isinstance(given, list) and len(given) == 1 and given[0]["role"] == "user":
        return str(given[0]["content"])
    raise invalid(
        "a sharer that answers or writes itself reads text: pass sharer_messages with one text or user message, and no "
        "handoff.",
        "c2c",
    )


def _told(job: Job, message: str) -> Conversation:
    """What the receiver reads of the sharer's text."""
    ask = ask_of(job)
    if ask.private is not None:
        return with_passage(_conversation(ask.prompt), message)
    return hand_over(_conversation(ask.prompt), "fair", message)


def _conversation(prompt: Conversation | str) -> Conversation:
    return as_message(prompt) if isinstance(prompt, str) else prompt
