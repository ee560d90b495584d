"""Rows: questions, instructions and conversations from files or data sets, as prompts with their responses."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from c2c.config import ConfigError
from c2c.data.config import LETTERS, DataSource
from c2c.data.synthetic.facts import facts
from c2c.data.synthetic.halves import halves
from c2c.data.synthetic.relay import relay
from c2c.data.synthetic.skeleton import skeleton
from c2c.errors import did_you_mean
from c2c.messages import Conversation
from c2c.utils import install_command

SYSTEM = "You are a helpful assistant."

# The published benchmark prompt (Cache-to-Cache, ICLR 2026, appendix, Text 1).
PUBLISHED = """Accurately answer the following question:

{question}

Choices:
{choices}

Instructions:
- Carefully read the question and all options.
- Select the single most correct answer.
- Respond ONLY in the following format: "The correct answer is A/B/C/D".
- Do not include any explanations, additional text, or punctuation besides the answer.

The correct answer is"""


@dataclass(frozen=True)
class Row:
    """One prompt with the response to learn or to compare with.

    Attributes:
        id: the row's id.
        messages: the conversation.
        answer_prefix: text after the generation prompt, which the response continues.
        response: the text to learn.
        choices: what follows ``lead`` for each option, for multiple choice; else empty.
        answer: index of the right choice, -1 without choices.
        lead: the part of the response before the choice.
        ends: whether the end token belongs to the response.
        source: where the row came from.
        sharer_messages: what the sharer alone reads; None where both read ``messages``.
        question: the bare question, where there is one.
        references: answers that count as right, where the answer is open.
        known: what the receiver alone knows beside the question, in private context.
        draft: at most so many tokens of an answer that the sharer, asked too, writes and hands over; 0 for none.
    """

    id: str
    messages: Conversation
    answer_prefix: str
    response: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    lead: str = ""
    ends: bool = True
    source: str = ""
    sharer_messages: Conversation | None = None
    question: str = ""
    references: tuple[str, ...] = ()
    known: str = ""
    draft: int = 0


# -- multiple choice -------------------------------------------------------------------------------------------------


def letter_form(question: str, choices: Sequence[str], answer: int) -> Row:
    """Answered by the letter that follows "The answer is": the form in which fusers are compared."""
    text = (
        "Answer the following multiple choice question with the letter of the correct option.\n\n"
        f"Question: {question}\n{_lines(choices)}"
    )
    letters = _letters(choices)
    return Row("", _turn(text), "The answer is", letters[answer], letters, answer)


def published_form(question: str, choices: Sequence[str], answer: int) -> Row:
    """The published prompt, answered by a sentence: "The correct answer is C"."""
    text = PUBLISHED.format(question=question, choices=_lines(choices))
    return _sentence(text, choices, answer, "")


def sentence_form(question: str, choices: Sequence[str], answer: int) -> Row:
    """Answered by a sentence with the letter and the option's text."""
    text = (
        "Answer the following multiple choice question. Give the letter and the text of the correct option.\n\n"
        f"Question: {question}\n{_lines(choices)}"
    )
    return _sentence(text, choices, answer, f". {choices[answer]}")


FORMS: dict[str, Callable[[str, Sequence[str], int], Row]] = {
    "letter": letter_form,
    "published": published_form,
    "sentence": sentence_form,
}


def multiple_choice(data: dict[str, Any], source: DataSource) -> Row:
    """``question``, ``choices``, ``answer`` (index)."""
    choices, answer = data.get("choices"), data.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ConfigError(f"'choices' is {choices!r}; expected a list of 2 to {len(LETTERS)} texts.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ConfigError(f"'answer' is {answer!r}; expected the index of a choice, 0 to {len(choices) - 1}.")
    return FORMS[source.form](_text(data, "question"), [str(choice) for choice in choices], answer)


def vary_options(rows: list[dict[str, Any]], source: DataSource, seed: int) -> list[dict[str, Any]]:
    """Give questions another number of options in a new order: a share of them 2 to 8, or all of them ``options``.

    Missing options are taken from other questions of the same file. A fuser that has only seen four letters has
    little reason to pass on a fifth.
    """
    draw = random.Random(seed)
    bounds = source.option_range
    if bounds is not None:
        return [_vary(data, rows, draw, bounds) for data in rows]
    return [_vary(data, rows, draw, (2, 8)) if draw.random() < source.vary_options else data for data in rows]


def _vary(
    data: dict[str, Any], rows: Sequence[dict[str, Any]], draw: random.Random, bounds: tuple[int, int]
) -> dict[str, Any]:
    right = data["choices"][data["answer"]]
    wrong = [choice for choice in data["choices"] if choice != right]
    draw.shuffle(wrong)
    low, high = bounds
    wanted = low if low == high else draw.randint(low, high)  # one number draws nothing
    for _ in range(20 * wanted):  # ends even where the file holds too few different options
        if len(wrong) >= wanted - 1:
            break
        other = draw.choice(draw.choice(rows)["choices"])
        if other not in wrong and other != right:
            wrong.append(other)
    choices = [right, *wrong[: wanted - 1]]
    draw.shuffle(choices)
    return data | {"choices": choices, "answer": choices.index(right)}


# -- open answers ----------------------------------------------------------------------------------------------------


def context_question(data: dict[str, Any], source: DataSource) -> Row:
    """``context``, ``question``, ``answer`` or ``answers``: the response is the answer."""
    context, asked = _text(data, "context"), _text(data, "question")
    text = f"Answer the question from the passage.\n\nPassage: {context}\n\nQuestion: "
    answers = _references(data)
    return Row("", _turn(text + asked), "", answers[0], question=asked, references=answers)


def private_question(data: dict[str, Any], source: DataSource) -> Row:
    """The same keys, but only the sharer reads the context; the receiver is asked the bare question.

    With ``known``, that is what the receiver alone has read, and stands before its question.
    """
    context, asked, answers = _text(data, "context"), _text(data, "question"), _references(data)
    known = _text(data, "known") if "known" in data else ""
    passage = [{"role": "user", "content": context}]
    turn = [{"role": "user", "content": f"{known} {asked}".strip()}]
    return Row(
        "",
        turn,
        "",
        answers[0],
        sharer_messages=passage,
        question=asked,
        references=answers,
        known=known,
        draft=source.draft,
    )


def question(data: dict[str, Any], source: DataSource) -> Row:
    """``question`` with ``solution`` (worked out, as in GSM8K) or ``answer``."""
    asked, answers = _text(data, "question"), _references(data)
    return Row("", _turn(asked), "", str(data.get("solution") or answers[0]), question=asked, references=answers)


def instruction(data: dict[str, Any], source: DataSource) -> Row:
    """``instruction``, ``input``, ``output``."""
    text = "\n\n".join(part for part in (_text(data, "instruction"), data.get("input", "")) if part)
    return Row("", _turn(text), "", _text(data, "output"))


def chat(data: dict[str, Any], source: DataSource) -> Row:
    """``messages`` (role, content), several turns; the last one, of the assistant, is the response."""
    messages = data.get("messages") or data.get("conversations")
    turns = [_message(message) for message in messages] if isinstance(messages, list) else []
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ConfigError(f"'messages' is {messages!r}; expected turns that end with the assistant's.")
    return Row("", turns[:-1], "", turns[-1]["content"])


KINDS: dict[str, Callable[[dict[str, Any], DataSource], Row]] = {
    "multiple_choice": multiple_choice,
    "context_question": context_question,
    "private_question": private_question,
    "question": question,
    "instruction": instruction,
    "chat": chat,
}
_WITH_CONTEXT = ("context_question", "private_question")

_SYNTHETIC: dict[str, tuple[Callable[[str, int], Iterator[dict[str, Any]]], str]] = {
    "relay": (relay, "train"),
    "relay_test": (relay, "test"),
    "facts": (facts, "train"),
    "facts_test": (facts, "test"),
    "halves": (halves, "train"),
    "halves_test": (halves, "test"),
    "skeleton": (skeleton, "train"),
    "skeleton_test": (skeleton, "test"),
}


# -- reading ---------------------------------------------------------------------------------------------------------


def load_rows(
    sources: Sequence[DataSource], data_dir: Path, seed: int, exclude: frozenset[str] = frozenset()
) -> tuple[list[Row], Counter[str]]:
    """Read, filter, draw and mix rows.

    Args:
        sources: files or data sets.
        data_dir: where the paths of files start.
        seed: of the draw and the order.
        exclude: normalised questions that must not be used, see :func:`questions`.

    Returns:
        The rows, and how many were dropped, by reason: data sets of passages have rows without one.

    Raises:
        ConfigError: a file is missing, a row is not what its kind needs, or a kind is unknown; names the row.
    """
    dropped: Counter[str] = Counter()
    rows: list[Row] = []
    for source in sources:
        if source.kind not in KINDS:
            hint = did_you_mean(source.kind, KINDS)
            raise ConfigError(f"unknown kind of rows {source.kind!r}.{hint} Known: {', '.join(KINDS)}.")
        if source.form not in FORMS:
            raise ConfigError(
                f"unknown form {source.form!r}.{did_you_mean(source.form, FORMS)} Known: {', '.join(FORMS)}."
            )
        kept = []
        for data in read(source, data_dir, seed):
            if _asked(data) in exclude:
                dropped["question is in an excluded file"] += 1
            elif source.kind in _WITH_CONTEXT and data.get("context") == "":
                dropped["context is empty"] += 1
            else:
                kept.append(data)
        random.Random(seed).shuffle(kept)
        drawn = kept[source.skip :][: source.limit]
        # refuses broken rows before options are varied
        converted = [_convert(data, source, data_dir) for data in drawn]
        if source.vary_options or source.options is not None:
            converted = [_convert(data, source, data_dir) for data in vary_options(drawn, source, seed)]
        rows += converted
    random.Random(seed + 1).shuffle(rows)
    return rows, dropped


def questions(files: Sequence[Path]) -> frozenset[str]:
    """The questions of these files, normalised, to be kept out of training."""
    return frozenset(_asked(data) for file in files for data in read_jsonl(file))


def read(source: DataSource, data_dir: Path, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The raw rows of a source, with columns renamed.

    Raises:
        ConfigError: not exactly one of ``path``, ``dataset`` and ``synthetic`` is given, or it can't be had.
    """
    given = [source.path, source.dataset, source.synthetic]
    if sum(place is not None for place in given) != 1:
        raise ConfigError(
            f"give either 'path' or 'dataset' (or 'synthetic') for a source, got {', '.join(map(repr, given))}."
        )
    if source.path is not None:
        found = read_jsonl(data_dir / source.path)
    elif source.synthetic is not None:
        found = _make_up(source, seed)
    else:
        found = map(normalise, _read_dataset(source))
    for index, data in enumerate(found):
        if all(data.get(column) == wanted for column, wanted in source.keep.items()):
            renamed = data | {key: data[column] for key, column in source.columns.items() if column in data}
            yield {"id": f"{source.name}/{index}"} | renamed


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file.

    Raises:
        ConfigError: missing, or a line that is not a JSON object; names the line.
    """
    yield from (data for _, data in _numbered(path))


def _numbered(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same with the number of each line."""
    if not path.is_file():
        found = f"{path} is a folder, no data file" if path.is_dir() else f"no such data file: {path}"
        raise ConfigError(f"{found}. Set data_dir to the folder that the paths start from.")
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    data = json.loads(line)
                    if not isinstance(data, dict):
                        raise ConfigError(f"{path}, line {number}: expected an object, got {type(data).__name__}.")
                    yield number, data
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {number}: not JSON: {error}. Expected one JSON object on each line."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: {error}. Expected one JSON object on each line.") from error


def _make_up(source: DataSource, seed: int) -> Iterator[dict[str, Any]]:
    if source.synthetic not in _SYNTHETIC or source.limit is None:
        raise ConfigError(
            f"synthetic is {source.synthetic!r} with limit {source.limit}; expected one of {', '.join(_SYNTHETIC)}, "
            "and how many rows."
        )
    make, split = _SYNTHETIC[source.synthetic]
    return islice(make(split, seed), source.skip + source.limit)


def _read_dataset(source: DataSource) -> Iterator[dict[str, Any]]:
    try:
        from datasets import get_dataset_config_names, load_dataset
    except ImportError as error:
        raise ConfigError(
            f"data set {source.dataset!r} needs the datasets library: {install_command('datasets')}."
        ) from error
    try:
        subsets = get_dataset_config_names(source.dataset) if source.subset == "*" else [source.subset]
        found = [load_dataset(source.dataset, subset, split=source.split) for subset in subsets]
    except Exception as error:  # the library raises what its loaders raise
        raise ConfigError(
            f"could not read data set {source.dataset!r} (subset {source.subset!r}, split {source.split!r}): {error}. "
            "Check name and connection, or give a JSONL file in its place."
        ) from error
    for subset, rows in zip(subsets, found, strict=True):
        for data in rows:
            yield dict(data) | ({"id": f"{subset}/{data['id']}"} if source.subset == "*" and "id" in data else {})


def _convert(data: dict[str, Any], source: DataSource, data_dir: Path) -> Row:
    try:
        row = KINDS[source.kind](data, source)
    except ConfigError as error:
        where = f"{source.name}{_line_of(data, source, data_dir)}, row {data.get('id')!r} as {source.kind}"
        raise ConfigError(f"{where}: {error}") from error
    return Row(**(vars(row) | {"id": str(data["id"]), "source": source.name}))


def _line_of(data: dict[str, Any], source: DataSource, data_dir: Path) -> str:
    """Where a row stands in its file, read again: rows were drawn and renamed since, and only a broken one is asked."""
    for index, (number, found) in enumerate(_numbered(Path(data_dir) / source.path) if source.path else ()):
        if data.items() >= ({"id": f"{source.name}/{index}"} | found).items():
            return f", line {number}"
    return ""


def _sentence(text: str, choices: Sequence[str], answer: int, rest: str) -> Row:
    letters, lead = _letters(choices), "The correct answer is"
    return Row("", _turn(text), "", f"{lead}{letters[answer]}{rest}", letters, answer, lead=lead)


def _lines(choices: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def _letters(choices: Sequence[str]) -> tuple[str, ...]:
    return tuple(f" {letter}" for letter in LETTERS[: len(choices)])


def _text(data: dict[str, Any], key: str) -> str:
    value = data.get(key)
    if value is None or str(value).strip() == "":
        raise ConfigError(f"{key!r} is missing or empty; the row has {', '.join(sorted(data))}.")
    return str(value)


def _references(data: dict[str, Any]) -> tuple[str, ...]:
    """All answers that count, the first one first.

    Raises:
        ConfigError: there is none.
    """
    given = [data.get("answer"), *(data.get("answers") or [])]
    found = dict.fromkeys(str(answer) for answer in given if answer is not None and str(answer).strip())
    if not found:
        _text(data, "answer")  # says what is missing
    return tuple(found)


def _message(message: dict[str, Any]) -> dict[str, str]:
    """One turn, also under the names that ShareGPT-like sets use."""
    roles = {"human": "user", "gpt": "assistant"}
    role = str(message.get("role") or message.get("from"))
    return {"role": roles.get(role, role), "content": str(message.get("content") or message.get("value") or "")}


def _asked(data: dict[str, Any]) -> str:
    asked = str(data.get("question") or data.get("instruction") or "")
    return " ".join(asked.lower().split())


def _turn(text: str) -> Conversation:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


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
