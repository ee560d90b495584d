"""The Receiver: reads the prompt too, takes what the fuser makes of the sharer's cache, and answers."""

from __future__ import annotations

from c2c.language_model import LanguageModel


class Receiver(LanguageModel):
    """A frozen model that decodes from a fused cache, by its own ``generate``."""

    role = "receiver"
