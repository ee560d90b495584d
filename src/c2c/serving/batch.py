"""Several answers written at once, by the model's own ``generate`` on a prepared cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from c2c import kv_cache
from c2c.language_model import LanguageModel
from c2c.serving.writer import Writer
from c2c.tokens import TokenBatch


@dataclass(frozen=True)
class Prefilled:
    """Prompts that are read.

    Attributes:
        tokens: all of their tokens, left-padded.
        cache: of all columns but the last.
    """

    tokens: TokenBatch
    cache: Cache

    def spread(self, times: Sequence[int]) -> Prefilled:
        """Each row as often as ``times`` says."""
        if all(count == 1 for count in times):
            return self
        rows = [row for row, count in enumerate(times) for _ in range(count)]
        cache = kv_cache.select_rows(self.cache, torch.tensor(rows)) if self.cache.layers else self.cache
        return Prefilled(self.tokens.select(rows), cache)


def join(parts: Sequence[Prefilled]) -> Prefilled:
    """Prompts that were read apart, as one batch."""
    if len(parts) == 1:
        return parts[0]
    batches = [part.tokens for part in parts]
    width = max(batch.length for batch in batches)

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(x, (width - x.shape[1], 0)) for x in tensors])

    tokens = TokenBatch(
        joined([batch.ids for batch in batches]),
        joined([batch.mask for batch in batches]),
        joined([batch.positions for batch in batches]),
        padded=any(batch.padded or batch.length < width for batch in batches),
        natural=all(batch.natural for batch in batches),
    )
    return Prefilled(tokens, kv_cache.stack([part.cache for part in parts]))


def ends_of(model: LanguageModel) -> list[int]:
    """The tokens that end an answer of ``model``."""
    ends: Any = model.model.generation_config.eos_token_id
    if ends is None:
        return []
    return [int(end) for end in ends] if isinstance(ends, list | tuple) else [int(ends)]


@torch.no_grad()
def write(model: LanguageModel, prompts: Prefilled, writers: Sequence[Writer]) -> None:
    """Generate until every writer is done; the cache is used up.

    A row whose writer is done stays in the batch, unread, until the last one is done.

    Args:
        model: the model that writes.
        prompts: one row per writer.
        writers: take the tokens of their rows.
    """
    model.generate(
        prompts.tokens,
        prompts.cache,
        max_new_tokens=max(writer.limit for writer in writers),
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        logits_processor=LogitsProcessorList([_Choose(writers)]),
        stopping_criteria=StoppingCriteriaList([_Take(writers)]),
    )


class _Choose(LogitsProcessor):
    """Lets every writer choose its next token; ``generate`` then takes the largest score."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._active = [(row, writer) for row, writer in enumerate(writers) if not writer.sampler.passive]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._active:
            return scores
        scores = scores.clone()
        for row, writer in self._active:
            if not writer.done:
                scores[row] = writer.sampler.choose(scores[row])
        return scores


class _Take(StoppingCriteria):
    """Hands every writer its token; ends the rows that are done, by the writer's word or because nobody waits."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = writers

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for writer, token in zip(self._writers, input_ids[:, -1].tolist(), strict=True):
            writer.take(token)
        return torch.tensor([writer.done for writer in self._writers], device=input_ids.device)
