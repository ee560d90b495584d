"""The Receiver: reads the prompt too, takes what the fuser makes of the sharer's cache, and answers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from c2c.language_model import LanguageModel
from c2c.prefill import next_logits
from c2c.tokens import TokenBatch


class Receiver(LanguageModel):
    """A frozen model that decodes from a fused cache, by its own ``generate``."""

    role = "receiver"

    @torch.no_grad()
    def next_logits(self, batch: TokenBatch, cache: Cache) -> Tensor:
        """Read the rest of the prompt on ``cache``, which grows; logits after the last token, ``[batch, vocab]``."""
        self._check_cache(batch, cache)
        return next_logits(self.model, batch.to(self.device), cache)
