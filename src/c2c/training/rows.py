"""Training rows: JSONL files to prompts with their responses."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from c2c.messages import Conversation
from c2c.training.config import ConfigError, DataSource

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Row:
    """One prompt with the response to learn.

    Attributes:
        id: the row's id.
        messages: the conversation.
        answer_prefix: text after the generation prompt, which the response continues.
        response: the text to learn.
        choices: the responses to choose from, for multiple choice; else empty.
        answer: index of the right choice.
    """

    id: str
    messages: Conversation
    answer_prefix: str
    response: str
    choices: tuple[str, ...] = ()
    answer: int = -1


def multiple_choice(data: dict[str, Any]) -> Row:
    """``question``, ``choices``, ``answer`` (index): the response is the letter."""
    choices = data["choices"]
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    text = (
        "Answer the following multiple choice question with the letter of the correct option.\n\n"
        f"Question: {data['question']}\n{lines}"
    )
    letters = tuple(f" {letter}" for letter in LETTERS[: len(choices)])
    return Row(str(data["id"]), _turn(text), "The answer is", letters[data["answer"]], letters, int(data["answer"]))


def context_question(data: dict[str, Any]) -> Row:
    """``context``, ``question``, ``answer``: the response is the answer."""
    text = f"Answer the question from the passage.\n\nPassage: {data['context']}\n\nQuestion: {data['question']}"
    answer = data.get("answer") or data["answers"][0]
    return Row(str(data["id"]), _turn(text), "", str(answer))


def instruction(data: dict[str, Any]) -> Row:
    """``instruction``, ``input``, ``output``."""
    text = "\n\n".join(part for part in (data["instruction"], data.get("input", "")) if part)
    return Row(str(data["id"]), _turn(text), "", str(data["output"]))


KINDS: dict[str, Callable[[dict[str, Any]], Row]] = {
    "multiple_choice": multiple_choice,
    "context_question": context_question,
    "instruction": instruction,
}


def load_rows(
    sources: Sequence[DataSource], data_dir: Path, seed: int, exclude: frozenset[str] = frozenset()
) -> tuple[list[Row], Counter[str]]:
    """Read, filter, draw and mix rows.

    Args:
        sources: the files.
        data_dir: where their paths start.
        seed: of the draw and the order.
        exclude: normalised questions that must not be used, see :func:`questions`.

    Returns:
        The rows, and how many were dropped, by reason.
    """
    dropped: Counter[str] = Counter()
    rows: list[Row] = []
    for source in sources:
        if source.kind not in KINDS:
            raise ConfigError(f"unknown kind of rows {source.kind!r}. Known: {', '.join(KINDS)}.")
        kept = []
        for data in read_jsonl(data_dir / source.path):
            if _normalise(str(data.get("question") or data.get("instruction") or "")) in exclude:
                dropped["question is in an excluded file"] += 1
            else:
                kept.append(data)
        random.Random(seed).shuffle(kept)
        rows += [KINDS[source.kind](data) for data in kept[: source.limit]]
    random.Random(seed + 1).shuffle(rows)
    return rows, dropped


def questions(files: Sequence[Path]) -> frozenset[str]:
    """The questions of these files, normalised, to be kept out of training."""
    return frozenset(_normalise(str(data.get("question", ""))) for file in files for data in read_jsonl(file))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file.

    Raises:
        ConfigError: missing, or a line that is not a JSON object; names the line.
    """
    if not path.exists():
        raise ConfigError(f"no such data file: {path}. Set data_dir to the folder that the paths start from.")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    data = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigError(f"{path}, line {number}: not JSON: {error}") from error
                if not isinstance(data, dict):
                    raise ConfigError(f"{path}, line {number}: expected an object, got {type(data).__name__}.")
                yield data


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


def _turn(text: str) -> Conversation:
    return [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": text}]
