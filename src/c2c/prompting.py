"""Prompting: messages to text through a model's own chat template, with the span of every message."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from c2c.errors import PromptError
from c2c.messages import Conversation
from c2c.utils import without_folder

# For base models, which have no chat template of their own.
PLAIN_TEMPLATE = (
    "{{ bos_token if bos_token is defined and bos_token else '' }}"
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

Span = tuple[int, int]
_collected: ContextVar[tuple[list[str], ...]] = ContextVar("collected", default=())


@dataclass(frozen=True)
class Rendered:
    """Hold one conversation as the text of one model's prompt.

    Attributes:
        text: the whole prompt.
        contents: the text of each message, as given.
        spans: for each message, where it lies in ``text`` as ``(start, end)`` and where that piece begins in the
            message (templates may trim), or None if the template left it out or it is empty.
        add_special_tokens: whether the tokenizer adds the special tokens that a text begins with.
    """

    text: str
    contents: tuple[str, ...]
    spans: tuple[tuple[Span, int] | None, ...]
    add_special_tokens: bool = False


@dataclass(frozen=True)
class Encoded:
    """Hold a rendered prompt as token ids, with the characters of ``rendered.text`` that each covers."""

    rendered: Rendered
    ids: list[int]
    offsets: list[Span]


@dataclass(frozen=True)
class RenderOptions:
    """Set how a conversation is rendered, the same for all models.

    Attributes:
        add_generation_prompt: end with the opening of the assistant's turn.
        answer_prefix: text appended after it, which the answer continues ("The answer is").
        enable_thinking: passed to templates that have such a switch (Qwen3).
        chat_template: render through the chat template; False for text that a model continues: the messages' texts
            as they are, with the special tokens that a text begins with.
        tools: functions that the model may call, as in the OpenAI API, for templates that list them.
        instruction: what the first user message begins with where passages stand in it, as text or copied entries.
        passage: how each of them stands there, with ``{passage}`` in the place of its text.
    """

    add_generation_prompt: bool = True
    answer_prefix: str = ""
    enable_thinking: bool = False
    chat_template: bool = True
    tools: tuple[dict[str, Any], ...] = ()
    instruction: str = "Answer the question briefly, from the passage.\n\n"
    passage: str = "Passage: {passage}\n\n"

    def __post_init__(self) -> None:
        if "{passage}" not in self.passage:
            raise PromptError(f"passage is {self.passage!r}; expected a text with {{passage}} in it.")


def first_user(conversation: Conversation) -> int:
    """Return the index of the first user message with any text.

    Raises:
        PromptError: there is none.
    """
    for index, message in enumerate(conversation):
        if message["role"] == "user" and message["content"]:
            return index
    raise PromptError("private context stands before the first user message, and there is none with any text.")


def with_passage(conversation: Conversation, *passages: str, options: RenderOptions | None = None) -> Conversation:
    """Put passages before the first user message of a conversation, which asks about them."""
    options, index = options or RenderOptions(), first_user(conversation)
    texts = "".join(options.passage.replace("{passage}", passage) for passage in passages)
    asked = {**conversation[index], "content": options.instruction + texts + conversation[index]["content"]}
    return [*conversation[:index], asked, *conversation[index + 1 :]]


def require_tokenizer(tokenizer: Any, whose: str) -> Any:
    """Return the tokenizer; raise where a model was loaded without one."""
    if tokenizer is None:
        raise PromptError(
            f"the {whose} was loaded without a tokenizer, so text can't be encoded. Load it with one, "
            "Receiver.from_pretrained(source, tokenizer=...) or the same of Sharer, or use token ids: "
            "generate_ids(receiver_ids, sharer_ids, fuse_mask=...)."
        )
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """Return an id for padding, which is masked everywhere: the pad token's, else that of the end, else 0."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def render_text(tokenizer: Any, conversation: Conversation, options: RenderOptions) -> str:
    """Render the prompt text of a conversation.

    Raises:
        PromptError: the chat template refuses the conversation, for instance a system message.
    """
    if not options.chat_template:
        if options.tools or any(message.get("tool_calls") for message in conversation):
            raise PromptError(
                "tools are rendered by a chat template, which a text to be continued does not go through."
            )
        return "".join(message["content"] for message in conversation) + options.answer_prefix
    template = None if getattr(tokenizer, "chat_template", None) else PLAIN_TEMPLATE
    try:
        text = tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            chat_template=template,
            add_generation_prompt=options.add_generation_prompt,
            enable_thinking=options.enable_thinking,
            tools=list(options.tools) or None,
        )
    except Exception as error:  # templates raise what they like
        roles = [message["role"] for message in conversation]
        raise PromptError(
            f"{_template_of(tokenizer)} refused messages with the roles {roles}: {error}. "
            "Some templates know no system role, or want user and assistant in turns."
        ) from error
    return str(text) + options.answer_prefix


def render(tokenizer: Any, conversation: Conversation, options: RenderOptions) -> Rendered:
    """Render a conversation and find each message in the result.

    The template is rendered a second time with a mark in place of each message. What stands between the marks is
    template text, so that messages are found even where their words also occur in the template.

    Raises:
        PromptError: the template leaves out a message. Of a system message, which some templates have no place for,
            there is a warning, since the answer is what the model gives anywhere; see :func:`collect_notes` too.
    """
    text = render_text(tokenizer, conversation, options)
    _check_tools(tokenizer, conversation, options)
    contents = tuple(message["content"] for message in conversation)
    pieces = _pieces(tokenizer, conversation, options)
    if _lost(conversation, pieces):
        _remark(
            f"{_template_of(tokenizer)} leaves out the system message, so this model does not read it: put its text "
            "into the first user message"
        )
    spans = tuple(_find_spans(conversation, text, pieces))
    special = not options.chat_template and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    return Rendered(text, contents, spans, special)


def encode(tokenizer: Any, rendered: Rendered) -> Encoded:
    """Tokenise a rendered prompt; special tokens come from the template where there is one."""
    out = tokenizer(rendered.text, add_special_tokens=rendered.add_special_tokens, return_offsets_mapping=True)
    return Encoded(rendered, list(out["input_ids"]), [(int(a), int(b)) for a, b in out["offset_mapping"]])


def _check_tools(tokenizer: Any, conversation: Conversation, options: RenderOptions) -> None:
    """Make sure that the template renders tools and the calls of them, each of which has a mark for a name here.

    Raises:
        PromptError: it leaves them out.
    """
    calls = [call for message in conversation for call in message.get("tool_calls", ())]
    if not calls and not options.tools:
        return
    marks = iter(f"mark{index}tool" for index in range(len(calls) + len(options.tools)))

    def marked(call: dict[str, Any]) -> dict[str, Any]:
        return {**call, "function": {**call["function"], "name": next(marks)}}

    tools = tuple(marked(tool) for tool in options.tools)
    messages = [
        {**message, "tool_calls": [marked(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in conversation
    ]
    text = render_text(tokenizer, messages, replace(options, tools=tools))
    names = [tool["function"]["name"] for tool in (*options.tools, *calls)]
    lost = [name for index, name in enumerate(names) if f"mark{index}tool" not in text]
    if lost:
        raise PromptError(
            f"{_template_of(tokenizer)} leaves out tools or calls of them: {', '.join(lost)}. "
            "Use models whose templates have tools, or write the calls and their answers into the messages' texts."
        )


@contextmanager
def collect_notes() -> Iterator[list[str]]:
    """Collect what there is to remark on the prompts that are rendered in here, for a report."""
    notes = list[str]()
    token = _collected.set((*_collected.get(), notes))
    try:
        yield notes
    finally:
        _collected.reset(token)


def _remark(note: str) -> None:
    for notes in _collected.get():
        if note not in notes:
            notes.append(note)
    warnings.warn(note, stacklevel=3)


def _template_of(tokenizer: Any) -> str:
    return f"the chat template of {without_folder(tokenizer.name_or_path)!r}"


def _pieces(tokenizer: Any, conversation: Conversation, options: RenderOptions) -> list[str]:
    """Return template texts, and between them the indices of the messages that stand there."""
    marks = [f"\ue000{i}\ue001" if message["content"] else "" for i, message in enumerate(conversation)]
    marked = [{**message, "content": mark} for message, mark in zip(conversation, marks, strict=True)]
    pieces = re.split("\ue000([0-9]+)\ue001", render_text(tokenizer, marked, options))
    lost = [index for index in _lost(conversation, pieces) if conversation[index]["role"] != "system"]
    if lost:
        roles = [conversation[index]["role"] for index in lost]
        raise PromptError(
            f"{_template_of(tokenizer)} leaves out messages {lost}, of the roles {roles}. Use roles that it renders, "
            "such as user and assistant."
        )
    return pieces


def _lost(conversation: Conversation, pieces: Sequence[str]) -> list[int]:
    found = set(map(int, pieces[1::2]))
    return [index for index, message in enumerate(conversation) if message["content"] and index not in found]


def _find_spans(conversation: Conversation, text: str, marked: Sequence[str]) -> list[tuple[Span, int] | None]:
    before, *pieces = marked
    spans: list[tuple[Span, int] | None] = [None] * len(conversation)
    position = 0
    for index, after in zip(map(int, pieces[::2]), pieces[1::2], strict=True):
        found = _locate(text, conversation[index]["content"], before, after, position)
        before = after
        if found is not None and spans[index] is None:
            spans[index] = found
            position = found[0][1]
    return spans


def _locate(text: str, content: str, before: str, after: str, start: int) -> tuple[Span, int] | None:
    """Find a message, as given or trimmed, between the template texts around it; else its first occurrence."""
    pieces = dict.fromkeys(filter(None, [content, content.strip(), content.lstrip(), content.rstrip()]))
    exact = ((piece, before, after) for piece in pieces)
    anywhere = ((piece, "", "") for piece in pieces if piece.strip())  # whitespace is found everywhere
    for piece, left, right in (*exact, *anywhere):
        at = text.find(left + piece + right, start)
        if at >= 0:
            at += len(left)
            return (at, at + len(piece)), content.index(piece)
    return None


def text_tokens(encoded: Encoded) -> Sequence[int | None]:
    """Return for each token the index of the message whose text it touches, or None for a template token."""
    owner: list[int | None] = [None] * len(encoded.ids)
    for index, found in enumerate(encoded.rendered.spans):
        if found is not None:
            (start, end), _ = found
            for token, (first, last) in enumerate(encoded.offsets):
                if first < end and last > start and last > first:
                    owner[token] = index
    return owner
