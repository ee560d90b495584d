"""Questions that the page offers, in the form that the shipped fusers were trained on, and documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from c2c.data.formats import Row, letter_form


@dataclass(frozen=True)
class Example:
    """A multiple-choice question.

    Attributes:
        title: a few words for its button.
        question: the question.
        choices: the options.
        answer: index of the right one.
    """

    title: str
    question: str
    choices: Sequence[str]
    answer: int

    @property
    def prompt(self) -> str:
        """The question as in training."""
        return self._row.messages[-1]["content"]

    @property
    def letter(self) -> str:
        """The letter of the right option."""
        return self._row.response.strip()

    @property
    def _row(self) -> Row:
        return letter_form(self.question, self.choices, self.answer)


# The shipped receiver alone says C to nearly all of these, so most have another right letter.
EXAMPLES = (
    Example(
        "A plant in the dark",
        "Which of these would help a plant in a dark cupboard to grow?",
        ("a louder radio", "a lamp", "a heavier pot", "a locked door"),
        1,
    ),
    Example(
        "Chalk and vinegar",
        "Vinegar is dropped on chalk and bubbles rise. What has happened?",
        ("a new gas was made", "the chalk has frozen", "the vinegar has boiled", "the chalk has melted"),
        0,
    ),
    Example(
        "The moon",
        "Why can people on Earth see the moon at night?",
        ("it burns gas", "it is made of ice", "it is hotter than the sun", "it reflects the light of the sun"),
        3,
    ),
    Example(
        "A metal spoon",
        "A metal spoon stands in hot soup, and its handle becomes hot as well. Metal is",
        ("a good conductor of heat", "a magnet", "a source of light", "a liquid"),
        0,
    ),
    Example(
        "Ice in a drink",
        "Ice is put into a warm drink and disappears after a while. What has it done?",
        ("frozen", "melted", "burned", "rusted"),
        1,
    ),
    Example(
        "Day and night",
        "What makes day and night on Earth?",
        ("clouds cover the sun", "the moon hides the sun", "the sun goes out", "the Earth turns"),
        3,
    ),
    Example(
        "Wet road",
        "Why does a bicycle need more room to stop on a wet road than on a dry one?",
        ("the wheels get lighter", "the brakes get warmer", "there is less friction", "the air is thicker"),
        2,
    ),
)

DOCUMENT = (
    "Notes from the harbour office. The key to the boat house hangs behind the clock. The ferry to the island leaves "
    "at 7:40 and costs 12 crowns. Anna Lindqvist has the other key and lives at number 31."
)
DOCUMENT_QUESTION = "Where does the key to the boat house hang?"
OTHER_DOCUMENT = (
    "Minutes of the garden club. The spade was lent to Mr Okoro until Friday. Seeds are kept in the blue tin under the "
    "stairs. The next meeting is on the 14th at the library."
)


def example_of(prompt: str) -> Example | None:
    """Return the example with this prompt; None for any other text."""
    return next((example for example in EXAMPLES if example.prompt == prompt.strip()), None)


def other_question(prompt: str) -> str:
    """Return another question, with another right letter where the prompt is an example."""
    own = example_of(prompt)
    return next(example.prompt for example in EXAMPLES if own is None or example.answer != own.answer)
