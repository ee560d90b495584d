"""LangGraph: checkpoints of states that hold handoffs. Needs the extra ``langchain``.

A state may hold handoffs like any other value. A checkpointer writes states down, and knows no tensors: give it a
:class:`HandoffSerializer`, or annotate the value with LangGraph's ``UntrackedValue``, which is never written.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from c2c.errors import HandoffError
from c2c.handoff import Handoff
from c2c.integrations import MissingExtraError
from c2c.utils import install_command

try:
    from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
    from langgraph.types import Send
except ImportError as error:
    raise MissingExtraError(
        f"LangGraph is not installed ({error}). Install it: {install_command('langchain')}."
    ) from error

_KEY = "c2c.handoff"  # of a dict that stands for a handoff


class HandoffSerializer(JsonPlusSerializer):
    """LangGraph's own serializer, which also takes handoffs, alone or in lists, tuples and dicts.

    Pass it to a checkpointer: ``InMemorySaver(serde=HandoffSerializer())``. A handoff becomes the bytes of its file,
    digest included; nothing is pickled. Whoever can read the checkpoints can read what was handed over.
    """

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        """Serialize a value."""
        return super().dumps_typed(_packed(obj))

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """Deserialize a value.

        Raises:
            HandoffError: a handoff in it is damaged.
        """
        return _unpacked(super().loads_typed(data))


def handoff_bytes(handoff: Handoff) -> bytes:
    """Return what :meth:`~c2c.handoff.Handoff.save` writes."""
    with tempfile.TemporaryDirectory() as folder:  # of this user alone
        path = Path(folder) / "handoff.safetensors"
        handoff.save(path)
        return path.read_bytes()


def handoff_from_bytes(data: bytes) -> Handoff:
    """Return the handoff of :func:`handoff_bytes`.

    Raises:
        HandoffError: it is damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "handoff.safetensors"
        path.write_bytes(data)
        return Handoff.load(path)


def _packed(value: Any) -> Any:
    if isinstance(value, Handoff):
        return {_KEY: handoff_bytes(value)}
    if isinstance(value, Send):
        return Send(value.node, _packed(value.arg))
    if isinstance(value, dict):
        if _KEY in value:
            raise HandoffError(f"a state has the key {_KEY!r}, which stands for a handoff in checkpoints.")
        return {key: _packed(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_packed, value))
    return value


def _unpacked(value: Any) -> Any:
    if isinstance(value, Send):
        return Send(value.node, _unpacked(value.arg))
    if isinstance(value, dict):
        if set(value) == {_KEY}:
            return handoff_from_bytes(value[_KEY])
        return {key: _unpacked(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_unpacked, value))
    return value
