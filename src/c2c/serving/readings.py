"""Readings for private context: what a sharer reads now, to be handed over later."""

from __future__ import annotations

from typing import Any

from c2c.model import C2CModel
from c2c.remote import RemoteSharer
from c2c.remote.handoff import PartialHandoff
from c2c.serving.engine import AskToRead
from c2c.serving.errors import invalid
from c2c.serving.events import Read
from c2c.serving.failures import refusing
from c2c.serving.queue import Job


class Readings:
    """Lets the sharers of a model read.

    Args:
        model: receiver, sharers and fusers.
    """

    def __init__(self, model: C2CModel) -> None:
        self._model = model

    def check(self, ask: AskToRead) -> Any:
        """The sharer that is asked.

        Raises:
            ApiError: it can't read this, or there is none that hands anything over.
        """
        sharer = self._model.sharers[self._index(ask)]
        if ask.precision is not None and isinstance(sharer, RemoteSharer):
            raise invalid(
                f"the sharer is on another machine, and its entries are kept as they cross, in {sharer.precision}. "
                "Leave precision out.",
                "precision",
            )
        return sharer

    def read(self, job: Job, ask: AskToRead) -> None:
        """Let a sharer read something, and tell so on the ticket."""
        index = self._index(ask)
        fuser: Any = self._model.fusers[index]
        sharer = self._model.sharers[index].for_fuser(fuser)
        with refusing(job):
            handoff: Any = sharer.read(ask.messages, draft_tokens=ask.draft_tokens)
            if ask.precision is not None:
                handoff = handoff.to(ask.precision)
            size = handoff.held_bytes if isinstance(handoff, PartialHandoff) else handoff.nbytes
            job.ticket.push(Read(handoff, size, len(handoff.ids), sharer.name, index, handoff.precision))

    def _index(self, ask: AskToRead) -> int:
        private = self._model.private
        if not private:
            raise invalid(
                "this fuser is for prompts that both models read, so there is nothing to hand over. Serve a 'memory' "
                "fuser.",
                "messages",
            )
        index = private[0] if ask.sharer is None else ask.sharer
        if index not in private:
            raise invalid(f"sharer is {index}; expected one of {private}, which hand over private context.", "sharer")
        return index
