"""One run of the panes, from a question to four answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from c2c.demo.choice import Choice
from c2c.demo.errors import DemoError
from c2c.demo.example import example_of
from c2c.demo.loader import Loader
from c2c.demo.pane import RUN_ORDER, Pane, State, Way
from c2c.demo.question import Question
from c2c.demo.turns import Turn, Turns
from c2c.errors import C2CError

if TYPE_CHECKING:
    from c2c.model import C2CModel

_POLL = 0.25
_OPEN = (State.IDLE, State.WAITING, State.RUNNING)


class Runner:
    """Runs panes one after the other, so that none takes time from another.

    Args:
        loader: where the models come from.
        turns: whose turn it is.
    """

    def __init__(self, loader: Loader, turns: Turns) -> None:
        self._loader, self._turns = loader, turns

    def run(
        self,
        visitor: str,
        choice: Choice | None,
        question: Question,
        ways: Sequence[Way] = RUN_ORDER,
        before: str | None = None,
        settle: float = 0.0,
    ) -> Iterator[Pane]:
        """Answer a question.

        Args:
            visitor: who asks; an earlier run of the same visitor ends.
            choice: the fuser, None where there is none.
            question: what is asked.
            ways: in the order of the run.
            before: the answer that the cache-to-cache pane had until one thing was changed.
            settle: first wait so many seconds whether the visitor changes the question once more.

        Yields:
            Panes as they change, first all of them. Errors are panes as well.
        """
        turn = self._turns.begin(visitor)
        time.sleep(settle)
        if turn.over:
            return
        example = example_of(question.prompt) if question.document is None else None
        panes = {way: Pane(way, State.WAITING, right=example.letter if example else None) for way in ways}
        if Way.C2C in panes:
            other = example_of(question.misled or "")
            panes[Way.C2C] = replace(
                panes[Way.C2C],
                before=before,
                misled=question.misled,
                misled_right=other.letter if other else None,
            )
        yield from panes.values()
        try:
            for pane in self._answers(turn, _checked(choice, question), question, panes):
                panes[pane.way] = pane
                yield pane
        except DemoError as error:  # no pane can run
            yield from (_failed(pane, error) for pane in panes.values())
        if turn.stopped:
            yield from (replace(pane, state=State.STOPPED) for pane in panes.values() if pane.state in _OPEN)

    def _answers(self, turn: Turn, choice: Choice, question: Question, panes: dict[Way, Pane]) -> Iterator[Pane]:
        self._loader.start(choice)
        model = None
        while model is None and not turn.over:
            model = self._loader.get(choice, _POLL)
        if model is None or not self._turns.take_models(turn):
            return
        try:
            for pane in list(panes.values()):
                if not turn.over:
                    yield from _one(turn, model, question, pane)
        finally:
            self._turns.give_models_back()


def _one(turn: Turn, model: C2CModel, question: Question, pane: Pane) -> Iterator[Pane]:
    """One pane until it is done, or its turn is over. What goes wrong here is no matter of the other panes."""
    from c2c.demo.ways import answer  # the models are loaded, so torch is here

    try:
        for step in answer(pane.way, model, question, pane):
            yield step
            if turn.over:
                return
    except C2CError as error:
        yield _failed(pane, error)
    except Exception as unforeseen:  # whatever it is, the page must say it and go on
        yield _failed(pane, f"{type(unforeseen).__name__}: {unforeseen}")


def _failed(pane: Pane, error: object) -> Pane:
    return replace(pane, state=State.FAILED, error=str(error))


def _checked(choice: Choice | None, question: Question) -> Choice:
    """The fuser, where the question can be put to it.

    Raises:
        DemoError: no fuser, no prompt, or no document.
    """
    if choice is None:
        raise DemoError("no fuser is chosen. Start the demo with --fuser FOLDER.")
    if not question.prompt.strip():
        raise DemoError("there is no prompt. Write one above, or take an example.")
    if question.document is not None and not question.document.strip():
        raise DemoError("there is no document. Paste or upload a text that only the sharer shall read.")
    if choice.private and question.document is None:
        raise DemoError(
            f"{choice.name} is a fuser of private context: what crosses is a document that only the sharer reads. Use "
            "the tab 'Private context', or choose another fuser here."
        )
    if not choice.private and question.document is not None:
        raise DemoError(
            f"{choice.name} merges what both models have read, and can't hand over a document. Private context needs a "
            "fuser of the family 'memory'."
        )
    return choice
