"""Panes: the answers of four systems to one question, and what a visitor's tab shows of them."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from c2c.demo.examples import OTHER_DOCUMENT, example_of, other_question
from c2c.demo.fusers import FuserChoice
from c2c.demo.models import ModelCache
from c2c.errors import C2CError, PromptError
from c2c.messages import Conversation

if TYPE_CHECKING:
    from c2c.generation import GenerationResult
    from c2c.model import C2CModel
    from c2c.systems import System

SYSTEMS = ("receiver", "sharer", "text", "c2c")  # in the order of the panes
RUN_ORDER = ("receiver", "c2c", "sharer", "text")  # quickest first, so that there is something to read meanwhile
State = Literal["idle", "waiting", "running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Question:
    """One prompt with its options.

    Attributes:
        prompt: the user's message.
        system: the system message, empty for none.
        answer_prefix: text that the answer continues.
        max_new_tokens: longest answer.
        message_tokens: longest text that is passed in text-to-text.
        blend: how much of what the fuser adds is taken, 0 to 1.
        document: what the sharer alone reads; None where both read the prompt.
        wrong_message: whether the sharer reads another question (or document) for cache-to-cache.
    """

    prompt: str
    system: str = ""
    answer_prefix: str = ""
    max_new_tokens: int = 16
    message_tokens: int = 64
    blend: float = 1.0
    document: str | None = None
    wrong_message: bool = False

    @property
    def messages(self) -> Conversation:
        """The conversation that is answered."""
        return self._conversation(self.prompt)

    @property
    def other(self) -> str | None:
        """Text that the sharer reads instead; None where it reads the right one."""
        if not self.wrong_message:
            return None
        return other_question(self.prompt) if self.document is None else OTHER_DOCUMENT

    @property
    def other_messages(self) -> Conversation | str | None:
        """What the sharer reads instead, as :class:`~c2c.systems.SystemOptions` takes it."""
        return self.other if self.other is None or self.document is not None else self._conversation(self.other)

    def check(self) -> None:
        """Refuse a question without a prompt, or without its document.

        Raises:
            PromptError: says what to do.
        """
        if not self.prompt.strip():
            raise PromptError("there is no prompt. Write one above, or take an example.")
        if self.document is not None and not self.document.strip():
            raise PromptError("there is no document. Paste or upload a text that only the sharer shall read.")

    def _conversation(self, text: str) -> Conversation:
        system = [{"role": "system", "content": self.system.strip()}] if self.system.strip() else []
        return [*system, {"role": "user", "content": text}]


@dataclass(frozen=True)
class Pane:
    """The answer of one system.

    Attributes:
        name: of the system.
        state: of the answer.
        question: that is answered; None before the first.
        text: the answer so far.
        seconds: since the system began, while it runs.
        result: the whole answer, once it is done.
        previous: the answer that stood here before one thing was changed.
        error: why there is none.
    """

    name: str
    state: State = "idle"
    question: Question | None = None
    text: str = ""
    seconds: float | None = None
    result: GenerationResult | None = None
    previous: str | None = None
    error: str = ""

    @property
    def other(self) -> str | None:
        """What the sharer read in place of the prompt or document, for this answer."""
        return self.question.other if self.question is not None and self.name == "c2c" else None

    @property
    def letter(self) -> str | None:
        """The letter that the answer names; None where it names none."""
        found = re.match(r"([A-J])(?![A-Za-z])", self.text.strip())
        return found[1] if found else None

    @property
    def right_letter(self) -> str | None:
        """The letter of the right answer; None where it is not known."""
        example = example_of(self.question.prompt) if self.question is not None else None
        return None if example is None else example.letter

    @property
    def other_letter(self) -> str | None:
        """The letter that is right for what the sharer read in place of the prompt; None where it is not known."""
        example = example_of(self.other or "")
        return None if example is None else example.letter


@dataclass
class Session:
    """The panes of one tab of one visitor."""

    panes: dict[str, Pane] = field(default_factory=lambda: {name: Pane(name) for name in SYSTEMS})
    question: Question | None = None

    def ask(self, models: ModelCache, choice: FuserChoice | None, question: Question) -> Generator[Pane]:
        """Answer a question with all systems, one after the other, so that none takes time from another.

        Yields:
            Panes as they change. Errors are panes as well.
        """
        yield from self._answer(models, choice, question, RUN_ORDER)

    def ask_again(
        self, models: ModelCache, choice: FuserChoice | None, *, blend: float, wrong_message: bool
    ) -> Generator[Pane]:
        """Answer the last question with cache-to-cache once more with one thing changed, and finish other panes.

        Nothing is done before a first question.
        """
        if self.question is None:
            return
        question = replace(self.question, blend=blend, wrong_message=wrong_message)
        fused = self.panes["c2c"]
        previous = fused.text if fused.state == "done" else fused.previous
        unfinished = [name for name in RUN_ORDER if name != "c2c" and self.panes[name].state != "done"]
        yield from self._answer(models, choice, question, ["c2c", *unfinished], previous)

    def stop(self) -> None:
        """Mark what is not done as stopped."""
        for name, pane in self.panes.items():
            if pane.state in ("waiting", "running"):
                self.panes[name] = replace(pane, state="stopped")

    def clear(self) -> None:
        """Empty all panes."""
        self.panes, self.question = {name: Pane(name) for name in SYSTEMS}, None

    def _answer(
        self,
        models: ModelCache,
        choice: FuserChoice | None,
        question: Question,
        names: Sequence[str],
        previous: str | None = None,
    ) -> Generator[Pane]:
        self.question = question
        panes = self.panes = dict(self.panes)  # a cancelled run that has not ended yet goes on with its own
        for name in names:
            panes[name] = Pane(name, "waiting", question, previous=previous if name == "c2c" else None)
            yield panes[name]
        try:
            if choice is None:
                raise PromptError("no fuser is chosen. Start the demo with --fuser FOLDER.")
            question.check()
            with models.use(choice) as model:
                for name in names:
                    for pane in answer(model, panes[name]):
                        panes[name] = pane
                        yield pane
        except C2CError as error:  # no system can answer
            for name in names:
                panes[name] = replace(panes[name], state="failed", error=str(error))
                yield panes[name]


def answer(model: C2CModel, pane: Pane) -> Generator[Pane]:
    """Answer the question of a pane with its system. Closing the iterator stops the model.

    Yields:
        The pane with more and more text, then done or failed.
    """
    from c2c.prompting import RenderOptions

    question, began = pane.question or Question(""), time.perf_counter()
    pane = replace(pane, state="running", seconds=0.0)
    yield pane
    try:
        stream = _system(model, pane.name, question).stream(
            question.messages,
            question.document,
            options=RenderOptions(answer_prefix=question.answer_prefix),
            max_new_tokens=question.max_new_tokens,
            do_sample=False,
        )
        with stream:
            for piece in stream:
                pane = replace(pane, text=pane.text + piece, seconds=time.perf_counter() - began)
                yield pane
        result = stream.result
        yield replace(pane, state="done", result=result, text=result.text if result is not None else pane.text)
    except C2CError as error:
        yield replace(pane, state="failed", error=str(error))
    except Exception as error:  # whatever it is, the page must show it and go on
        yield replace(pane, state="failed", error=f"{type(error).__name__}: {error}")


def _system(model: C2CModel, name: str, question: Question) -> System:
    from c2c.systems import SystemOptions, make_system

    options = SystemOptions(message_tokens=question.message_tokens, blend=question.blend, other=question.other_messages)
    return make_system("deranged" if name == "c2c" and question.wrong_message else name, model, options)
