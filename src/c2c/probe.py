"""Probes: find out by tiny prefills what a model keeps of each token, and how; configs do not tell.

They read the shape of the cache, how keys are rotated, whether a prompt may be read in parts, and whether a row of a
left-padded batch is what it is alone: some models count positions by columns, others choose their rotary frequencies
by the longest row.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel

from c2c import kv_cache, rope
from c2c.errors import CacheError, PromptError
from c2c.prefill import prefill
from c2c.rope import switch_length
from c2c.tokens import TokenBatch, left_pad

_POSITIONS = (0, 7, 100)
_found: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


class ProbedModel:
    """What tiny prefills have shown about a model, each run once."""

    model: Any
    name: str
    role: str

    if TYPE_CHECKING:

        @property
        def device(self) -> torch.device: ...  # noqa: D102

        @property
        def dtype(self) -> torch.dtype: ...  # noqa: D102

        @property
        def context_length(self) -> int | None: ...  # noqa: D102

    @cached_property
    def geometry(self) -> kv_cache.KVGeometry:
        """Shape of the KV cache, read from a one-token prefill: configs of some families do not tell."""
        return kv_cache.geometry(self._probe)

    @cached_property
    def left_out(self) -> dict[int, str]:
        """Layers of the model that keep no keys and values to fuse, with the reason."""
        return kv_cache.left_out(self._probe)

    @cached_property
    def layer_numbers(self) -> list[int]:
        """The model's own number of each KV layer."""
        return kv_cache.kv_layers(self._probe)

    @cached_property
    def _probe(self) -> Cache:
        """The cache of one token at several positions, each alone in its row."""
        positions = self._probe_positions
        ids = torch.ones_like(positions)
        batch = TokenBatch(ids, ids.bool(), positions, padded=False)
        kind = type(self.model).__name__
        try:
            cache = prefill(self.model, batch.to(self.device), stop=1)
        except Exception as error:  # whatever a model raises that does not take a plain cache
            raise CacheError(
                f"{self.name}: {kind} can't be run with a transformers DynamicCache: "
                f"{type(error).__name__}: {error}. Use a decoder-only model that can."
            ) from error
        if (held := kv_cache.length(cache)) > 1:
            raise CacheError(
                f"{self.name}: {kind} keeps {held} entries of a prompt of one token: it puts tokens of its own before "
                "a prompt, and its cache can't be aligned with the tokens. Use a model that keeps one for each token."
            )
        return cache

    @property
    def _probe_positions(self) -> Tensor:
        last = (self.context_length or max(_POSITIONS) + 1) - 1
        return torch.tensor([min(position, last) for position in _POSITIONS]).unsqueeze(1)

    @cached_property
    def rope_scheme(self) -> rope.Scheme:
        """How every KV layer rotates its keys, found out by a probe.

        Raises:
            CacheError: a layer rotates in none of the known ways; the model holds no weights.
        """
        if self.device.type == "meta":
            raise CacheError(f"{self.name} is on the device 'meta', which holds no weights. Load it on cpu or cuda.")
        keys = [keys for keys, _ in kv_cache.layers(self._probe)]
        return rope.find_scheme(self.model, keys, self._probe_positions.to(self.device), self.name)

    @cached_property
    def table_limit(self) -> int | None:
        """The longest text that a model with a table of positions can make; None where there is no table."""
        length = self.context_length
        tables = chain(self.model.named_parameters(), self.model.named_buffers())
        for name, table in tables if length else ():
            is_table = re.search(r"wpe|position|pos_(emb|enc)", name)
            if is_table and table.dim() > 1 and 0 <= table.shape[0] - (length or 0) <= 4:
                return (length or 0) + 1  # the last token is written and not read
        return None

    def answer_limit(self, tokens: int) -> int | None:
        """Return the longest text, answer included, that follows from a fused cache of so many tokens."""
        limits = [limit for limit in (self.context_length, cache_limit(self.model, tokens)) if limit is not None]
        return min(limits, default=None)

    def check_rotary(self) -> None:
        """Make sure that the rotation can be taken off this model's keys; raises as :attr:`rope_scheme` does."""
        _ = self.rope_scheme

    def check_continuation(self) -> None:
        """Make sure that a prompt read in two parts gives the cache of one read at once, as fusing needs it.

        Raises:
            CacheError: it does not: tokens attend to later ones, or the model loses its state between the parts.
        """
        if self._continuation_error is not None:
            raise CacheError(f"{self.name} can't be a receiver: {self._continuation_error}. Use it as the sharer.")

    @cached_property
    def _continuation_error(self) -> str | None:
        batch, kind = left_pad([[1, 2, 3, 4]], 0).to(self.device), type(self.model).__name__
        try:
            whole, parts = prefill(self.model, batch, 4), prefill(self.model, batch, 4, prefill(self.model, batch, 2))
        except Exception as error:  # whatever a model raises whose cache can't be continued
            return f"{kind} can't read a prompt in two parts ({type(error).__name__}: {error})"
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.1
        for once, twice in zip(kv_cache.layers(whole), kv_cache.layers(parts), strict=True):
            if not all(torch.dist(a, b) <= tolerance * a.norm() for a, b in zip(once, twice, strict=True)):
                return (
                    f"keys and values of a prompt read in two parts are not those of one read at once ({kind} attends "
                    "to later tokens, or loses its state between calls of several tokens)"
                )
        return None

    def check_private_context(self) -> None:
        """Make sure that entries can be added to all attention layers.

        Raises:
            CacheError: some have another shape, so that they would hold fewer tokens than the others.
        """
        if other := kv_cache.other_attention_layers(self._probe):
            raise CacheError(
                f"{self.name} takes no private context: its attention layers {other} have keys and values of another "
                "shape than the rest, and entries are made for one shape. Use a fuser of shared context, or another "
                "receiver."
            )


def takes_padding(model: PreTrainedModel) -> bool:
    """Whether a row of a left-padded batch is what it is alone; found out by tiny prefills, once for each model."""
    if model not in _found:
        _found[model] = _probe_padding(model)
    return _found[model]


def reads_rows_apart(model: PreTrainedModel, batch: TokenBatch, more: int = 0) -> bool:
    """Whether a batch must be read row by row to be what its rows are alone.

    Args:
        model: the model.
        batch: the batch.
        more: tokens that will follow it.
    """
    lengths = batch.whole or (batch.length,)
    if not batch.padded and len(set(lengths)) == 1:
        return False
    switch = switch_length(model) if batch.rows > 1 else None
    if switch is not None and max(lengths) + more > switch:
        return True
    return batch.padded and not takes_padding(model)


def rows_alone(batch: TokenBatch, cache: Cache | None = None) -> Iterator[tuple[TokenBatch, Cache | None]]:
    """Yield every row without its padding, and its part of the cache; None where nothing is in it.

    Raises:
        PromptError: a row has masked tokens behind real ones.
    """
    for index, mask in enumerate(batch.mask):
        pad = int(mask.int().argmax())
        if not bool(mask[pad:].all()):
            raise PromptError(
                f"row {index} has masked tokens behind real ones, and this model takes positions from columns. Leave "
                "out what is masked."
            )
        row = batch.select([index])
        row = replace(row, ids=row.ids[:, pad:], mask=row.mask[:, pad:], positions=row.positions[:, pad:], padded=False)
        if cache is None or kv_cache.length(cache) <= pad:
            yield row, None
        else:
            yield row, kv_cache.drop_padding(kv_cache.select_rows(cache, torch.tensor([index])), pad)


def prefill_rows(
    run: Callable[[TokenBatch, int, Cache | None], Cache], batch: TokenBatch, stop: int, cache: Cache | None
) -> Cache:
    """Extend a cache to the first ``stop`` columns row by row; the cache is changed.

    Args:
        run: prefills one row without padding.
        batch: the batch.
        stop: columns to read, padding included.
        cache: of the first columns of ``batch``.
    """
    held = kv_cache.length(cache)
    if cache is not None and held >= stop:
        return cache
    rows = [(row, own, stop - (batch.length - row.length)) for row, own in rows_alone(batch, cache)]
    filled = [run(row, own_stop, own) if own_stop > 0 else None for row, own, own_stop in rows]
    empty = kv_cache.crop(next(one for one in filled if one is not None), 0) if None in filled else None
    joined = kv_cache.stack([one or empty for one in filled], stop)  # type: ignore[misc]
    if cache is None:
        return joined
    if held or kv_cache.stateful(joined):
        cache.layers = joined.layers
    else:
        for layer, entries in zip(kv_cache.kv_layers(joined), kv_cache.layers(joined), strict=True):
            cache.update(*entries, layer)
    return cache


@torch.no_grad()
def _probe_padding(model: Any) -> bool:
    with torch.autocast(model.device.type, enabled=False):  # a training step may be the first to ask
        return _reads_padding(model)


def _reads_padding(model: Any) -> bool:
    words = int(model.get_input_embeddings().num_embeddings)
    rows = [[(3 + 7 * index) % words for index in range(length)] for length in (6, 3)]
    alone = [_started(model, left_pad([row], 0)) for row in rows]
    try:
        logits, entries = _started(model, left_pad(rows, 0))
    except (RuntimeError, ValueError, IndexError, TypeError):  # a model that takes no padding at all
        return False
    return all(
        _same(logits[row : row + 1], own)
        and all(_same(x[row : row + 1, :, -y.shape[2] :], y) for x, y in zip(entries, kept, strict=True))
        for row, (own, kept) in enumerate(alone)
    )


def _started(model: Any, batch: TokenBatch) -> tuple[Tensor, list[Tensor]]:
    """Read all but the last token and start to decode; return the logits after the last, and all entries before it.

    By ``generate``, since that leaves out positions where the head of a model does not name them (Whisper).
    """
    batch = batch.to(model.device)
    cache = prefill(model, batch, batch.length - 1)
    entries = [entry.clone() for layer in kv_cache.layers(cache) for entry in layer]
    shell = copy.copy(model)  # generates without the options of its checkpoint
    shell.generation_config = GenerationConfig(pad_token_id=0, max_new_tokens=1)
    shown = {"return_dict_in_generate": True, "output_logits": True, "past_key_values": cache}
    return shell.generate(batch.ids, attention_mask=batch.mask.long(), **shown).logits[0], entries


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by rounding only; a position that is off changes a tenth of their norm and more."""
    tolerance = 0.005 if other.dtype in (torch.float32, torch.float64) else 0.1
    one, other = one.float().cpu(), other.float().cpu()
    return bool((one - other).norm() <= tolerance * other.norm() + 1e-6)


def cache_limit(model: Any, tokens: int) -> int | None:
    """Return the longest text that a model makes from the cache of a prompt of so many tokens.

    Phi-3 and its kin drop the cache when the text grows beyond the length from which on they rotate otherwise, and read
    all of it again, which nobody can do for a fused cache.
    """
    own = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    length = getattr(model.config, "original_max_position_embeddings", None) if own else None
    return int(length) + 1 if length is not None and tokens <= length + 1 else None
