"""Halves: questions that need what the sharer has read and what the receiver alone knows."""

from __future__ import annotations

import re

from c2c.evaluation.private import Reader, _passage
from c2c.training.config import DataSource
from c2c.training.rows import Row, load_rows


def rows(name: str, limit: int = 60, seed: int = 0) -> list[Row]:
    return load_rows([DataSource(synthetic=name, kind="private_question", limit=limit)], ".", seed)[0]


def test_each_side_knows_a_half():
    for row in rows("halves"):
        asked, passage = row.messages[-1]["content"], row.sharer_messages[-1]["content"]
        owner, colour = re.match(r"(\w+) has the (\w+) \w+\.", asked).groups()
        assert row.known == asked.split(". ")[0] + "."
        assert not re.search(r"\d", asked), "the receiver has read no number"
        assert owner not in passage, "the sharer does not know whose"
        assert owner in row.question
        assert colour not in row.question, "the bare question does not tell which"
        numbers = dict(re.findall(r"The (\w+) \w+ has the number (\d+)\.", passage))
        assert len(numbers) == 3
        assert numbers[colour] == row.response


def test_answers_of_the_test_are_not_trained():
    assert not {row.response for row in rows("halves", 400)} & {row.response for row in rows("halves_test", 100)}
    assert rows("halves") == rows("halves")
    assert rows("halves") != rows("halves", seed=1)


def test_who_reads_what_in_an_evaluation():
    """The receiver alone reads its half, the sharer alone the other, the ceiling both."""
    [row] = rows("halves", 1)

    def read(given) -> str:
        return "\n".join(turn["content"] for turn in Reader(None, given)._conversation(row))

    givens = ("prompt", "sharer", "passage")
    knows = {given: (row.known in read(given), _passage(row) in read(given)) for given in givens}
    assert knows == {"prompt": (True, False), "sharer": (False, True), "passage": (True, True)}
    assert all(row.question in read(given) for given in givens)
