"""Prefills and greedy texts of one evaluation: each is computed once for all systems, and kept on disk if asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from cachetools import LRUCache
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from c2c import kv_cache
from c2c.evaluation.config import EvalConfig
from c2c.generation import FirstTokenTimer
from c2c.language_model import LanguageModel, Sharer
from c2c.prefill import prefill
from c2c.tokens import TokenBatch
from c2c.training.prefill_store import PrefillStore, PromptCache, PromptRecords, stack


class EvaluationPrefills:
    """Prefills of one model for :attr:`LanguageModel.stored`: those of the last batches, and a store's.

    Caches are rounded to bfloat16, as in training. A sharer's prompt is prefilled whole, so that it serves alone and
    fused, matched and deranged; a receiver's up to the column that is asked for.

    Args:
        model: the model.
        config: folder and size of the store, and the batch size.
    """

    def __init__(self, model: LanguageModel, config: EvalConfig) -> None:
        folder = None if config.store_dir is None else Path(config.store_dir)
        budget = int(config.store_budget_gb * 5e8) if folder is not None else 0  # half for each model
        self.model = model
        self.store = PrefillStore(model, range(model.geometry.layers), folder=folder, budget=budget, batch=4)
        self._recent: LRUCache[tuple[int, ...], PromptCache] = LRUCache(4 * config.batch_size)

    def prefill(self, batch: TokenBatch, stop: int) -> Cache:
        """Return the cache of the first ``stop`` columns of ``batch``."""
        padding = batch.length - batch.mask.sum(-1)
        padded_within = not torch.equal(batch.mask.long().argmax(-1).to(padding.device), padding)
        if self.model.left_out or padded_within:  # a store has nothing of other layers than KV layers
            return prefill(self.model.model, batch.to(self.model.device), stop)
        whole = self.model.role == "sharer"
        starts = padding.tolist()
        rows = [tuple(row[start:]) for row, start in zip(batch.ids.tolist(), starts, strict=True)]
        lengths = [max(0, stop - start) for start in starts]
        prompts = [row if whole else row[:length] for row, length in zip(rows, lengths, strict=True)]
        caches = [entry.first(length) for entry, length in zip(self._get(prompts), lengths, strict=True)]
        return stack(caches, self.model.geometry.layers, self.model.dtype, self.model.device)

    def _get(self, prompts: Sequence[tuple[int, ...]]) -> list[PromptCache]:
        known = {prompt: self._recent[prompt] for prompt in prompts if prompt in self._recent}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        made = dict(zip(missing, self.store.get([list(prompt) for prompt in missing]), strict=True))
        self._recent.update(made)
        return [(known | made)[prompt] for prompt in prompts]


class StoredSharer(Sharer):
    """A sharer that decodes greedily once per prompt; its texts and drafts are kept beside its prefills.

    Attributes:
        prefills: its prefills.
        records: token ids of its greedy texts, by prompt and length limit.
    """

    prefills: EvaluationPrefills
    records: PromptRecords
    _use_texts = False

    @classmethod
    def of(cls, model: LanguageModel, config: EvalConfig) -> Self:
        """Make one from a loaded model."""
        sharer = cls(model.model, model.tokenizer, model.name)
        sharer.prefills = EvaluationPrefills(sharer, config)
        sharer.records = PromptRecords(sharer.prefills.store, "texts")
        return sharer

    def use_stores(self, *, prefills: bool, texts: bool) -> None:
        """Take prefills, and texts that were generated before, from the stores, or compute them."""
        self.stored = self.prefills if prefills else None
        self._use_texts = texts

    def generate(
        self, batch: TokenBatch, cache: Cache, *, timer: FirstTokenTimer | None = None, **kwargs: Any
    ) -> Tensor:
        """Decode; see :meth:`LanguageModel.generate`. Greedy texts of one length limit are decoded once."""
        settings = {name for name, value in kwargs.items() if value not in (None, [])} - {"do_sample"}
        if not self._use_texts or settings != {"max_new_tokens"} or kwargs.get("do_sample") is not False:
            return super().generate(batch, cache, timer=timer, **kwargs)

        def decode(rows: list[int]) -> list[list[int]]:
            trimmer = FirstTokenTimer()
            part = kv_cache.select_rows(cache, torch.tensor(rows))
            new = super(StoredSharer, self).generate(batch.select(rows), part, timer=trimmer, **kwargs)
            return [ids.tolist() for ids in trimmer.trim(new)]

        prompts = [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
        texts = self.records.get(prompts, [kwargs["max_new_tokens"]] * len(prompts), decode)
        if timer is not None:
            timer.watch({}, self.model.generation_config)  # for the end tokens
        rows = [torch.tensor(ids, dtype=torch.long) for ids in texts]
        return pad_sequence(rows, batch_first=True, padding_value=(self.ends or [0])[0]).to(self.device)
