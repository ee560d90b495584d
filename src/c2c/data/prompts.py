"""Rows as token ids: responses, the tokens that name choices, and the prompt of a sharer that is asked as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from c2c.data.formats import Row
from c2c.errors import PromptError
from c2c.messages import Conversation
from c2c.prompting import with_passage


def passage_with_question(row: Row) -> Conversation:
    """Return the sharer's prompt where it drafts an answer: the passage and the bare question.

    Raises:
        PromptError: the row has no private context.
    """
    if row.sharer_messages is None:
        raise PromptError(f"row {row.id} has no private context")
    question = [*row.messages[:-1], {"role": "user", "content": f"Question: {row.question}"}]
    return with_passage(question, row.sharer_messages[-1]["content"])


def response_tokens(tokenizer: Any, row: Row) -> list[int]:
    """Encode a row's response, with the end token where it belongs to it.

    Raises:
        PromptError: there are no tokens.
    """
    response: list[int] = tokenizer.encode(row.response, add_special_tokens=False)
    if row.ends and tokenizer.eos_token_id is not None:
        response = [*response, tokenizer.eos_token_id]
    if not response:
        raise PromptError(f"row {row.id} has an empty response")
    return response


def choice_tokens(tokenizer: Any, lead: str, choices: Sequence[str]) -> tuple[int, list[int]]:
    """Return the index in ``lead + choice`` of the token that names the choice, and that token of each choice.

    Raises:
        PromptError: two choices are spelled alike.
    """
    spelled = [tokenizer.encode(lead + choice, add_special_tokens=False) for choice in choices]
    if not spelled:
        return 0, []
    for at in range(min(map(len, spelled))):
        ids = [tokens[at] for tokens in spelled]
        if len(set(ids)) == len(ids):
            return at, ids
        if len(set(ids)) > 1:
            break
    raise PromptError(f"no single token tells the choices {list(choices)} apart in the receiver's or sharer's words")
