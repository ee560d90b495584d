"""Panes and states as HTML. Everything that a model or a user wrote is escaped."""

from __future__ import annotations

import re
import textwrap
from html import escape
from pathlib import Path

import yaml
from jinja2 import Environment

from c2c.cli.output import human_bytes
from c2c.demo.examples import LETTERS
from c2c.demo.fusers import FuserChoice
from c2c.demo.panes import Pane

TEXTS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))
TITLES = {"receiver": "Receiver", "sharer": "Sharer", "text": "Text-to-text", "c2c": "Cache-to-cache"}
_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True)
_PANE = _ENVIRONMENT.from_string(Path(__file__).with_name("pane.html").read_text(encoding="utf-8"))


def pane_html(pane: Pane, choice: FuserChoice | None) -> str:
    """Format one pane."""
    receiver, sharer = _names(choice) if choice else ("receiver", "sharer")
    private = choice is not None and choice.private
    models = {
        "receiver": f"{receiver} alone{', without the document' if private else ''}",
        "sharer": f"{sharer} alone{', with the document' if private else ''}",
        "text": f"{sharer} writes, {receiver} reads and answers",
        "c2c": f"{receiver} answers from its own cache and that of {sharer}",
    }
    return _PANE.render(
        pane=pane,
        title=TITLES[pane.name],
        who=models[pane.name],
        what="document" if pane.question is not None and pane.question.document is not None else "question",
        result=pane.result,
        message=pane.result.message if pane.result is not None else None,
        previous=textwrap.shorten(pane.previous or "", 60, placeholder=" \u2026"),
        right_letter=LETTERS.get(pane.question.prompt.strip()) if pane.question is not None else None,
        other_letter=LETTERS.get(pane.other or ""),
        figures=_figures(pane),
    )


def status_html(state: str, text: str) -> str:
    """Format a line of the page, with commands in backticks; ``state`` is waiting, loading, ready or failed."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text[:1].upper() + text[1:]))
    return f'<p class="c2c-status" data-status="{state}" role="status">{text}</p>'


def pair_title(choice: FuserChoice) -> str:
    """Name the models of a fuser and what they do."""
    receiver, sharer = _names(choice)
    return f"{receiver} (receiver) and {sharer} (sharer)"


def _names(choice: FuserChoice) -> tuple[str, str]:
    return Path(choice.receiver).name, Path(choice.sharer).name


def _figures(pane: Pane) -> dict[str, str]:
    """Format seconds, tokens and bytes; empty before they are known."""
    figures = dict.fromkeys(("first token", "total", "tokens read", "tokens written", "crossed"), "")
    if pane.name in ("receiver", "sharer"):
        figures["crossed"] = "nothing"
    if pane.seconds is not None:
        figures["total"] = f"{pane.seconds:.2f} s"
    if (result := pane.result) is not None:
        figures["first token"] = f"{result.seconds_to_first_token:.2f} s"
        figures["total"] = f"{result.seconds_total:.2f} s"
        figures["tokens read"] = f"{result.prompt_tokens:,}"
        figures["tokens written"] = f"{result.new_tokens:,}"
        if result.message is not None:
            figures["tokens written"] = f"{result.message.new_tokens:,} + {result.new_tokens:,}"
            figures["crossed"] = f"{human_bytes(len(result.message.text.encode()))} of text"
        elif result.report is not None:
            figures["crossed"] = f"{human_bytes(result.report.sharer_bytes)} of cache"
    return figures
