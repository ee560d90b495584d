"""The Sharer: reads a prompt and hands over its KV cache."""

from __future__ import annotations

from c2c.language_model import LanguageModel


class Sharer(LanguageModel):
    """A frozen model whose cache is shared. ``prefill`` is all that fusion asks of it."""

    role = "sharer"
