"""Receiver and sharer whose weights lie in a vLLM engine. Systems and fusion treat them as any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Coroutine, Sequence
from typing import Any, Never, TypeVar

import torch
from torch import Tensor
from transformers import Cache

from c2c import kv_cache
from c2c.decoding import DEFAULT_NEW_TOKENS
from c2c.errors import CacheError, PromptError
from c2c.generation import FirstTokenTimer
from c2c.identity import ModelIdentity
from c2c.integrations.vllm.client import EngineClient
from c2c.integrations.vllm.errors import EngineError, LoadError, SnapshotError, UnsupportedError, as_api_error
from c2c.integrations.vllm.snapshot import Snapshot
from c2c.language_model import LanguageModel, Receiver
from c2c.serving.engine import SamplingParams
from c2c.serving.logs import log_failure
from c2c.sharer import EntrySelection, Sharer
from c2c.tokens import TokenBatch

T = TypeVar("T")
# parameters of a model that change its greedy answers, with the value that changes nothing
_UNSUPPORTED: dict[str, Any] = {
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": None,
    "guidance_scale": None,
    "watermarking_config": None,
}


class VLLMModel(LanguageModel):
    """A model that runs in a vLLM engine.

    Args:
        model: the model as it was loaded; its identity, geometry, rotary tables and tokenizer are used further.
        client: client of the engine.
    """

    def __init__(self, model: LanguageModel, client: EngineClient) -> None:
        super().__init__(model.model, model.tokenizer, model.name)
        self.__dict__.update(model.probed())  # from weights that will be gone
        self.client, self._key = client, model_key(model.identity)

    @property
    def context_length(self) -> int | None:
        """Positions that both the model and the engine have room for."""
        own = super().context_length
        return self.client.context_length if own is None else min(own, self.client.context_length)

    def answer_limit(self, tokens: int) -> int | None:
        """Return the length of the context: the engine keeps its cache to the end."""
        return self.context_length

    def separates(self, batch: TokenBatch, more: int = 0) -> bool:
        """Return False: the engine has no padded batches."""
        return False

    def prefill(self, batch: TokenBatch, stop: int | None = None, cache: Cache | None = None) -> Cache:
        """Extend ``cache`` to the first ``stop`` columns, by a request to the engine.

        Without a cache to extend nothing is read and an empty one is returned: the engine reads the prompt when it
        answers, so there is nothing to bring out of it and in again.

        Raises:
            ApiError: the engine did not read it.
        """
        if cache is None:
            return kv_cache.empty_cache()
        stop = batch.length if stop is None else stop
        held = kv_cache.length(cache) if cache.layers else 0
        if held < stop:
            ids = row_ids(batch)[:stop]
            begin = Snapshot.of_cache(cache, ids[:held], self._key) if held else None
            read = self._run(self.client.prefill(ids, begin)).cache()
            moved = [(keys.to(self.device), values.to(self.device)) for keys, values in kv_cache.layers(read)]
            cache.layers = kv_cache.from_layers(moved).layers
        return cache

    def generate(
        self, batch: TokenBatch, cache: Cache, *, timer: FirstTokenTimer | None = None, **kwargs: Any
    ) -> Tensor:
        """Decode greedily from the prompt, as text-to-text needs it; ``cache`` is not used.

        Args:
            batch: one prompt.
            cache: empty, as :meth:`prefill` returns it.
            timer: measures the time of the whole answer, for all of it comes at once.
            **kwargs: ``max_new_tokens``, and ``do_sample=False``.

        Returns:
            The new ids, ``[1, new]``.

        Raises:
            UnsupportedError: other arguments. ApiError: the engine did not answer.
        """
        limit = kwargs.pop("max_new_tokens", DEFAULT_NEW_TOKENS)
        sampled, stops = kwargs.pop("do_sample", False), kwargs.pop("stopping_criteria", None)
        kwargs.pop("fused", None)  # the engine keeps what it has loaded
        if sampled or stops or kwargs or cache.layers:
            raise UnsupportedError(
                f"a model in a vLLM engine decodes greedily here, got {sorted(kwargs)}. Send requests to the server."
            )
        self.check_prompt(batch)
        room = (self.context_length or limit) - batch.length
        params = vllm_params(self, SamplingParams(temperature=0.0), min(limit, max(room, 1)))
        ids = torch.tensor([self._run(self.client.generate(row_ids(batch), params))])
        if timer is not None:
            timer.watch({}, self.model.generation_config)
            timer(ids, ids)
        return ids

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self.client.loop.run(work)
        except (EngineError, LoadError, SnapshotError) as error:
            log_failure("vllm_failed", error)
            raise as_api_error(error) from error

    def snapshot(self, ids: Sequence[int], cache: Cache) -> Snapshot:
        """Return a cache of the first of these tokens for the engine to load."""
        return Snapshot.of_cache(cache, ids[: kv_cache.length(cache)], self._key)


class VLLMReceiver(VLLMModel, Receiver):
    """A receiver in a vLLM engine."""


class VLLMSharer(VLLMModel, Sharer):
    """A sharer in a vLLM engine."""

    @property
    def context_length(self) -> int | None:
        """One less than there is room for: a request to the engine generates a token."""
        limit = super().context_length
        return limit if limit is None else min(limit, self.client.context_length - 1)

    def share(self, batch: TokenBatch, wanted: EntrySelection) -> Cache:
        """Return the cache of ``batch``, as far as it is wanted."""
        return self.prefill(batch, wanted.stop, kv_cache.empty_cache())

    def draft(self, tokens: TokenBatch, cache: Cache, count: int) -> tuple[list[int], Cache]:
        """Refuse: drafts were not tested in an engine."""
        raise PromptError(
            f"draft_tokens is {count}, and a sharer in a vLLM engine drafts nothing: pass 0, or let it run with "
            "transformers."
        )

    def _read_thinking(self, *args: Any) -> Never:
        """Refuse: an engine takes tokens alone."""
        raise PromptError(
            "a sharer in a vLLM engine takes no thinking steps: pass think=0, or let it run with transformers."
        )


def model_key(identity: ModelIdentity) -> str:
    """Return what snapshots of a model are marked with: a hash of everything that its entries depend on."""
    facts = {name: value for name, value in identity.to_dict().items() if name in ("architecture", "kv", "rope")} | {
        "weights": identity.weights_key
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def row_ids(batch: TokenBatch) -> list[int]:
    """Return the tokens of the only row of a batch.

    Raises:
        CacheError: several rows. PromptError: padding or positions, which vLLM does not have.
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


def check_generation_config(model: LanguageModel) -> None:
    """Refuse a model with decoding parameters of its own that vLLM would not follow.

    Raises:
        UnsupportedError: there are such.
    """
    config = model.model.generation_config
    given = {name: getattr(config, name, None) for name in _UNSUPPORTED}
    bad = [f"{name}={value}" for name, value in given.items() if value not in (None, _UNSUPPORTED[name])]
    if bad:
        raise UnsupportedError(
            f"{model.name} sets {', '.join(bad)} in its generation_config, which has no equal in this integration. Use "
            "c2c serve without --engine vllm."
        )


def vllm_params(model: LanguageModel, params: SamplingParams, limit: int, index: int = 0) -> dict[str, Any]:
    """Convert sampling parameters to fields of vLLM's ``SamplingParams``.

    Args:
        model: who answers; its repetition penalty holds, as it does in ``generate``.
        params: of the request. Stop strings are left to the output, which sees every token.
        limit: new tokens at most.
        index: which answer of its request it is.
    """
    return {
        "max_tokens": limit,
        "temperature": 0.0 if params.greedy else params.temperature,
        "top_p": 1.0 if params.greedy else params.top_p,
        "seed": None if params.seed is None else (params.seed + index) % 2**63,
        "logprobs": params.logprobs,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": getattr(model.model.generation_config, "repetition_penalty", None) or 1.0,
        "stop_token_ids": model.ends,
    }
