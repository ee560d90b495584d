"""Layouts of questions, instructions and conversations, and the prompts with responses that are made of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from c2c.config import ConfigError
from c2c.data.config import LETTERS, DataSource
from c2c.errors import PromptError
from c2c.messages import Conversation, Message, message

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
        options: texts of the options, for multiple choice.
        sharer_messages: what the sharer alone reads; None where both read ``messages``.
        question: the bare question, where there is one.
        references: answers that count as right, where the answer is open.
        known: in private context, a text that only the receiver has read; it precedes the question.
        draft: longest answer in tokens that the sharer drafts and hands over as well; 0 for none.
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
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """A way to put a multiple-choice question, answered by a letter or by a sentence with it.

    Attributes:
        prompt: template with ``{question}`` and ``{choices}``.
        answer_prefix: text that the receiver's answer continues.
        lead: the part of the response before the letter.
        with_text: whether the response goes on with the option's text.
    """

    prompt: str
    answer_prefix: str = ""
    lead: str = "The correct answer is"
    with_text: bool = False

    def row(self, question: str, choices: Sequence[str], answer: int) -> Row:
        """Make the row of a question; ``answer`` is the index of the right choice."""
        lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        messages = _turn(self.prompt.format(question=question, choices=lines))
        letters = tuple(f" {letter}" for letter in LETTERS[: len(choices)])
        response = self.lead + letters[answer] + (f". {choices[answer]}" if self.with_text else "")
        texts = tuple(choices)
        return Row("", messages, self.answer_prefix, response, letters, answer, lead=self.lead, options=texts)


_LETTER = "Answer the following multiple choice question with the letter of the correct option.\n\n"
_SENTENCE = "Answer the following multiple choice question. Give the letter and the text of the correct option.\n\n"
_QUESTION = "Question: {question}\n{choices}"
FORMS = {
    "letter": Form(_LETTER + _QUESTION, "The answer is", lead=""),  # the form in which fusers are compared
    "published": Form(PUBLISHED),
    "sentence": Form(_SENTENCE + _QUESTION, with_text=True),
}
letter_form = FORMS["letter"].row


def multiple_choice(data: dict[str, Any], source: DataSource) -> Row:
    """Read ``question``, ``choices`` and ``answer`` (index)."""
    choices, answer = data.get("choices"), data.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ConfigError(f"'choices' is {choices!r}; expected a list of 2 to {len(LETTERS)} texts.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ConfigError(f"'answer' is {answer!r}; expected the index of a choice, 0 to {len(choices) - 1}.")
    wrong = [choice for choice in choices if choice is None or isinstance(choice, dict | list)]
    if wrong:
        raise ConfigError(f"'choices' has {wrong[0]!r:.200}; expected texts.")
    return FORMS[source.form].row(_text(data, "question"), [str(choice) for choice in choices], answer)


def vary_options(rows: Sequence[dict[str, Any]], source: DataSource, seed: int) -> list[dict[str, Any]]:
    """Give questions another number of options in a new order: a share of them 2 to 8, or all of them ``options``.

    Missing options are taken from other questions of the same file. A fuser that has only seen four letters has
    little reason to pass on a fifth.
    """
    draw, bounds = random.Random(seed), source.option_range
    if bounds is not None:
        return [_vary(data, rows, draw, *bounds) for data in rows]
    return [_vary(data, rows, draw, 2, 8) if draw.random() < source.vary_options else data for data in rows]


def _vary(data: dict[str, Any], rows: Sequence[Any], draw: random.Random, low: int, high: int) -> dict[str, Any]:
    right = data["choices"][data["answer"]]
    wrong = [choice for choice in data["choices"] if choice != right]
    draw.shuffle(wrong)
    count = low if low == high else draw.randint(low, high)  # a single number must not advance the generator
    for _ in range(20 * count):  # ends even where the file holds too few different options
        if len(wrong) >= count - 1:
            break
        other = draw.choice(draw.choice(rows)["choices"])
        if other not in wrong and other != right:
            wrong.append(other)
    choices = [right, *wrong[: count - 1]]
    draw.shuffle(choices)
    return data | {"choices": choices, "answer": choices.index(right)}


def context_question(data: dict[str, Any], source: DataSource) -> Row:
    """Read ``context``, ``question``, and ``answer`` or ``answers``: the response is the answer."""
    context, asked = _text(data, "context"), _text(data, "question")
    text = f"Answer the question from the passage.\n\nPassage: {context}\n\nQuestion: "
    answers = references(data)
    return Row("", _turn(text + asked), "", answers[0], question=asked, references=answers)


def private_question(data: dict[str, Any], source: DataSource) -> Row:
    """Read the same keys; only the sharer reads the context, and the receiver the bare question.

    ``known``, if given, is a text that only the receiver reads, before its question.
    """
    context, asked, answers = _text(data, "context"), _text(data, "question"), references(data)
    known = _text(data, "known") if "known" in data else ""
    return Row(
        "",
        [{"role": "user", "content": f"{known} {asked}".strip()}],
        "",
        answers[0],
        sharer_messages=[{"role": "user", "content": context}],
        question=asked,
        references=answers,
        known=known,
        draft=source.draft,
    )


def question(data: dict[str, Any], source: DataSource) -> Row:
    """Read ``question`` with ``solution`` (worked out, as in GSM8K) or ``answer``."""
    asked, answers = _text(data, "question"), references(data)
    return Row("", _turn(asked), "", str(data.get("solution") or answers[0]), question=asked, references=answers)


def instruction(data: dict[str, Any], source: DataSource) -> Row:
    """Read ``instruction``, ``input`` and ``output``."""
    given = _text(data, "input") if data.get("input") not in (None, "") else ""
    text = "\n\n".join(part for part in (_text(data, "instruction"), given) if part)
    return Row("", _turn(text), "", _text(data, "output"))


def chat(data: dict[str, Any], source: DataSource) -> Row:
    """Read ``messages`` (role, content), several turns; the last one, of the assistant, is the response."""
    messages = data.get("messages") or data.get("conversations")
    turns = [_message(turn) for turn in messages] if isinstance(messages, list) else []
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise ConfigError(f"'messages' is {messages!r:.300}; expected turns that end with a text of the assistant's.")
    if data.get("tools") or any(turn.get("tool_calls") for turn in turns):
        raise ConfigError("turns with tools are not learned from: leave them out, or write the calls as texts.")
    return Row("", turns[:-1], "", turns[-1]["content"])


_READERS = (multiple_choice, context_question, private_question, question, instruction, chat)
KINDS: dict[str, Callable[[dict[str, Any], DataSource], Row]] = {reader.__name__: reader for reader in _READERS}


_NO_ANSWER = ("", "<unk>")  # the latter in the test split of TriviaQA


class NoAnswer(ConfigError):
    """A question that its data set marks as one without an answer; such rows are dropped and counted."""


def normalise(data: dict[str, Any]) -> dict[str, Any]:
    """Rename the keys of well-known layouts to ours; unknown keys stay as they are.

    Known are questions under ``question_stem``, or with their text inside (Natural Questions); choices as a list, as
    ``{"text": [...], "label": [...]}`` (ARC, OpenBookQA), under ``options``, or in columns ``A``, ``B``, ... (C-Eval),
    with the answer as index, label or letter, also under ``answerKey``; worked answers that end with ``#### 18``
    (GSM8K); and passages in sentences by title (HotpotQA). Open answers are read by :func:`references`.

    Raises:
        ConfigError: an answer that is an index of the choices as well as the label of another.
    """
    choices, labels = _choices(data)
    found = dict(data)
    if "question" not in found and "question_stem" in found:
        found["question"] = found["question_stem"]
    if isinstance(found.get("question"), dict):
        asked = found["question"].get("text", found["question"].get("stem"))
        found["question"] = asked if isinstance(asked, str) else found["question"]
    if "context" in found:
        found["context"] = _passages(found["context"])
    answer = data.get("answer", data.get("answerKey"))
    text = answer.strip() if isinstance(answer, str) else ""
    if isinstance(answer, int) and str(answer) in labels and labels.index(str(answer)) != answer:
        raise ConfigError(f"'answer' is {answer}, an index or one of the labels {labels}? Give a label as a text.")
    if choices is not None:
        found |= {"choices": choices, "answer": labels.index(text) if text in labels else answer}
    elif "####" in text:
        found |= {"solution": answer, "answer": text.rpartition("####")[2].strip()}
    return found


def _passages(context: Any) -> Any:
    """Join paragraphs, each a text or a title with its sentences; anything else is returned as it is."""
    if isinstance(context, dict):
        titles, texts = context.get("title"), context.get("sentences")
        if not isinstance(titles, list) or not isinstance(texts, list) or len(titles) != len(texts):
            return context
        context = [list(part) for part in zip(titles, texts, strict=True)]
    if not isinstance(context, list) or not context:
        return context
    if all(isinstance(part, list) and len(part) == 2 and _are_texts(part[1]) for part in context):
        context = [f"{title}: {''.join(sentences)}" for title, sentences in context]
    return "\n\n".join(context) if _are_texts(context) else context


def _are_texts(parts: Any) -> bool:
    return isinstance(parts, list) and all(isinstance(part, str) for part in parts)


def _choices(data: dict[str, Any]) -> tuple[list[str] | None, list[str]]:
    """Return the options and their labels; None where there are no options."""
    given = data.get("choices", data.get("options"))
    if given is None and isinstance(data.get("question"), dict):  # as ARC and OpenBookQA are published
        given = data["question"].get("choices")
    if isinstance(given, list) and given and all(isinstance(one, dict) and "text" in one for one in given):
        given = {"text": [one["text"] for one in given], "label": [one["label"] for one in given if "label" in one]}
    if isinstance(given, dict) and isinstance(given.get("text"), list):
        labels = given.get("label")
        return given["text"], list(map(str, labels if isinstance(labels, list) and labels else LETTERS))
    if given is None:
        columns = list(takewhile(lambda letter: data.get(letter) is not None, LETTERS))
        given = [str(data[letter]) for letter in columns]
        if len(given) < 2:
            return None, []
    return (given, list(LETTERS[: len(given)])) if isinstance(given, list) else (None, [])


def _text(data: dict[str, Any], key: str) -> str:
    value = data.get(key)
    if value is None or str(value).strip() == "":
        raise ConfigError(f"{key!r} is missing or empty; the row has {', '.join(sorted(data))}.")
    if isinstance(value, dict | list | bool):
        raise ConfigError(f"{key!r} is {value!r:.200}; expected a text.")
    return str(value)


def references(data: dict[str, Any]) -> tuple[str, ...]:
    """Return all open answers that count as right, the first one first.

    Read are ``answer`` and ``answers``, each a text, a list of texts, ``{"text": [...]}`` or a list of such objects
    (SQuAD), or ``{"value": ..., "aliases": [...]}`` (TriviaQA).

    Raises:
        NoAnswer: the row says that there is none (SQuAD 2). ConfigError: in none of these layouts.
    """
    found = dict.fromkeys(text for key in ("answer", "answers") for text in _answer_texts(key, data.get(key)))
    if found and not data.get("is_impossible"):
        return tuple(found)
    if data.get("is_impossible") or data.get("answers") is not None:
        raise NoAnswer("the question has no answer")
    return (_text(data, "answer"),)  # which raises


def _answer_texts(key: str, given: Any) -> list[str]:
    """Return the texts of one layout of answers, without empty ones."""
    if isinstance(given, dict) and "text" in given:
        given = given["text"]
    elif isinstance(given, dict) and "value" in given:
        aliases = given.get("aliases") or []
        given = [given["value"], *(aliases if isinstance(aliases, list) else [aliases])]
    parts = given if isinstance(given, list | tuple) else [given]
    texts = [part["text"] if isinstance(part, dict) and "text" in part else part for part in parts]
    if any(isinstance(text, dict | list | bool) for text in texts):
        raise ConfigError(
            f"{key!r} is {given!r:.200}; expected a text, a list of texts, or the layout of SQuAD or TriviaQA."
        )
    return [str(text) for text in texts if text is not None and str(text).strip() not in _NO_ANSWER]


def _message(turn: Any) -> Message:
    """Read one turn, also under the names of ShareGPT-like sets."""
    if not isinstance(turn, dict):
        raise ConfigError(f"a turn is {turn!r:.200}; expected an object with role and content.")
    given = {"role": turn.get("from"), "content": turn.get("value")} | turn if "from" in turn else turn
    roles = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
    role = roles.get(str(given.get("role")), given.get("role"))
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise ConfigError(f"a turn has the role {role!r}; expected system, user, assistant or tool.")
    try:
        return message(given | {"role": role})
    except PromptError as error:
        raise ConfigError(str(error)) from error


def _turn(text: str) -> Conversation:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
