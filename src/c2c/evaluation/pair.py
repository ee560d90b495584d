"""The pair of models under evaluation: loading, other fusers, prefills and texts that all systems share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from cachetools import LRUCache
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from c2c import kv_cache
from c2c.data.formats import Row
from c2c.data.prompts import choice_tokens, response_tokens
from c2c.errors import PromptError
from c2c.evaluation.config import EvalConfig, EvaluationError
from c2c.fusers.base import Fuser, load_fuser
from c2c.generation import FirstTokenTimer
from c2c.handoff import sharer_prompt
from c2c.language_model import LanguageModel
from c2c.model import C2CModel
from c2c.private_context import first_user_column
from c2c.prompting import RenderOptions
from c2c.sharer import Sharer
from c2c.tokens import TokenBatch
from c2c.training.prefill_store import PrefillStore, PromptCache, PromptRecords, stack


class Pair:
    """One receiver with one sharer, whose prefills all systems share.

    Args:
        config: the fuser, which names the models, and the stores.

    Raises:
        EvaluationError: the fuser has several sharers, or one on another machine.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        names = ("receiver", "sharer", "dtype", "sharer_dtype", "device_map")
        self.model = C2CModel.from_pretrained(config.fuser, **{name: getattr(config, name) for name in names})
        sharers = self.model.sharers
        if len(sharers) != 1 or not sharers[0].generates:
            raise EvaluationError(
                f"{config.fuser} has {len(sharers)} sharers; one that is loaded here is evaluated at a time: give one "
                "of its fusers."
            )
        self.receiver, self.sharer = self.model.receiver, StoredSharer(sharers[0], config)
        self.model.sharers = [self.sharer]
        self._prefills = EvaluationPrefills(self.receiver, config)
        self._sharers = [self.sharer]

    @contextmanager
    def stores(self, *, prefills: bool) -> Iterator[None]:
        """Inside the block take generated texts, and prefills if asked for, from the stores; outside compute all."""
        sharers = list(self._sharers)
        for sharer in sharers:
            sharer.reuse_texts, sharer.stored = True, sharer.prefills if prefills else None
        self.receiver.stored = self._prefills if prefills else None
        try:
            yield
        finally:
            for sharer in sharers:
                sharer.reuse_texts, sharer.stored = False, None
            self.receiver.stored = None

    def with_fuser(self, folder: str) -> C2CModel:
        """Return the same receiver with another fuser, whose sharer may be the receiver itself or another model.

        Raises:
            EvaluationError: the fuser does not name its sharer.
        """
        fuser, config, receiver = load_fuser(folder, dtype=torch.float32), self.config, self.receiver
        recorded = fuser.config.identity("sharer")
        if recorded is None:
            raise EvaluationError(f"{folder} does not record which sharer it was made for.")
        sharer = next((one for one in self._sharers if recorded.same_weights(one.identity)), None)
        if sharer is None:
            if recorded.same_weights(receiver.identity):
                model: LanguageModel = receiver
            else:
                dtype = config.sharer_dtype or config.dtype
                model = Sharer.from_pretrained(recorded.name, dtype=dtype, device_map=config.device_map)
            sharer = StoredSharer(model, config)
            self._sharers.append(sharer)
        other = C2CModel(receiver, [sharer], [fuser])
        other.fusers.to(receiver.device).eval()
        return other

    def unreadable(self, row: Row) -> str | None:
        """Return why these models can't read an item, None where they can."""
        try:
            lengths = self._lengths(row)
            response_tokens(self.receiver.tokenizer, row)
            choice_tokens(self.receiver.tokenizer, row.lead, row.choices)
        except PromptError as error:
            return type(error).__name__
        limits = [limit for limit in (self.receiver.context_length, self.sharer.context_length) if limit]
        return "prompt too long" if max(lengths) > min(limits, default=max(lengths)) else None

    def _lengths(self, row: Row) -> tuple[int, int]:
        """Return the tokens of both models' prompts."""
        options = RenderOptions(answer_prefix=row.answer_prefix)
        if not self.model.private:
            (prompt,) = self.model.align([row.messages], options)
            return prompt.receiver.length, prompt.sharers[0].length
        first_user_column(self.receiver.tokenizer, row.messages, options)  # where the entries will stand
        read = sharer_prompt(self.sharer.tokenizer, row.sharer_messages or [], options)
        fuser = cast(Fuser, self.model.fusers[0])
        entries = fuser.output_length(len(read.ids))  # stand in the receiver's prompt
        return self.receiver.encode([row.messages], options).length + entries, len(read.ids)


class EvaluationPrefills:
    """Prefills of one model for :attr:`LanguageModel.stored`: those of the last batches, and a store's.

    Caches are rounded to bfloat16, as in training. A sharer's prompt is prefilled whole, so that it serves alone and
    fused, matched and deranged; a receiver's up to the column that is asked for.
    """

    def __init__(self, model: LanguageModel, config: EvalConfig) -> None:
        folder = None if config.store_dir is None else Path(config.store_dir)
        budget = int(config.store_budget_gb * 5e8) if folder is not None else 0  # half for each model
        self.model = model
        self.store = PrefillStore(model, range(model.geometry.layers), folder=folder, budget=budget, batch=4)
        self._recent: LRUCache[tuple[tuple[int, ...], int], PromptCache] = LRUCache(4 * config.batch_size)

    def prefill(self, batch: TokenBatch, stop: int) -> Cache:
        """Return the cache of the first ``stop`` columns of ``batch``."""
        padding = batch.length - batch.mask.sum(-1)
        padded_within = not torch.equal(batch.mask.long().argmax(-1).to(padding.device), padding)
        if self.model.left_out or padded_within:  # a store has nothing of other layers than KV layers
            return self.model.compute(batch, stop)
        starts, end = padding.tolist(), None if self.model.role == "sharer" else stop
        lengths = [length if self.store.depends(length) else 0 for length in batch.lengths.flatten().tolist()]
        rows = zip(batch.ids.tolist(), starts, lengths, strict=True)
        prompts = [(tuple(row[start:end]), length) for row, start, length in rows]
        known = {prompt: self._recent[prompt] for prompt in prompts if prompt in self._recent}
        if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]:
            made = dict(zip(missing, self.store.get(*zip(*missing, strict=True)), strict=True))
            self._recent.update(made)
            known |= made
        caches = [known[prompt].first(max(0, stop - start)) for prompt, start in zip(prompts, starts, strict=True)]
        return stack(caches, self.model.geometry.layers, self.model.dtype, self.model.device)


class StoredSharer(Sharer):
    """A sharer that decodes greedily once per prompt; its texts and drafts are kept beside its prefills.

    Attributes:
        reuse_texts: take texts that were generated before, by prompt and length limit, instead of decoding again.
    """

    def __init__(self, model: LanguageModel, config: EvalConfig) -> None:
        super().__init__(model.model, model.tokenizer, model.name)
        self.prefills, self.reuse_texts = EvaluationPrefills(self, config), False
        self._texts = PromptRecords(self.prefills.store, "texts")

    def generate(
        self, batch: TokenBatch, cache: Cache, *, timer: FirstTokenTimer | None = None, **kwargs: Any
    ) -> Tensor:
        """Decode; see :meth:`LanguageModel.generate`. Greedy texts of one length limit are decoded once."""
        settings = {name for name, value in kwargs.items() if value not in (None, [])} - {"do_sample"}
        if not self.reuse_texts or settings != {"max_new_tokens"} or kwargs.get("do_sample") is not False:
            return super().generate(batch, cache, timer=timer, **kwargs)

        def decode(rows: list[int]) -> list[list[int]]:
            trimmer = FirstTokenTimer()
            part = kv_cache.select_rows(cache, torch.tensor(rows))
            new = super(StoredSharer, self).generate(batch.select(rows), part, timer=trimmer, **kwargs)
            return [ids.tolist() for ids in trimmer.trim(new)]

        prompts = [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
        texts = self._texts.get(prompts, [kwargs["max_new_tokens"]] * len(prompts), decode)
        if timer is not None:
            timer.watch({}, self.model.generation_config)  # for the end tokens
        rows = [torch.tensor(ids, dtype=torch.long) for ids in texts]
        return pad_sequence(rows, batch_first=True, padding_value=(self.ends or [0])[0]).to(self.device)
