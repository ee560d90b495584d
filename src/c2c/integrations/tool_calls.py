"""Tool calls in the text of answers, as models whose chat templates have ``<tool_call>`` write them (Qwen, Hermes)."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(f"{OPEN}(.*?)(?:{CLOSE}|$)", re.DOTALL)
_FENCED = re.compile(r"\s*(?:```(?:json)?\s*(.*?)\s*```|([\[{].*))\s*", re.DOTALL)


def read_calls(text: str, names: set[str]) -> tuple[str, dict[str, Any]]:
    """Read tool calls from an answer: ``<tool_call>{...}</tool_call>``, or nothing but JSON that names a tool.

    Args:
        text: the answer.
        names: of the tools.

    Returns:
        The text without calls, and ``tool_calls`` and ``invalid_tool_calls`` as LangChain has them.
    """
    written = [found.strip() for found in _CALL.findall(text)]
    if written:
        rest = _CALL.sub("", text).strip()
    else:
        found = _FENCED.fullmatch(text)
        written = [found[1] or found[2]] if found else []
        named = [call["name"] for piece in written for call in _parsed(piece)]
        if not named or not names.issuperset(named):
            return text, {}
        rest = ""
    calls, invalid = list[dict[str, Any]](), list[dict[str, Any]]()
    for piece in written:
        parsed = _parsed(piece)
        calls += parsed
        if not parsed:
            invalid.append(
                {"name": None, "args": piece, "id": _new_id(), "error": "no JSON object with a name and arguments"}
            )
    return rest, {"tool_calls": calls, "invalid_tool_calls": invalid}


def _parsed(piece: str) -> list[dict[str, Any]]:
    """Return the calls that JSON holds, empty where it holds none."""
    try:
        found = json.loads(piece)
    except ValueError:
        return []
    calls = []
    for call in found if isinstance(found, list) else [found]:
        arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
        if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
            return []
        calls.append({"name": call["name"], "args": arguments, "id": _new_id(), "type": "tool_call"})
    return calls


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex}"


def call_prefix(choice: str | None) -> str:
    """Return how an answer begins that calls a tool: one by its name, or ``any``; empty for None."""
    if choice is None:
        return ""
    return f'{OPEN}\n{{"name": "' if choice == "any" else f'{OPEN}\n{{"name": {json.dumps(choice)}, "arguments": '
