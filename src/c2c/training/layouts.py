"""Questions of well-known data sets, brought to our keys: ``question``, ``choices``, ``answer`` (index)."""

from __future__ import annotations

from typing import Any

from c2c.training.config import LETTERS


def normalise(data: dict[str, Any]) -> dict[str, Any]:
    """A row with our keys, as far as its layout is known; what is not known stays as it is.

    Known are ``question_stem``; choices as a list, as ``{"text": [...], "label": [...]}`` (ARC, OpenBookQA), under
    ``options``, or in columns ``A``, ``B``, ... (C-Eval); answers as index, label or letter, also under ``answerKey``;
    and worked answers that end with ``#### 18`` (GSM8K).
    """
    choices, labels = _choices(data)
    found = dict(data)
    if "question" not in found and "question_stem" in found:
        found["question"] = found["question_stem"]
    answer = data.get("answer", data.get("answerKey"))
    if choices is not None:
        found["choices"] = choices
        found["answer"] = _index(answer, labels)
    elif isinstance(answer, str) and "####" in answer:
        found |= {"solution": answer, "answer": answer.rpartition("####")[2].strip()}
    return found


def _choices(data: dict[str, Any]) -> tuple[list[str] | None, list[str]]:
    """The options and their labels."""
    given = data.get("choices", data.get("options"))
    if isinstance(given, dict) and isinstance(given.get("text"), list):
        return list(given["text"]), [str(label) for label in given.get("label") or LETTERS[: len(given["text"])]]
    if isinstance(given, list):
        return given, list(LETTERS[: len(given)])
    columns = []
    for letter in LETTERS:
        if data.get(letter) is None:
            break
        columns.append(str(data[letter]))
    return (columns, list(LETTERS[: len(columns)])) if len(columns) > 1 else (None, [])


def _index(answer: Any, labels: list[str]) -> Any:
    """The index that a label or letter names; an index or anything else as it is."""
    return labels.index(answer.strip()) if isinstance(answer, str) and answer.strip() in labels else answer
