"""A frozen language model with its tokenizer, and the receiver; the sharer is in :mod:`c2c.sharer`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel, StopStringCriteria

from c2c import kv_cache, rope
from c2c.adapters import with_adapter
from c2c.decoding import Decoding, prepare
from c2c.errors import CacheError, ContextLengthError, PromptError
from c2c.generation import FirstTokenTimer, PrefilledPrompt, unbatch
from c2c.identity import IdentityReader, ModelIdentity
from c2c.loading import load, unwrap
from c2c.messages import conversations
from c2c.prefill import EvaluationMode, next_logits, prefill
from c2c.probe import ProbedModel, cache_limit, prefill_rows, reads_rows_apart, rows_alone
from c2c.prompting import RenderOptions, encode, render, require_tokenizer
from c2c.rope import prompt_length, switch_length
from c2c.tokens import TokenBatch, as_list, left_pad, require_left_padding


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    states = inputs[0]
    return (states.reshape(-1).view(states.shape), *inputs[1:])  # a single row counts as contiguous with any stride


def _keep_head_whole(model: PreTrainedModel) -> None:
    """Let the language-model head read contiguous states.

    Models cut the last states out of a batch and hand on a view. With frozen weights torch then multiplies row by row,
    each with a copy of the whole head: seconds in bfloat16, and gigabytes for a large vocabulary.
    """
    head = model.get_output_embeddings()
    if head is not None and _contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_contiguous)


class StoredPrefills(Protocol):
    """Provide stored prefills of one model, such as :class:`~c2c.training.prefill_store.PrefillStore`."""

    def prefill(self, batch: TokenBatch, stop: int) -> Cache:
        """Return the cache of the first ``stop`` columns, ``[batch, kv_heads, stop, head_dim]`` per layer."""
        ...


class LanguageModel(ProbedModel):
    """Run a causal language model, frozen and in ``eval()`` mode.

    Raises:
        CacheError: the model has layers without a fusable KV cache, or rotates its keys in an unknown way.
    """

    role = "model"
    _identity: ModelIdentity | None = None  # where the weights are not here
    generates = True  # whether it can write text here; a sharer on another machine only shares its cache

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None, name: str | None = None) -> None:
        model = unwrap(model)
        kv_cache.check_model_layers(model.config)
        self.model = model.eval().requires_grad_(False)
        _keep_head_whole(self.model)
        self.tokenizer = tokenizer
        self.name = name or str(model.config._name_or_path or type(model).__name__)
        self.released = False
        self._mode = EvaluationMode(self.model)
        self._reader = IdentityReader()
        self.stored: StoredPrefills | None = None  # where prefills are taken from, if they are kept

    @classmethod
    def from_pretrained(
        cls, source: str | Path | PreTrainedModel | LanguageModel, *, adapter: str | Path | None = None, **kwargs: Any
    ) -> Self:
        """Load by alias, hub id, folder or GGUF file.

        Args:
            source: as in :func:`c2c.loading.load`; of a :class:`LanguageModel` the weights in memory are shared.
            adapter: folder of a LoRA adapter (PEFT) to use its base with, in place of its own if it has one.
            **kwargs: as in :func:`c2c.loading.load`.
        """
        if isinstance(source, LanguageModel):
            model, tokenizer, _ = load(source.model, **({"tokenizer": source.tokenizer} | kwargs))
            name = source.name
        else:
            model, tokenizer, name = load(source, **kwargs)
        return (
            cls(model, tokenizer, name)
            if adapter is None
            else cls(with_adapter(model, adapter), tokenizer, str(adapter))
        )

    def without_adapter(self) -> Self:
        """Return the base model in this role, around the same weights."""
        model = with_adapter(self.model, None)
        return type(self)(model, self.tokenizer, str(model.config._name_or_path))

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device = torch.device(self.model.device)
        if device.type != "meta":
            return device
        hooks = (getattr(module, "_hf_hook", None) for module in self.model.modules())  # accelerate brings weights in
        known = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((where for where in known if where is not None), device))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and so of the cache."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def context_length(self) -> int | None:
        """Positions that the model was made for, None where its config does not say."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    @property
    def identity(self) -> ModelIdentity:
        """Who this model is at this moment, for fusers and manifests: adapters may be switched, and weights change."""
        if self._identity is not None:
            return self._identity
        return self._reader.read(self.model, self.tokenizer, self.name, self.geometry)

    @identity.setter
    def identity(self, identity: ModelIdentity) -> None:
        """Set the identity of a model whose weights are not here."""
        self._identity = identity

    def probed(self) -> dict[str, Any]:
        """Return what is found out by running the model, for use without its weights."""
        names = ["geometry", "_probe", "_continuation_error"]
        with suppress(CacheError):  # of a rotation that no fuser here takes off
            _ = self.rope_scheme
            names.append("rope_scheme")
        return {name: getattr(self, name) for name in names} | {"_identity": self.identity}

    def release(self) -> None:
        """Free the weights, when every prefill that is needed is stored; the model can't run any more."""
        self.__dict__.update(self.probed())
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)
        self.released = True

    def rotary(self, positions: Tensor, length: int | Tensor | None = None) -> list[rope.Rotary] | None:
        """Return rotary tables of all KV layers at ``positions``, ``[batch, tokens]``, of prompts of ``length``.

        A tensor has the length of the prompt of each position, ``[batch or 1, tokens or 1]``.
        """
        if isinstance(length, Tensor):
            lengths = [] if switch_length(self.model) is None else length.unique().tolist()
            if not lengths:
                return self.rotary(positions)
            made = [self.rotary(positions.clamp_max(one - 1), one) for one in lengths]  # those beyond are of other rows
            chosen = made[0]
            for one, tables in zip(lengths[1:], made[1:], strict=True):
                if chosen is not None and tables is not None:
                    at = (length == one).to(positions.device).expand_as(positions)
                    chosen = rope.where(at, tables, chosen)
            return chosen
        with prompt_length(self.model, length):
            return rope.tables(self.model, positions, self.rope_scheme)

    def separates(self, batch: TokenBatch, more: int = 0) -> bool:
        """Whether rows of this batch, with ``more`` tokens to follow, must be read alone to be what they are alone."""
        return self.generates and not self.released and reads_rows_apart(self.model, batch, more)

    def encode(self, messages: Any, options: RenderOptions | None = None) -> TokenBatch:
        """Tokenise messages to a left-padded batch of this model's own tokens."""
        tokenizer = require_tokenizer(self.tokenizer, self.role)
        batch, _ = conversations(messages)
        options = options or RenderOptions()
        rows = [encode(tokenizer, render(tokenizer, conversation, options)).ids for conversation in batch]
        return left_pad(rows, int(tokenizer.pad_token_id or 0))

    def check_prompt(self, batch: TokenBatch) -> None:
        """Refuse a prompt that this model can't answer.

        Raises:
            PromptError: empty, right-padded, longer than the context, or with ids that the model does not have.
        """
        if batch.length == 0:
            raise PromptError("empty prompt: no token was given. Pass at least one.")
        if batch.padded:
            require_left_padding(batch.mask, self.role)
        self.check_tokens(batch)

    def check_tokens(self, batch: TokenBatch) -> None:
        """Refuse tokens that this model can't read.

        Raises:
            ContextLengthError: longer than the context.
            PromptError: ids that the model does not have.
        """
        words = self.model.get_input_embeddings().num_embeddings
        on_host = batch.ids.device.type == "cpu"  # a device is not asked
        ids = batch.ids.masked_fill(batch.slots, 0) if on_host else batch.ids
        low, high = (int(ids.min()), int(ids.max())) if on_host else (0, 0)
        if low < 0 or high >= words:
            raise PromptError(
                f"token ids from {low} to {high} for the {self.role} {self.name}, which "
                f"knows 0 to {words - 1}. Ids of another tokenizer? For text with two tokenizers use "
                "alignment by spans, or the published alignment with enabled=True."
            )
        limit = self.context_length
        if limit is not None and batch.length > limit:
            raise ContextLengthError(
                f"the prompt has {batch.length} tokens for the {self.role} {self.name}, which was made for {limit}. "
                "Shorten the prompt, or use a model with a longer context."
            )

    def empty_cache(self) -> Cache:
        """Make an empty cache for this model."""
        return kv_cache.empty_cache(self.model.config)

    def prefill(self, batch: TokenBatch, stop: int | None = None, cache: Cache | None = None) -> Cache:
        """Prefill the first ``stop`` columns (all by default), on ``cache`` where one is given; return the cache.

        Raises:
            CacheError: the weights were given back.
        """
        stop = batch.length if stop is None else stop
        if self.stored is not None and stop > 0 and not kv_cache.length(cache):
            return self.stored.prefill(batch, stop)
        return self.compute(batch, stop, cache)

    def compute(self, batch: TokenBatch, stop: int, cache: Cache | None = None) -> Cache:
        """Prefill as :meth:`prefill` does, by the model itself and not from what is stored."""
        if self.released:
            raise CacheError(
                f"the weights of the {self.role} {self.name} were given back after its prefills were stored, and this "
                "prompt is not among them. Load the model again."
            )
        self._mode.ensure()
        batch = batch.to(self.device)
        if self.separates(batch):
            return prefill_rows(self._prefill, batch, stop, cache)
        return self._prefill(batch, stop, cache)

    def _prefill(self, batch: TokenBatch, stop: int, cache: Cache | None) -> Cache:
        with prompt_length(self.model, None if switch_length(self.model) is None else int(batch.lengths.max())):
            return prefill(self.model, batch, stop, cache)

    @torch.no_grad()
    def prefill_messages(self, messages: Any, options: RenderOptions | None = None) -> PrefilledPrompt:
        """Render and prefill messages for this model alone; what :meth:`answer` decodes from.

        Raises:
            PromptError: empty or too long. CacheError: the model can't go on from a cache.
        """
        self.check_continuation()
        batch = self.encode(messages, options)
        self.check_prompt(batch)
        return PrefilledPrompt(self, batch, self.prefill(batch, batch.length - 1))

    def answer(self, messages: Any, *, options: RenderOptions | None = None, **kwargs: Any) -> Any:
        """Answer alone, without any fusion.

        Args:
            messages: a text, a conversation, or a batch of them.
            options: how to render the prompt.
            **kwargs: passed to ``generate``.

        Returns:
            A :class:`GenerationResult`, or a list of them for a batch or several return sequences.
        """
        timer = FirstTokenTimer()
        prompt = self.prefill_messages(messages, options)
        return unbatch(prompt.generate(timer, **kwargs), messages)

    def generate(
        self,
        batch: TokenBatch,
        cache: Cache,
        *,
        timer: FirstTokenTimer | None = None,
        fused: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Decode with the model's own ``generate`` from a prefilled cache.

        Args:
            batch: the whole prompt, left-padded.
            cache: covers the first columns of ``batch``, at most all but the last. It grows while generating.
            timer: measures the time of the first token, where rows end, and collects notes for the report.
            fused: the cache holds more than the model would make of the prompt, so it must not be made anew.
            **kwargs: whatever ``generate`` takes: sampling, beams, stop strings, streamers, logits processors; what
                does not go with a prefilled cache is in :mod:`c2c.decoding`.

        Returns:
            The new ids, ``[batch * num_return_sequences, new]``.

        Raises:
            CacheError: the cache covers the whole prompt or has other rows than ``batch``.
            PromptError: right-padded or over the context length; an argument that can't be followed.
        """
        self.check_prompt(batch)
        self._mode.ensure()
        batch = batch.to(self.device)
        self._check_cache(batch, cache)
        timer = timer or FirstTokenTimer()
        limits = [self.table_limit, cache_limit(self.model, batch.length) if fused else None]
        limit = min((limit for limit in limits if limit is not None), default=None)
        decoding = prepare(self.model, batch, kwargs, limit)
        if self.separates(batch, decoding.config.max_new_tokens or 0):
            return self._generate_rows(batch, cache, timer, decoding, fused, kwargs)
        self._add_stops(decoding)
        kv_cache.repeat(cache, decoding.copies)  # generate repeats ids and mask, but not a cache given to it
        timer.watch(decoding.arguments, decoding.config)
        timer.notes += decoding.notes
        if decoding.config.max_time is not None:
            decoding.config.max_time = max(decoding.config.max_time - (time.perf_counter() - timer.began), 0.0)
        ids = batch.ids.masked_fill(batch.slots, 0)
        prompt = {} if batch.natural else {"position_ids": batch.positions}
        prompt |= {"input_ids": ids, "attention_mask": batch.mask.long()}
        new = decoding.run(self.model, past_key_values=cache, **prompt)[:, batch.length :]
        self._check_decoded(batch, cache, timer, decoding, new, fused)
        return new

    def _add_stops(self, decoding: Decoding) -> None:
        """Let the timer see stop strings: ``generate`` itself does not say where a row met one."""
        stops, decoding.config.stop_strings = decoding.config.stop_strings, None
        tokenizer = decoding.arguments.pop("tokenizer", None)
        if stops:
            tokenizer = tokenizer or require_tokenizer(self.tokenizer, self.role)
            decoding.add_criteria(StopStringCriteria(tokenizer, stops))

    def _check_decoded(
        self, batch: TokenBatch, cache: Cache, timer: FirstTokenTimer, decoding: Decoding, new: Tensor, fused: bool
    ) -> None:
        """Refuse an answer that was cut off, or decoded from another cache than the fused one."""
        if fused and kv_cache.length(cache) < batch.length + new.shape[1] - 1:
            raise CacheError(
                f"the {self.role} {self.name} left the fused cache while it decoded, and read the prompt anew: the "
                "answer would be its own. Generate fewer tokens, or leave custom_generate out."
            )
        room = decoding.room
        if room is not None and any(
            row.numel() == room and not timer.ended(row, index) for index, row in enumerate(timer.trim(new))
        ):
            raise ContextLengthError(
                f"the prompt has {batch.length} tokens, and the {self.role} {self.name} can go on for {room} more from "
                f"this cache; the answer had not ended there. Pass max_new_tokens={room}, or shorten the prompt."
            )

    def _generate_rows(
        self,
        batch: TokenBatch,
        cache: Cache,
        timer: FirstTokenTimer,
        decoding: Decoding,
        fused: bool,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Decode row by row, for a model whose batch is not its single runs."""
        if batch.rows > 1 and kwargs.get("streamer") is not None:
            raise PromptError("a streamer can follow one conversation only. Pass one at a time.")
        answers: list[Tensor] = []
        for index, (row, own) in enumerate(rows_alone(batch, cache)):
            part = FirstTokenTimer(timer.began)
            arguments = decoding.for_row(kwargs, index)
            new = self.generate(row, own or self.empty_cache(), timer=part, fused=fused, **arguments)
            answers += part.trim(new)
            timer.first = timer.first or part.first
        timer.notes += [*part.notes, "the rows were decoded one by one: this model computes a batch otherwise"]
        timer.lengths = [answer.numel() for answer in answers]
        return pad_sequence(answers, batch_first=True, padding_value=decoding.config.pad_token_id).to(self.device)

    @torch.no_grad()
    def next_logits(self, batch: TokenBatch, cache: Cache) -> Tensor:
        """Run the rest of the prompt on ``cache``, which grows; return the logits after it, ``[batch, vocab]``."""
        self._check_cache(batch, cache)
        batch = batch.to(self.device)
        if self.separates(batch):
            rows = [(row, own or self.empty_cache()) for row, own in rows_alone(batch, cache)]
            self.prefill(batch, cache=cache)
            return torch.cat([next_logits(self.model, *row) for row in rows])
        return next_logits(self.model, batch, cache)

    @property
    def ends(self) -> list[int]:
        """Tokens that end what the model writes."""
        return as_list(self.model.generation_config.eos_token_id)

    def texts(self, ids: Iterable[Tensor]) -> list[str]:
        """Decode rows of new ids to texts without special tokens; to empty texts without a tokenizer."""
        decode = (lambda *_, **__: "") if self.tokenizer is None else self.tokenizer.decode
        return [str(decode(row, skip_special_tokens=True)) for row in ids]

    def _check_cache(self, batch: TokenBatch, cache: Cache) -> None:
        kv_cache.check_layers(cache)
        held = kv_cache.length(cache)
        if held >= batch.length:
            raise CacheError(
                f"the cache covers {held} tokens and the prompt has {batch.length}: nothing is left to predict, and "
                f"`generate` would read the prompt twice. Cut it to {batch.length - 1} tokens: kv_cache.crop(cache, n)."
            )
        rows = kv_cache.layer(cache, 0)[0].shape[0] if held else batch.rows
        if rows != batch.rows:
            raise CacheError(f"the cache has {rows} rows, the prompt {batch.rows}.")


class Receiver(LanguageModel):
    """Decode from a fused cache with the model's own ``generate``."""

    role = "receiver"
