"""Generators of synthetic rows: keys of the test split never occur in training, whatever the seeds."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import yaml

WORDS: dict[str, Any] = yaml.safe_load(files("c2c.data.synthetic").joinpath("words.yaml").read_text(encoding="utf-8"))
_TEST = 5  # one key in so many is kept for tests


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
