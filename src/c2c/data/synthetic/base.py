"""Generators of synthetic rows: keys of the test split never occur in training, whatever the seeds."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

NAMES = ("Anna", "Bruno", "Carla", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leo")
NUMBERS = ("access code", "locker number", "room number", "ticket number", "badge number", "table number")
OBJECTS = ("umbrella", "suitcase", "bicycle", "hat", "piano", "lamp", "kite", "basket", "clock", "boat", "drum")
TOWNS = ("Lisbon", "Oslo", "Vienna", "Cairo", "Lima", "Dublin", "Kyoto", "Quebec", "Athens", "Havana", "Prague")
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "purple", "orange", "brown", "grey")
_TEST = 5  # one key in so many is kept for tests


def words(text: str, separator: str = " ") -> tuple[str, ...]:
    """Split a list of words that is too long for one line as a tuple."""
    return tuple(text.split(separator))


def generate(
    name: str,
    make: Callable[[random.Random], dict[str, str]],
    split: str,
    draw: random.Random,
    key: Callable[[dict[str, str]], str] = lambda row: row["answer"],
) -> Iterator[dict[str, Any]]:
    """Generate rows without end whose keys belong to the split.

    Args:
        name: prefix of their ids.
        make: draws the fields of a row.
        split: ``train`` or ``test``.
        draw: random generator.
        key: the part of a row that decides its split.
    """
    count = 0
    while True:
        row = make(draw)
        if (zlib.crc32(key(row).encode()) % _TEST == 0) == (split == "test"):
            yield {"id": f"{name}/{split}/{count}"} | row
            count += 1
