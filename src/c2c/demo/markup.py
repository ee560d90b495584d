"""Panes and states as HTML. Everything that a model or a user wrote is escaped."""

from __future__ import annotations

import re
import textwrap
from html import escape
from typing import TYPE_CHECKING

from c2c.cli.output import human_bytes
from c2c.demo.examples import example_of
from c2c.demo.fusers import FuserChoice
from c2c.demo.models import LoadStatus
from c2c.demo.panes import Pane

if TYPE_CHECKING:
    from c2c.generation import GenerationResult

TITLES = {"receiver": "Receiver", "sharer": "Sharer", "text": "Text-to-text", "c2c": "Cache-to-cache"}
_DASH = "\u2013"
_UNTRAINED = "The fuser is untrained: it adds nothing, and this is the receiver's own answer."


def pane_html(pane: Pane, choice: FuserChoice | None) -> str:
    """Format one pane."""
    title, busy = TITLES[pane.name], "true" if pane.state == "running" else "false"
    report = pane.result.report if pane.result is not None else None
    state = "" if pane.state == "idle" else pane.state
    parts = [
        f'<section class="c2c-pane c2c-{pane.name}" data-state="{pane.state}" aria-busy="{busy}" aria-label="{title}">',
        f'<header><h3>{title}</h3><span class="c2c-state">{state}</span></header>',
        f'<p class="c2c-who">{_who(pane.name, choice)}</p>',
        _wrong_message(pane),
        _message(pane.result),
        _answer(pane),
        f'<p class="c2c-error" role="alert">{escape(sentence(pane.error))}</p>' if pane.error else "",
        f'<p class="c2c-note">{_UNTRAINED}</p>' if report is not None and not report.trained else "",
        _figures(pane),
        "</section>",
    ]
    return "".join(parts)


def load_status_html(choice: FuserChoice, status: LoadStatus) -> str:
    """Format the state of a pair."""
    receiver, sharer = _names(choice)
    pair = f"<b>{receiver}</b> (receiver) and <b>{sharer}</b> (sharer)"
    text = {
        "waiting": f"{pair}: will be loaded when they are needed.",
        "loading": f"Loading {pair} \u2026 You can ask already.",
        "ready": f"Ready: {pair}, loaded in {status.seconds:.0f} s.",
        "failed": f"{pair} could not be loaded: {escape(status.error)}",
    }
    return _status(status.state, text[status.state])


def status_html(state: str, text: str) -> str:
    """Format a line of the page, with commands in backticks; ``state`` is as in :class:`LoadStatus`."""
    return _status(state, re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text)))


def sentence(error: object) -> str:
    """Return an error's message as a sentence of its own."""
    text = str(error)
    return text[:1].upper() + text[1:]


def _status(state: str, inner: str) -> str:
    return f'<p class="c2c-status" data-status="{state}" role="status">{inner}</p>'


def _who(name: str, choice: FuserChoice | None) -> str:
    receiver, sharer = _names(choice) if choice else ("receiver", "sharer")
    private = choice is not None and choice.private
    return {
        "receiver": f"{receiver} alone{', without the document' if private else ''}",
        "sharer": f"{sharer} alone{', with the document' if private else ''}",
        "text": f"{sharer} writes, {receiver} reads and answers",
        "c2c": f"{receiver} answers from its own cache and that of {sharer}",
    }[name]


def _names(choice: FuserChoice) -> tuple[str, str]:
    """Return the names of receiver and sharer; of a folder or a hub id the last part."""
    receiver, sharer = (escape(name.rstrip("/").rpartition("/")[2]) for name in (choice.receiver, choice.sharer))
    return receiver, sharer


def _wrong_message(pane: Pane) -> str:
    if pane.other is None or pane.question is None:
        return ""
    what = "question" if pane.question.document is None else "document"
    text = escape(pane.other.partition("\n\n")[2] or pane.other)
    return (
        f'<div class="c2c-wrong-message"><b>Wrong message.</b> The sharer was given this {what} instead:'
        f"<blockquote>{text}</blockquote></div>"
    )


def _message(result: GenerationResult | None) -> str:
    if result is None or result.message is None:
        return ""
    text = escape(result.message.text.strip())
    return f'<div class="c2c-message"><b>The text that was passed</b><blockquote>{text}</blockquote></div>'


def _answer(pane: Pane) -> str:
    previous = ""
    if pane.previous is not None:
        text = textwrap.shorten(pane.previous, 60, placeholder=" \u2026") or "(no text)"
        previous = f'<p class="c2c-previous">before: {escape(text)}</p>'
    if not pane.text and pane.state != "done":
        return f'<p class="c2c-answer c2c-empty">{_DASH}</p>{previous}'
    prefix = pane.question.answer_prefix if pane.question is not None else ""
    prefix = f'<span class="c2c-prefix">{escape(prefix)}</span>' if prefix else ""
    text = escape(pane.text.rstrip()) or "(no text)"
    return f'<p class="c2c-answer">{prefix}{text}{_verdict(pane)}</p>{previous}'


def _verdict(pane: Pane) -> str:
    if pane.right_letter is None or pane.state != "done":
        return ""
    if pane.letter == pane.right_letter:
        return ' <span class="c2c-verdict c2c-right">\u2713 right</span>'
    wrong = f' <span class="c2c-verdict c2c-wrong">\u2717 right is {pane.right_letter}</span>'
    other = example_of(pane.other or "")
    if other is not None and pane.letter == other.letter:
        return f"{wrong}<br><small>{pane.letter} is right for the question that the sharer was given.</small>"
    return wrong


def _figures(pane: Pane) -> str:
    """Format seconds, tokens and bytes; dashes before they are known."""
    result = pane.result
    total = pane.seconds if result is None else result.seconds_total
    rows = {
        "first token": _DASH if result is None else f"{result.seconds_to_first_token:.2f} s",
        "total": _DASH if total is None else f"{total:.2f} s",
        "tokens read": _DASH if result is None else f"{result.prompt_tokens:,}",
        "tokens written": _DASH if result is None else _written(result),
        "crossed": _crossed(pane.name, result),
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows.items())
    return f'<dl class="c2c-figures">{cells}</dl>'


def _written(result: GenerationResult) -> str:
    message = "" if result.message is None else f"{result.message.new_tokens:,} + "
    return f"{message}{result.new_tokens:,}"


def _crossed(name: str, result: GenerationResult | None) -> str:
    if name in ("receiver", "sharer"):
        return "nothing"
    if result is not None and result.message is not None:
        return f"{human_bytes(len(result.message.text.encode()))} of text"
    return _DASH if result is None or result.report is None else f"{human_bytes(result.report.sharer_bytes)} of cache"
