"""Receiver and sharer whose weights lie in a vLLM engine. Fusion treats them as any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from transformers import Cache

from c2c import kv_cache
from c2c.errors import CacheError, PromptError
from c2c.identity import ModelIdentity
from c2c.integrations.vllm.errors import EngineError, LoadError, SnapshotError, as_api_error
from c2c.integrations.vllm.host import Host
from c2c.integrations.vllm.snapshot import Snapshot
from c2c.language_model import LanguageModel, Receiver, Sharer, Wanted
from c2c.serving.logs import log_failure
from c2c.tokens import TokenBatch


class Hosted(LanguageModel):
    """A model that reads in a vLLM engine.

    Args:
        model: the model as it was loaded; its identity, geometry, rotary tables and tokenizer are used further.
        host: the engine.
    """

    def __init__(self, model: LanguageModel, host: Host) -> None:
        super().__init__(model.model, model.tokenizer, model.name)
        self.__dict__.update(identity=model.identity, geometry=model.geometry)  # read from weights that will be gone
        self.host, self._key = host, model_key(model.identity)

    @property
    def context_length(self) -> int | None:
        """Positions that both the model and the engine have room for."""
        own = super().context_length
        return self.host.context if own is None else min(own, self.host.context)

    def prefill(self, batch: TokenBatch, stop: int | None = None, cache: Cache | None = None) -> Cache:
        """Extend ``cache`` to the first ``stop`` columns, by a request to the engine.

        Without a cache to extend nothing is read and an empty one comes back: the engine reads the prompt when it
        answers, so there is nothing to bring out of it and in again.

        Raises:
            ApiError: the engine did not read it.
        """
        if cache is None:
            return kv_cache.empty_cache()
        stop = batch.length if stop is None else stop
        held = kv_cache.length(cache) if cache.layers else 0
        if held < stop:
            ids = row_of(batch)[:stop]
            begin = Snapshot.of_cache(cache, ids[:held], self._key) if held else None
            read = self._read(ids, begin).cache()
            moved = [(keys.to(self.device), values.to(self.device)) for keys, values in kv_cache.layers(read)]
            cache.layers = kv_cache.from_layers(moved).layers
        return cache

    def _read(self, ids: list[int], begin: Snapshot | None) -> Snapshot:
        try:
            return self.host.read_now(ids, begin)
        except (EngineError, LoadError, SnapshotError) as error:
            log_failure("prompt_not_read", error)
            raise as_api_error(error) from error

    def snapshot(self, ids: Sequence[int], cache: Cache) -> Snapshot:
        """A cache of the first of these tokens, for the engine to load."""
        return Snapshot.of_cache(cache, ids[: kv_cache.length(cache)], self._key)


class HostedReceiver(Hosted, Receiver):
    """A receiver in a vLLM engine."""


class HostedSharer(Hosted, Sharer):
    """A sharer in a vLLM engine."""

    @property
    def context_length(self) -> int | None:
        """One less than there is room for: a request to the engine writes a token."""
        limit = super().context_length
        return limit if limit is None else min(limit, self.host.context - 1)

    def share(self, batch: TokenBatch, wanted: Wanted) -> Cache:
        """The cache of ``batch``, as far as it is wanted."""
        return self.prefill(batch, wanted.stop, kv_cache.empty_cache())

    def draft(self, tokens: TokenBatch, cache: Cache, count: int) -> tuple[list[int], Cache]:
        """Not written for an engine."""
        raise PromptError(
            f"draft_tokens is {count}, and a sharer in a vLLM engine writes no draft: pass 0, or let it run with "
            "transformers."
        )


def model_key(identity: ModelIdentity) -> str:
    """What snapshots of a model are marked with: everything that its entries depend on."""
    facts = {
        name: value for name, value in identity.to_dict().items() if name in ("architecture", "kv", "rope", "weights")
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def row_of(batch: TokenBatch) -> list[int]:
    """The tokens of the only row of a batch.

    Raises:
        CacheError: several rows. PromptError: padding or positions, which vLLM does not know.
    """
    if batch.rows != 1:
        raise CacheError(f"got {batch.rows} prompts at once; an engine takes them one by one.")
    positions = torch.arange(batch.length, device=batch.positions.device)
    if not bool(batch.mask.all()) or not torch.equal(batch.positions[0], positions):
        raise PromptError(
            "this prompt has padding inside or positions of its own (alignment slot by slot makes such), which vLLM "
            "can't read. Use a fuser with alignment by spans, or c2c serve without --engine vllm."
        )
    ids: list[int] = batch.ids[0].tolist()
    return ids
