"""Drafts: an asked sharer writes an answer, and hands over its cache of that as well.

What ``draft_tokens`` does when a pair is used. A draft depends on the sharer alone, so it is written once per question
and kept beside the prefills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from c2c.handoff import Reading
from c2c.language_model import Sharer
from c2c.tokens import TokenBatch, left_pad, natural_positions
from c2c.training.notes import Notes
from c2c.training.objective import Objective
from c2c.training.private import PrivateExample
from c2c.training.store import PrefillStore
from c2c.utils import OnProgress

_BATCH = 16  # questions at a time


def with_drafts(
    examples: Sequence[Any], training: Objective, progress: OnProgress | None = None
) -> list[PrivateExample | Any]:
    """The examples; those of rows with a ``draft`` end, for the sharer, with what it wrote.

    Args:
        examples: of any kind; rows of shared context have no drafts.
        training: the pair with its stores.
        progress: called with (stage, done, total).
    """
    asked = [index for index, example in enumerate(examples) if example.row.draft]
    drafts = Drafts(training.sharer_store, training.model.sharers[0])
    found: dict[int, list[int]] = {}
    for longest in sorted({examples[index].row.draft for index in asked}):
        part = [index for index in asked if examples[index].row.draft == longest]
        written = drafts.write([examples[index].sharer_ids for index in part], longest, progress)
        found |= dict(zip(part, written, strict=True))
    return [_drafted(example, found[index]) if index in found else example for index, example in enumerate(examples)]


class Drafts:
    """What an asked sharer writes, once per prompt.

    Args:
        store: the sharer's; drafts are kept beside its prefills.
        sharer: who writes.
    """

    def __init__(self, store: PrefillStore, sharer: Sharer) -> None:
        self.store, self.sharer, self.notes = store, sharer, Notes(store, "drafts")

    def write(
        self, prompts: Sequence[Sequence[int]], longest: int, progress: OnProgress | None = None
    ) -> list[list[int]]:
        """The draft of each prompt, at most ``longest`` tokens, up to and with the token that ends a turn."""
        names = [self.notes.name(ids, longest) for ids in prompts]
        missing = [index for index, name in enumerate(names) if name not in self.notes]
        missing.sort(key=lambda index: len(prompts[index]))  # little padding
        for start in range(0, len(missing), _BATCH):
            part = missing[start : start + _BATCH]
            written = write_drafts(self.store, self.sharer, [prompts[index] for index in part], longest)
            self.notes.add({names[index]: ids for index, ids in zip(part, written, strict=True)})
            if progress is not None:
                progress("sharer's drafts", start + len(part), len(missing))
        return [self.notes[name] for name in names]


@torch.no_grad()
def write_drafts(
    store: PrefillStore, sharer: Sharer, prompts: Sequence[Sequence[int]], longest: int
) -> list[list[int]]:
    """Greedy continuations of prompts, at most ``longest`` tokens each, up to and with the token that ends a turn.

    The cache of prompts and drafts goes into the store, since it is there already.
    """
    tokens = left_pad(prompts, 0)
    cache = sharer.prefill(tokens, tokens.length - 1)
    new = sharer.generate(tokens, cache, max_new_tokens=longest, do_sample=False).to(tokens.ids.device)
    mask = torch.cat([tokens.mask, torch.ones_like(new, dtype=torch.bool)], dim=1)
    read = TokenBatch(torch.cat([tokens.ids, new], dim=1), mask, natural_positions(mask), tokens.padded)
    cache = sharer.prefill(read, cache=cache)  # the last token is not in it yet; behind an end stands padding
    ends = sharer.ends
    drafts = []
    for ids in new.tolist():
        end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        drafts.append(ids[: end + 1])
    whole = [[*prompt, *draft] for prompt, draft in zip(prompts, drafts, strict=True)]
    store.put(whole, cache, [tokens.length - len(prompt) for prompt in prompts])
    return drafts


def _drafted(example: PrivateExample, draft: Sequence[int]) -> PrivateExample:
    read = Reading(example.sharer_ids, example.kept).followed_by(draft)
    return replace(example, sharer_ids=read.ids, kept=read.kept)
