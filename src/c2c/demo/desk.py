"""What the page's buttons do. Without Gradio, so that it can be read and tested by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from c2c.demo.choice import Choice, default_choice
from c2c.demo.errors import DemoError
from c2c.demo.example import OTHER_DOCUMENT, wrong_question
from c2c.demo.loader import Loader, Stage
from c2c.demo.markup import pane_html, remark_html, sentence, status_html
from c2c.demo.pane import RUN_ORDER, Pane, State, Way
from c2c.demo.question import Question
from c2c.demo.run import Runner
from c2c.demo.turns import Turns
from c2c.errors import C2CError

if TYPE_CHECKING:
    from c2c.model import C2CModel

_POLL = 0.5
_SETTLE = 0.35  # seconds; a slider on its way sends many values
NO_MEMORY = (
    "No fuser of private context was given, and none is in zoo/. Such a fuser is of the family 'memory'. Train one "
    "with `c2c train configs/private.yaml --data-dir DATA`, then start `c2c demo --fuser runs/private/best`."
)
_NO_SHARED = "No fuser that merges two caches was found. Start the demo with `c2c demo --fuser FOLDER`."

Changed = dict[Way, str]


@dataclass
class Board:
    """What the four panes of one tab show to one visitor.

    Attributes:
        panes: the panes.
        asked: the question that they answer; None before the first.
    """

    panes: dict[Way, Pane] = field(default_factory=lambda: {way: Pane(way) for way in Way})
    asked: Question | None = None


class Desk:
    """The demo behind its page.

    Args:
        choices: fusers to choose from.
        loader: where models come from.

    Attributes:
        choices: the fusers by label.
    """

    def __init__(self, choices: Sequence[Choice], loader: Loader) -> None:
        self.choices = {choice.label: choice for choice in choices}
        self._loader, self._turns = loader, Turns()
        self._runner = Runner(loader, self._turns)
        self._boards: dict[str, Board] = {}

    # -- fusers ------------------------------------------------------------------------------------------------------

    def labels(self, private: bool) -> list[str]:
        """Labels of the fusers for one tab."""
        return [label for label, choice in self.choices.items() if choice.private is private]

    def default(self, private: bool) -> str | None:
        """The label that a tab starts with."""
        choice = default_choice(list(self.choices.values()), private)
        return None if choice is None else choice.label

    def choice(self, label: str | None) -> Choice | None:
        """The fuser of a label."""
        return self.choices.get(label or "")

    def start(self, label: str | None) -> None:
        """Begin to load a fuser's pair in the background."""
        choice = self.choice(label)
        if choice is not None:
            self._loader.start(choice)

    def status(self, label: str | None, private: bool = False) -> str:
        """How far the pair is, as HTML."""
        choice = self.choice(label)
        if choice is None:
            return remark_html("waiting", NO_MEMORY if private else _NO_SHARED)
        return status_html(choice, self._loader.status(choice))

    def watch(self, label: str | None, private: bool = False) -> Iterator[str]:
        """Begin to load a fuser's pair, and tell how far it is until it is loaded or has failed."""
        choice = self.choice(label)
        self.start(label)
        while choice is not None and self._loader.status(choice).stage is Stage.LOADING:
            yield self.status(label, private)
            self._loader.pause(choice, _POLL)
        yield self.status(label, private)

    # -- answers -----------------------------------------------------------------------------------------------------

    def board(self, tab: str, label: str | None, private: bool = False) -> Changed:
        """All panes of a tab as they are."""
        return {way: pane_html(pane, self.choice(label), private) for way, pane in self._board(tab).panes.items()}

    def ask(self, tab: str, label: str | None, question: Question) -> Iterator[Changed]:
        """Run all panes.

        Args:
            tab: whose panes: one string per visitor and tab.
            label: the fuser.
            question: what is asked.

        Yields:
            The panes that changed, as HTML.
        """
        board = self._boards[tab] = Board(asked=question)
        yield from self._run(tab, board, label, question, RUN_ORDER)

    def again(self, tab: str, label: str | None, *, blend: float, misled: bool) -> Iterator[Changed]:
        """Run cache-to-cache once more with one thing changed, and what is not done; nothing before a first run."""
        board = self._board(tab)
        if board.asked is None:
            return
        other = _other(board.asked) if misled else None
        question = board.asked = replace(board.asked, blend=blend, misled=other)
        fused = board.panes[Way.C2C]
        before = fused.text if fused.state is State.DONE else fused.before
        open_ways = [way for way in RUN_ORDER if way is Way.C2C or board.panes[way].state is not State.DONE]
        ways = sorted(open_ways, key=lambda way: way is not Way.C2C)
        yield from self._run(tab, board, label, question, ways, before, _SETTLE)

    def stop(self, tab: str) -> None:
        """End the run of a tab."""
        self._turns.stop(tab)

    def forget(self, tab: str) -> None:
        """The visitor has left."""
        self._turns.forget(tab)
        self._boards.pop(tab, None)

    def _board(self, tab: str) -> Board:
        return self._boards.setdefault(tab, Board())

    def _run(
        self,
        tab: str,
        board: Board,
        label: str | None,
        question: Question,
        ways: Sequence[Way],
        before: str | None = None,
        settle: float = 0.0,
    ) -> Iterator[Changed]:
        choice = self.choice(label)
        for pane in self._runner.run(tab, choice, question, ways, before, settle):
            board.panes[pane.way] = pane
            yield {pane.way: pane_html(pane, choice, question.document is not None)}

    # -- pictures ----------------------------------------------------------------------------------------------------

    def pictures(self, tab: str, label: str | None, question: Question) -> Iterator[tuple[str, str]]:
        """Draw what crosses while the pair reads a prompt.

        Yields:
            A remark on how far it is, and the pictures, both as HTML.
        """
        turn, drawn = self._turns.begin(tab), ""
        yield remark_html("loading", "Reading the prompt and drawing \u2026"), drawn
        try:
            choice = self._choice_for_pictures(label, question)
            model = None
            self._loader.start(choice)
            while model is None and not turn.over:
                model = self._loader.get(choice, _POLL)
            if model is None or not self._turns.take_models(turn):
                return
            try:
                drawn = _draw(model, question)
            finally:
                self._turns.give_models_back()
        except C2CError as error:
            yield remark_html("failed", sentence(error)), ""
        else:
            yield remark_html("ready", f"Of the prompt in the first tab, {len(question.prompt)} letters."), drawn

    def _choice_for_pictures(self, label: str | None, question: Question) -> Choice:
        choice = self.choice(label)
        if choice is None:
            raise DemoError(_NO_SHARED)
        if not question.prompt.strip():
            raise DemoError("there is no prompt. Write one in the first tab, or take an example.")
        from c2c.analysis.results import check_drawing

        check_drawing()
        return choice


def question_for(question: Question, misled: bool) -> Question:
    """The question, with another one (or another document) for the sharer where it is to be misled."""
    return replace(question, misled=_other(question) if misled else None)


def _other(question: Question) -> str:
    return wrong_question(question.prompt) if question.document is None else OTHER_DOCUMENT


def _draw(model: C2CModel, question: Question) -> str:
    from c2c.analysis.capture import capture_prompt
    from c2c.analysis.plots import html_figures
    from c2c.analysis.prompt_plots import prompt_plots
    from c2c.prompting import RenderOptions

    capture = capture_prompt(model, question.messages, RenderOptions(answer_prefix=question.prefix))
    return f'<div class="c2c-pictures">{html_figures(prompt_plots(capture))}</div>'
