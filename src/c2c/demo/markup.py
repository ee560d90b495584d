"""Panes and states as HTML. Everything that a model or a user wrote is escaped."""

from __future__ import annotations

import re
from html import escape

from c2c.cli.output import human_bytes
from c2c.demo.choice import Choice
from c2c.demo.loader import Stage, Status
from c2c.demo.pane import Pane, State, Way

TITLES = {
    Way.RECEIVER: "Receiver",
    Way.SHARER: "Sharer",
    Way.TEXT: "Text-to-text",
    Way.C2C: "Cache-to-cache",
}
_STATES = {
    State.IDLE: "",
    State.WAITING: "waiting",
    State.RUNNING: "running",
    State.DONE: "done",
    State.STOPPED: "stopped",
    State.FAILED: "failed",
}
_DASH = "\u2013"


def pane_html(pane: Pane, choice: Choice | None, private: bool = False) -> str:
    """One pane."""
    way, state = pane.way, pane.state
    busy = "true" if state is State.RUNNING else "false"
    parts = [
        f'<section class="c2c-pane c2c-{way}" data-way="{way}" data-state="{state}" aria-busy="{busy}" '
        f'aria-label="{TITLES[way]}">',
        f'<header><h3>{TITLES[way]}</h3><span class="c2c-state">{_STATES[state]}</span></header>',
        f'<p class="c2c-who">{_who(way, choice, private)}</p>',
        _misled(pane, private),
        _message(pane),
        _answer(pane),
        f'<p class="c2c-error" role="alert">{escape(sentence(pane.error))}</p>' if pane.error else "",
        f'<p class="c2c-note">{escape(pane.note)}</p>' if pane.note else "",
        _figures(pane),
        "</section>",
    ]
    return "".join(parts)


def status_html(choice: Choice, status: Status) -> str:
    """How far the models are."""
    receiver, sharer = _names(choice)
    pair = f"<b>{receiver}</b> (receiver) and <b>{sharer}</b> (sharer)"
    if status.stage is Stage.READY:
        return _status("ready", f"Ready: {pair}, loaded in {status.seconds:.0f} s.")
    if status.stage is Stage.LOADING:
        return _status("loading", f"Loading {pair} \u2026 {status.seconds:.0f} s. You can ask already.")
    if status.stage is Stage.FAILED:
        return _status("failed", f"{pair} could not be loaded: {escape(status.error)}")
    return _status("waiting", f"{pair}: will be loaded when they are needed.")


def remark_html(kind: str, text: str) -> str:
    """A line of the page's own, with commands in backticks; ``kind`` is as in the style sheet, such as ``ready``."""
    return _status(kind, re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text)))


def sentence(error: object) -> str:
    """An error's message as a sentence of its own."""
    text = str(error)
    return text[:1].upper() + text[1:]


def _status(kind: str, inner: str) -> str:
    return f'<p class="c2c-status" data-status="{kind}" role="status">{inner}</p>'


def _who(way: Way, choice: Choice | None, private: bool) -> str:
    receiver, sharer = _names(choice) if choice else ("receiver", "sharer")
    return {
        Way.RECEIVER: f"{receiver} alone" + (", without the document" if private else ""),
        Way.SHARER: f"{sharer} alone" + (", with the document" if private else ""),
        Way.TEXT: f"{sharer} writes, {receiver} reads and answers",
        Way.C2C: f"{receiver} answers from its own cache and that of {sharer}",
    }[way]


def _names(choice: Choice) -> tuple[str, str]:
    """Receiver and sharer; of a folder or a hub id its last part."""
    receiver, sharer = (escape(name.rstrip("/").rpartition("/")[2]) for name in (choice.receiver, choice.sharer))
    return receiver, sharer


def _misled(pane: Pane, private: bool) -> str:
    if pane.misled is None:
        return ""
    what = "document" if private else "question"
    text = escape(pane.misled.partition("\n\n")[2] or pane.misled)
    return (
        f'<div class="c2c-misled"><b>Wrong message.</b> The sharer was given this {what} instead:'
        f"<blockquote>{text}</blockquote></div>"
    )


def _message(pane: Pane) -> str:
    if pane.message is None:
        return ""
    return (
        '<div class="c2c-message"><b>The text that was passed</b>'
        f"<blockquote>{escape(pane.message.strip())}</blockquote></div>"
    )


def _answer(pane: Pane) -> str:
    before = f'<p class="c2c-before">before: {escape(_short(pane.before))}</p>' if pane.before is not None else ""
    if pane.state in (State.IDLE, State.WAITING) or (not pane.text and pane.state is not State.DONE):
        return f'<p class="c2c-answer c2c-empty">{_DASH}</p>{before}'
    prefix = f'<span class="c2c-prefix">{escape(pane.prefix)}</span>' if pane.prefix else ""
    text = escape(pane.text.rstrip()) or "(no text)"
    return f'<p class="c2c-answer">{prefix}{text}{_verdict(pane)}</p>{before}'


def _verdict(pane: Pane) -> str:
    if pane.right is None or pane.state is not State.DONE:
        return ""
    if pane.letter == pane.right:
        return ' <span class="c2c-verdict c2c-right">\u2713 right</span>'
    wrong = f' <span class="c2c-verdict c2c-wrong">\u2717 right is {pane.right}</span>'
    if pane.misled is not None and pane.letter is not None and pane.letter == pane.misled_right:
        return f"{wrong}<br><small>{pane.letter} is right for the question that the sharer was given.</small>"
    return wrong


def _figures(pane: Pane) -> str:
    rows = (
        ("first token", _seconds(pane.first)),
        ("total", _seconds(pane.total)),
        ("tokens read", _count(pane.read)),
        ("tokens written", _written(pane)),
        ("crossed", _crossed(pane)),
    )
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f'<dl class="c2c-figures">{cells}</dl>'


def _seconds(value: float | None) -> str:
    return _DASH if value is None else f"{value:.2f} s"


def _count(value: int | None) -> str:
    return _DASH if value is None else f"{value:,}"


def _written(pane: Pane) -> str:
    if pane.message_written is None:
        return _count(pane.written)
    return f"{pane.message_written:,} + {_count(pane.written)}"


def _crossed(pane: Pane) -> str:
    if pane.way in (Way.RECEIVER, Way.SHARER):
        return "nothing"
    if pane.crossed is None:
        return _DASH
    return f"{human_bytes(pane.crossed)} of {'text' if pane.way is Way.TEXT else 'cache'}"


def _short(text: str) -> str:
    text = " ".join(text.split()) or "(no text)"
    return text if len(text) <= 60 else text[:59] + "\u2026"
