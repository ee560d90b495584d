"""All ways to answer with one model: who can, what they can be asked, and who reads the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from c2c.messages import Conversation
from c2c.model import C2CModel
from c2c.remote import RemoteSharer
from c2c.serving.engine import Ask, Way
from c2c.serving.errors import invalid
from c2c.serving.fused import Fused
from c2c.serving.queue import Job
from c2c.serving.reading import Batch, ask_of, read_alone
from c2c.serving.written import Written, passage_of
from c2c.systems.base import with_passage


class Ways:
    """All ways to answer with one model.

    Args:
        model: receiver, sharers and fusers.
        message_tokens: tokens of the sharer's text at most, for text-to-text.
    """

    def __init__(self, model: C2CModel, message_tokens: int = 128) -> None:
        self.model = model
        self._speaker = model.sharers[model.private[0] if model.private else 0]
        fused = Fused(model, self._receiver)
        self._known: dict[Way, Callable[[Sequence[Job]], Batch | None]] = {
            Way.C2C: fused.private if model.private else fused.shared,
            Way.RECEIVER: self._receiver,
        }
        if not isinstance(self._speaker, RemoteSharer):  # whose weights are not here
            written = Written(model.receiver, self._speaker, message_tokens)
            self._known |= {Way.SHARER: self._sharer, Way.TEXT: written.read}

    @property
    def known(self) -> tuple[Way, ...]:
        """Who can answer."""
        return tuple(self._known)

    def read(self, way: Way, jobs: Sequence[Job]) -> Batch | None:
        """Read the prompts of requests; those that can't be read are told so on their tickets. None if none is left."""
        return self._known[way]([job for job in jobs if not job.ticket.cancelled])

    def _receiver(self, jobs: Sequence[Job]) -> Batch | None:
        return read_alone(self.model.receiver, jobs, lambda job: ask_of(job).prompt)

    def _sharer(self, jobs: Sequence[Job]) -> Batch | None:
        def prompt(job: Job) -> Conversation | str:
            ask = ask_of(job)
            if ask.private is None or isinstance(ask.prompt, str):
                return ask.prompt
            return with_passage(ask.prompt, passage_of(ask.private))

        return read_alone(self._speaker, jobs, prompt)

    # -- what is refused before it waits -------------------------------------------------------------------------------

    def check(self, ask: Ask) -> None:
        """Refuse what can't be answered whatever the length of the prompt.

        Raises:
            ApiError: it can't.
        """
        if ask.way not in self._known:
            raise invalid(
                f"the sharer of this server is on another machine and only shares: no {ask.way} way.", "model"
            )
        if isinstance(ask.prompt, str) and (ask.way is Way.TEXT or self.model.private):
            raise invalid("text-to-text and private context need messages: use /v1/chat/completions.", "prompt")
        if ask.way is Way.TEXT and ask.prompt[-1]["role"] != "user":  # type: ignore[index]
            raise invalid("text-to-text needs messages that end with one of the user.", "messages")
        if ask.private is not None:
            self._check_private(ask, ask.private)
        elif ask.way is Way.C2C and self.model.private:
            raise invalid(
                "this fuser hands over what the sharer alone has read: pass c2c.sharer_messages, or c2c.handoff with "
                "the id that POST /v1/c2c/handoffs gave.",
                "c2c.sharer_messages",
                "missing_private_context",
            )

    def _check_private(self, ask: Ask, private: tuple[Any, ...]) -> None:
        if not self.model.private:
            raise invalid(
                "private context was given, but this fuser is for prompts that both models read. Leave sharer_messages "
                "and handoff out, or serve a 'memory' fuser.",
                "c2c",
            )
        if ask.way is Way.RECEIVER:
            raise invalid("the receiver alone reads no private context: leave sharer_messages and handoff out.", "c2c")
        if ask.way is not Way.C2C:
            passage_of(private)
        elif len(private) != len(self.model.private):
            raise invalid(
                f"got private context for {len(private)} sharers, and {len(self.model.private)} hand it over: pass a "
                "list with one entry for each.",
                "c2c",
            )
