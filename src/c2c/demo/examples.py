"""Questions that the page offers, in the form that the shipped fusers were trained on, and documents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from c2c.data.formats import letter_form


@dataclass(frozen=True)
class Example:
    """A multiple-choice question: ``title`` is for its button, ``answer`` the index of the right choice."""

    title: str
    question: str
    choices: list[str]
    answer: int

    @property
    def prompt(self) -> str:
        """The question as in training."""
        return letter_form(self.question, self.choices, self.answer).messages[-1]["content"]

    @property
    def letter(self) -> str:
        """The letter of the right option."""
        return "ABCDEFGHIJ"[self.answer]


_FILE = json.loads(Path(__file__).with_name("examples.json").read_text(encoding="utf-8"))
# The shipped receiver alone says C to nearly all of these, so most have another right letter.
EXAMPLES = [Example(**question) for question in _FILE["questions"]]
DOCUMENT: str = _FILE["document"]
DOCUMENT_QUESTION: str = _FILE["document_question"]
OTHER_DOCUMENT: str = _FILE["other_document"]


def example_of(prompt: str) -> Example | None:
    """Return the example with this prompt; None for any other text."""
    return next((example for example in EXAMPLES if example.prompt == prompt.strip()), None)


def other_question(prompt: str) -> str:
    """Return another question, with another right letter where the prompt is an example."""
    own = example_of(prompt)
    return next(example.prompt for example in EXAMPLES if own is None or example.answer != own.answer)
