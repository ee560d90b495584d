"""Facts: pages on which the name in the question decides which of several facts is the answer."""

from __future__ import annotations

from itertools import islice

from c2c.data.config import DataSource
from c2c.data.formats import load_rows
from c2c.data.synthetic.facts import _KINDS, facts


def pages(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    return list(islice(facts(split, seed), count))


def test_one_sentence_of_several_has_the_answer():
    sizes, kinds = set(), set()
    for page in pages("train", 400):
        sentences = page["context"].removesuffix(".").split(". ")
        sizes.add(len(sentences))
        holding = [one for one in sentences if page["answer"].lower() in one.lower()]
        assert holding, page
        assert page["answer"] not in page["question"]
        kinds.add(" ".join(page["question"].split()[:3]))
    assert sizes == {2, 3, 4, 5}
    assert len(kinds) > len(_KINDS)


def test_most_pages_say_the_same_of_several():
    """Otherwise the kind of the question would give the answer away, and no name need be read."""
    numbers = [page for page in pages("train", 600) if page["answer"].isdigit() and len(page["answer"]) == 4]
    several = [page for page in numbers if sum(word.strip(".").isdigit() for word in page["context"].split()) > 1]
    assert len(several) > 0.7 * len(numbers) > 50


def test_what_is_asked_in_the_test_is_not_trained():
    asked = [{(page["question"], page["answer"]) for page in pages(split, 1500)} for split in ("train", "test")]
    assert not asked[0] & asked[1]
    assert pages("train", 9) == pages("train", 9) != pages("train", 9, seed=1)


def test_rows_for_private_context():
    source = DataSource(synthetic="facts", kind="private_question", limit=5)
    for row in load_rows([source], ".", 0)[0]:
        assert row.response in row.sharer_messages[-1]["content"]
        assert row.response not in row.messages[-1]["content"]
