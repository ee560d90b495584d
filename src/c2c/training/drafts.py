"""Drafts: a sharer that reads the question too drafts an answer, and hands over its cache of that as well.

The counterpart of ``draft_tokens`` at inference. A draft depends on the sharer alone, so it is written once per
question and kept beside the prefills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from c2c.handoff import SharerPrompt
from c2c.language_model import Sharer
from c2c.tokens import TokenBatch, left_pad, natural_positions
from c2c.training.prefill_store import PrefillStore, PromptRecords
from c2c.utils import OnProgress


def with_drafts(
    examples: Sequence[Any], sharer: Sharer, store: PrefillStore, progress: OnProgress | None = None
) -> list[Any]:
    """Append drafts to what the sharer hands over, in the examples of private context whose rows have a ``draft``."""
    found: dict[int, Any] = {}
    records = PromptRecords(store, "drafts")
    stage = None if progress is None else partial(progress, "sharer's drafts")
    for longest in sorted({example.row.draft for example in examples} - {0}):
        part = [index for index, example in enumerate(examples) if example.row.draft == longest]
        prompts = [examples[index].sharer_ids for index in part]

        def generate(rows: list[int], prompts: Any = prompts, longest: int = longest) -> list[list[int]]:
            return generate_drafts([prompts[row] for row in rows], longest, sharer, store)

        for index, draft in zip(part, records.get(prompts, [longest] * len(part), generate, stage), strict=True):
            handed_over = SharerPrompt(examples[index].sharer_ids, examples[index].kept).followed_by(draft)
            found[index] = replace(examples[index], sharer_ids=handed_over.ids, kept=handed_over.kept)
    return [found.get(index, example) for index, example in enumerate(examples)]


@torch.no_grad()
def generate_drafts(
    prompts: Sequence[Sequence[int]], longest: int, sharer: Sharer, store: PrefillStore
) -> list[list[int]]:
    """Continue prompts greedily, at most ``longest`` tokens, up to and with the token that ends a turn.

    The cache of prompts and drafts is put into the store.
    """
    tokens = left_pad(prompts, 0)
    cache = sharer.prefill(tokens, tokens.length - 1)
    new = sharer.generate(tokens, cache, max_new_tokens=longest, do_sample=False).to(tokens.ids.device)
    mask = torch.cat([tokens.mask, torch.ones_like(new, dtype=torch.bool)], dim=1)
    read = TokenBatch(torch.cat([tokens.ids, new], dim=1), mask, natural_positions(mask), tokens.padded)
    cache = sharer.prefill(read, cache=cache)  # the last token is not in it yet; behind an end stands padding
    drafts = []
    for ids in new.tolist():
        end = next((place for place, token in enumerate(ids) if token in sharer.ends), len(ids))
        drafts.append(ids[: end + 1])
    whole = [[*prompt, *draft] for prompt, draft in zip(prompts, drafts, strict=True)]
    store.put(whole, cache, [tokens.length - len(prompt) for prompt in prompts])
    return drafts
