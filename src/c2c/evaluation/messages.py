"""What a sharer writes for a receiver to read, in text-to-text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from c2c.evaluation.pair import Pair
from c2c.language_model import LanguageModel
from c2c.messages import Conversation
from c2c.training.prefill_store import PromptRecords


class Messages:
    """A sharer's greedy texts, kept beside its prefills: they depend on the sharer and its prompt, on no fuser.

    Args:
        pair: whose sharer writes.
    """

    def __init__(self, pair: Pair) -> None:
        self.sharer: LanguageModel = pair.sharer
        self.records = PromptRecords(pair.stores[1], "messages")

    @torch.no_grad()
    def write(self, requests: Sequence[Conversation], longest: int) -> list[str]:
        """One text for each request, at most ``longest`` tokens each; equal requests are answered once."""
        prompts = [self.sharer.encode([request]).ids[0].tolist() for request in requests]

        def generate(part: list[int]) -> list[str]:
            tokens = self.sharer.encode([requests[index] for index in part])
            cache = self.sharer.prefill(tokens, tokens.length - 1)
            ids = self.sharer.generate(tokens, cache, max_new_tokens=longest, do_sample=False)
            return self.sharer.texts(ids)

        texts: list[str] = self.records.get(prompts, [longest] * len(prompts), generate)
        return texts
