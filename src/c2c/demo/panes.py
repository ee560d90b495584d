"""Panes that show the answers of four systems to a question, and the examples that the page offers.

Everything that a model or a user wrote is escaped.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import yaml
from jinja2 import Environment

from c2c.cli.output import human_bytes
from c2c.data.formats import letter_form
from c2c.demo.fusers import FuserChoice
from c2c.errors import PromptError
from c2c.messages import Conversation

if TYPE_CHECKING:
    from c2c.generation import GenerationResult

SYSTEMS = {"receiver": "Receiver", "sharer": "Sharer", "text": "Text-to-text", "c2c": "Cache-to-cache"}  # as shown
State = Literal["idle", "waiting", "running", "done", "stopped", "failed"]
_FOLDER = Path(__file__).parent
TEXTS: dict[str, str] = yaml.safe_load((_FOLDER / "texts.yaml").read_text(encoding="utf-8"))
_EXAMPLES = json.loads((_FOLDER / "examples.json").read_text(encoding="utf-8"))
_TEMPLATE = Environment(autoescape=True, trim_blocks=True).from_string((_FOLDER / "pane.html").read_text("utf-8"))
DOCUMENT: str = _EXAMPLES["document"]
DOCUMENT_QUESTION: str = _EXAMPLES["document_question"]
OTHER_DOCUMENT: str = _EXAMPLES["other_document"]


class Example(NamedTuple):
    """A multiple-choice question: title of its button, prompt as in training, and letter of the right option."""

    title: str
    prompt: str
    letter: str


def _example(title: str, question: str, choices: list[str], answer: int) -> Example:
    row = letter_form(question, choices, answer)
    return Example(title, row.messages[-1]["content"], row.response.strip())


# The shipped receiver alone says C to nearly all of these, so most have another right letter.
EXAMPLES = [_example(**question) for question in _EXAMPLES["questions"]]
LETTERS = {example.prompt: example.letter for example in EXAMPLES}


def other_question(prompt: str) -> str:
    """Return another question, with another right letter where the prompt is an example."""
    own = LETTERS.get(prompt.strip())
    return next(other for other, letter in LETTERS.items() if letter != own)


@dataclass(frozen=True)
class Question:
    """One prompt with its options.

    Attributes:
        message_tokens: longest text that is passed in text-to-text.
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
        """Raise PromptError where there is no prompt, or no document."""
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
        text: the answer so far.
        seconds: since the system began, while it runs.
        result: the whole answer, once it is done.
        previous: the answer that stood here before one thing was changed.
        error: why there is none.
    """

    name: str
    state: State = "idle"
    question: Question = field(default_factory=lambda: Question(""))
    text: str = ""
    seconds: float | None = None
    result: GenerationResult | None = None
    previous: str | None = None
    error: str = ""

    @property
    def other(self) -> str | None:
        """What the sharer read in place of the prompt or document, for this answer."""
        return self.question.other if self.name == "c2c" else None

    @property
    def letter(self) -> str | None:
        """The letter that the answer names; None where it names none."""
        found = re.match(r"([A-J])(?![A-Za-z])", self.text.strip())
        return found[1] if found else None


def pane_html(pane: Pane, choice: FuserChoice | None) -> str:
    """Format one pane."""
    receiver, sharer = choice.model_names if choice else ("receiver", "sharer")
    private = choice is not None and choice.private
    models = {
        "receiver": f"{receiver} alone{', without the document' if private else ''}",
        "sharer": f"{sharer} alone{', with the document' if private else ''}",
        "text": f"{sharer} writes, {receiver} reads and answers",
        "c2c": f"{receiver} answers from its own cache and that of {sharer}",
    }
    return _TEMPLATE.render(
        pane=pane,
        title=SYSTEMS[pane.name],
        who=models[pane.name],
        right_letter=LETTERS.get(pane.question.prompt.strip()),
        other_letter=LETTERS.get(pane.other or ""),
        figures=_figures(pane),
    )


def status_html(state: str, text: str) -> str:
    """Format a line of the page, with commands in backticks; ``state`` is waiting, loading, ready or failed."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text[:1].upper() + text[1:]))
    return f'<p class="c2c-status" data-status="{state}" role="status">{text}</p>'


def _figures(pane: Pane) -> dict[str, str]:
    """Format seconds, tokens and bytes; empty before they are known."""
    figures = dict.fromkeys(("first token", "total", "tokens read", "tokens written", "crossed"), "")
    if pane.name in ("receiver", "sharer"):
        figures["crossed"] = "nothing"
    if pane.seconds is not None:
        figures["total"] = f"{pane.seconds:.2f} s"
    if (result := pane.result) is not None:
        figures["first token"] = f"{result.seconds_to_first_token:.2f} s"
        figures["total"] = f"{result.seconds_total:.2f} s"
        figures["tokens read"] = f"{result.prompt_tokens:,}"
        figures["tokens written"] = f"{result.new_tokens:,}"
        if result.message is not None:
            figures["tokens written"] = f"{result.message.new_tokens:,} + {result.new_tokens:,}"
            figures["crossed"] = f"{human_bytes(len(result.message.text.encode()))} of text"
        elif result.report is not None:
            figures["crossed"] = f"{human_bytes(result.report.sharer_bytes)} of cache"
    return figures
