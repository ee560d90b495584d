"""Questions that the page offers, in the form that the shipped fusers were trained on, and documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from c2c.data.formats import letter_form


class Example(NamedTuple):
    """A multiple-choice question: title of its button, prompt as in training, and letter of the right option."""

    title: str
    prompt: str
    letter: str

    @classmethod
    def from_json(cls, title: str, question: str, choices: list[str], answer: int) -> Example:
        """Make an example of a question, its options, and the index of the right one."""
        row = letter_form(question, choices, answer)
        return cls(title, row.messages[-1]["content"], row.response.strip())


_FILE = json.loads(Path(__file__).with_name("examples.json").read_text(encoding="utf-8"))
# The shipped receiver alone says C to nearly all of these, so most have another right letter.
EXAMPLES = [Example.from_json(**question) for question in _FILE["questions"]]
LETTERS = {example.prompt: example.letter for example in EXAMPLES}
DOCUMENT: str = _FILE["document"]
DOCUMENT_QUESTION: str = _FILE["document_question"]
OTHER_DOCUMENT: str = _FILE["other_document"]


def other_question(prompt: str) -> str:
    """Return another question, with another right letter where the prompt is an example."""
    own = LETTERS.get(prompt.strip())
    return next(other for other, letter in LETTERS.items() if letter != own)
