"""Batch probe: find out whether a model computes the rows of a left-padded batch as it computes them alone.

Some models count positions by columns, padding included, and do not say so: a tiny prefill shows it. Others choose
their rotary frequencies by the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from c2c import kv_cache
from c2c.errors import PromptError
from c2c.prefill import next_logits, prefill
from c2c.rope_scaling import switch_length
from c2c.tokens import TokenBatch, left_pad

_found: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def takes_padding(model: PreTrainedModel) -> bool:
    """Whether a row of a left-padded batch is what it is alone; found out by tiny prefills, once for each model."""
    if model not in _found:
        _found[model] = _probe(model)
    return _found[model]


def reads_rows_apart(model: PreTrainedModel, batch: TokenBatch, more: int = 0) -> bool:
    """Whether a batch must be read row by row to be what its rows are alone.

    Args:
        model: the model.
        batch: the batch.
        more: tokens that will follow it.
    """
    if not batch.padded:
        return False
    switch = switch_length(model) if batch.rows > 1 else None
    return (switch is not None and batch.length + more > switch) or not takes_padding(model)


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
def _probe(model: Any) -> bool:
    words = int(model.get_input_embeddings().num_embeddings)
    rows = [[(3 + 7 * index) % words for index in range(length)] for length in (6, 3)]
    alone = [_prefilled(model, left_pad([row], 0)) for row in rows]
    try:
        logits, entries = _prefilled(model, left_pad(rows, 0))
    except (RuntimeError, ValueError, IndexError, TypeError):  # a model that takes no padding at all
        return False
    return all(
        _same(logits[row : row + 1], own)
        and all(_same(x[row : row + 1, :, -y.shape[2] :], y) for x, y in zip(entries, kept, strict=True))
        for row, (own, kept) in enumerate(alone)
    )


def _prefilled(model: PreTrainedModel, batch: TokenBatch) -> tuple[Tensor, list[Tensor]]:
    """Read all but the last token, then the last; return the logits after it and all entries before it."""
    batch = batch.to(model.device)
    cache = prefill(model, batch, batch.length - 1)
    entries = [entry.clone() for layer in kv_cache.layers(cache) for entry in layer]
    return next_logits(model, batch, cache), entries


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by rounding only; a position that is off changes a tenth of their norm and more."""
    tolerance = 0.05 if other.dtype in (torch.float32, torch.float64) else 0.1
    one, other = one.float().cpu(), other.float().cpu()
    return bool((one - other).norm() <= tolerance * other.norm() + 1e-6)
