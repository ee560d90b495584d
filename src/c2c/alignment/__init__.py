"""Token alignment: which sharer token each receiver token takes, for models with different tokenizers."""

from c2c.alignment.plan import Aligner, Alignment, Chunk, Prompt
from c2c.alignment.published import PublishedAligner
from c2c.alignment.spans import SpanAligner

ALIGNERS = {"spans": SpanAligner, "published": PublishedAligner}

__all__ = ["ALIGNERS", "Aligner", "Alignment", "Chunk", "Prompt", "PublishedAligner", "SpanAligner"]
