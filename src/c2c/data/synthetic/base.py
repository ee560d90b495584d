"""Made-up rows: what is asked in a test never occurs in training, whatever the seeds."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

NAMES = ("Anna", "Bruno", "Carla", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leo")
NUMBERS = ("access code", "locker number", "room number", "ticket number", "badge number", "table number")
OBJECTS = ("umbrella", "suitcase", "bicycle", "hat", "piano", "lamp", "kite", "basket", "clock", "boat", "drum")
TOWNS = ("Lisbon", "Oslo", "Vienna", "Cairo", "Lima", "Dublin", "Kyoto", "Quebec", "Athens", "Havana", "Prague")
_TEST = 5  # one key in so many is kept for tests


def _answer(row: dict[str, str]) -> str:
    return row["answer"]


def made_up(
    name: str,
    facts: Callable[[random.Random], dict[str, str]],
    split: str,
    draw: random.Random,
    key: Callable[[dict[str, str]], str] = _answer,
) -> Iterator[dict[str, Any]]:
    """Rows without end whose keys belong to the split.

    Args:
        name: what their ids begin with.
        facts: draws the fields of a row.
        split: ``train`` or ``test``.
        draw: where randomness comes from.
        key: what of a row decides which split it belongs to.
    """
    count = 0
    while True:
        row = facts(draw)
        if (zlib.crc32(key(row).encode()) % _TEST == 0) == (split == "test"):
            yield {"id": f"{name}/{split}/{count}"} | row
            count += 1
