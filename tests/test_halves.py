"""Halves: questions that need what the sharer has read and what the receiver alone knows."""

from __future__ import annotations

import re

from c2c.data.config import DataSource
from c2c.data.formats import Row, load_rows
from c2c.evaluation.private import Reader, _passage


def rows(name: str, limit: int = 60, seed: int = 0) -> list[Row]:
    return load_rows([DataSource(synthetic=name, kind="private_question", limit=limit)], ".", seed)[0]


def test_each_side_knows_a_half():
    kinds = set()
    for row in rows("halves"):
        asked, passage = row.messages[-1]["content"], row.sharer_messages[-1]["content"]
        mine, theirs = row.response.split(", ")
        assert asked == f"{row.known} {row.question}"
        assert mine in row.known
        assert theirs in passage
        assert theirs not in asked, "the receiver has not read the sharer's half"
        assert mine not in passage, "nor the sharer the receiver's"
        assert not re.search(r"\d", row.question)
        kinds.add(row.question.split(":")[0].split(" for ")[0])
    assert len(kinds) == 3


def secrets(found: list[Row]) -> set[str]:
    return {row.response.partition(", ")[2] for row in found}


def test_what_the_sharer_reads_in_the_test_is_not_trained():
    assert not secrets(rows("halves", 400)) & secrets(rows("halves_test", 100))
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
