"""Token alignment: which sharer token each receiver token takes, for models with different tokenizers."""

from c2c.alignment.base import Aligner, Alignment, Chunk, Prompt
from c2c.alignment.char_spans import SpanAligner
from c2c.alignment.slots import PublishedAligner

ALIGNERS = {"spans": SpanAligner, "published": PublishedAligner}

__all__ = ["ALIGNERS", "Aligner", "Alignment", "Chunk", "Prompt", "PublishedAligner", "SpanAligner"]
