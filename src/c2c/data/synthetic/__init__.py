"""Synthetic rows, one kind per file: questions whose answer only the context gives, without end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from c2c.data.synthetic.facts import facts
from c2c.data.synthetic.halves import halves
from c2c.data.synthetic.relay import relay
from c2c.data.synthetic.skeleton import skeleton

_ALL: tuple[Callable[[str, int], Iterator[dict[str, Any]]], ...] = (relay, facts, halves, skeleton)
GENERATORS = {generator.__name__: generator for generator in _ALL}
