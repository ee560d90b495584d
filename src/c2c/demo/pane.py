"""One pane of the page: how one way of answering is getting on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Way(StrEnum):
    """Ways to answer, in the order of the panes."""

    RECEIVER = "receiver"
    SHARER = "sharer"
    TEXT = "text"
    C2C = "c2c"


# Quickest first, so that there is something to read while the slow ones run.
RUN_ORDER = (Way.RECEIVER, Way.C2C, Way.SHARER, Way.TEXT)


class State(StrEnum):
    """What a pane is doing."""

    IDLE = "idle"
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class Pane:
    """What a pane shows.

    Attributes:
        way: whose pane.
        state: what it is doing.
        prefix: text that the answer continues.
        text: the answer so far.
        message: the text that was passed, for text-to-text; None where none is.
        misled: what the sharer read in place of the prompt; None where it read the prompt.
        before: the answer that stood here before one thing was changed.
        right: the letter of the right answer, where it is known.
        misled_right: the letter that is right for what the sharer read in place of the prompt, where it is known.
        note: a remark.
        error: what went wrong, in plain words.
        first: seconds to the first token of the answer.
        total: seconds in all; while it runs, so far.
        read: tokens of the prompt that the answering model read.
        written: tokens of the answer.
        message_written: tokens of the passed text.
        crossed: bytes that went from the sharer to the receiver; None where nothing could.
    """

    way: Way
    state: State = State.IDLE
    prefix: str = ""
    text: str = ""
    message: str | None = None
    misled: str | None = None
    before: str | None = None
    right: str | None = None
    misled_right: str | None = None
    note: str = ""
    error: str = ""
    first: float | None = None
    total: float | None = None
    read: int | None = None
    written: int | None = None
    message_written: int | None = None
    crossed: int | None = None

    @property
    def letter(self) -> str | None:
        """The letter that a finished answer names; None where it names none."""
        found = re.match(r"([A-J])(?![A-Za-z])", self.text.strip())
        return found[1] if found and self.state is State.DONE else None
