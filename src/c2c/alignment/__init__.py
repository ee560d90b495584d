"""Token alignment: which sharer token each receiver token takes, for models with different tokenizers."""

from __future__ import annotations

from typing import Any

from c2c.alignment.base import Aligner, Alignment, Chunk, Prompt
from c2c.alignment.char_spans import CharSpanAligner
from c2c.alignment.slots import PublishedAligner
from c2c.errors import FuserError

ALIGNERS: dict[str, type[Any]] = {"spans": CharSpanAligner, "published": PublishedAligner}
SpanAligner = CharSpanAligner  # the name of earlier versions


def make_aligner(config: dict[str, Any] | None) -> Aligner:
    """Make the aligner that a fuser's config names, by default :class:`CharSpanAligner`.

    Raises:
        FuserError: no such aligner.
    """
    options = dict(config or {"name": "spans"})
    name = options.pop("name", None)
    if name not in ALIGNERS:
        raise FuserError(f"unknown token alignment {name!r}. Known: {', '.join(ALIGNERS)}.")
    aligner: Aligner = ALIGNERS[name](**options)
    return aligner


__all__ = ["Aligner", "Alignment", "CharSpanAligner", "Chunk", "Prompt", "PublishedAligner", "make_aligner"]
