"""Batch probe: find out whether a model computes the rows of a left-padded batch as it computes them alone.

Some models count positions by columns, padding included; others look at all tokens of a prompt, so that it can't be
read in parts. Neither says so: a tiny prefill shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from c2c import kv_cache
from c2c.errors import PromptError
from c2c.prefill import logits_after, next_logits, prefill
from c2c.rope_scaling import switch_length
from c2c.tokens import TokenBatch, left_pad


@dataclass(frozen=True)
class Probe:
    """Hold what a model's tiny prefills have shown.

    Attributes:
        parts: a prompt that is read in parts, on a cache, gives the same logits as one that is read at once.
        padding: so does a row of a left-padded batch.
    """

    parts: bool
    padding: bool


_found: WeakKeyDictionary[PreTrainedModel, Probe] = WeakKeyDictionary()


def probe(model: PreTrainedModel) -> Probe:
    """Return what the model's tiny prefills show; they run once for each model."""
    if model not in _found:
        _found[model] = _run(model)
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
    return (switch is not None and batch.length + more > switch) or not probe(model).padding


def rows_alone(batch: TokenBatch, cache: Cache | None = None) -> Iterator[tuple[TokenBatch, Cache | None, int]]:
    """Yield every row without its padding, its part of the cache (None where nothing is in it), and the padding.

    Raises:
        PromptError: a row has masked tokens behind real ones.
    """
    held = kv_cache.length(cache) if cache is not None and cache.layers else 0
    for index, mask in enumerate(batch.mask):
        pad = int(mask.int().argmax())
        if not bool(mask[pad:].all()):
            raise PromptError(
                f"row {index} has masked tokens behind real ones, and this model takes positions from columns. Leave "
                "out what is masked."
            )
        row = replace(
            batch,
            ids=batch.ids[index : index + 1, pad:],
            mask=batch.mask[index : index + 1, pad:],
            positions=batch.positions[index : index + 1, pad:],
            padded=False,
        )
        own = None
        if cache is not None and held > pad:
            own = kv_cache.from_layers(
                (keys[index : index + 1, :, pad:], values[index : index + 1, :, pad:])
                for keys, values in kv_cache.layers(cache)
            )
        yield row, own, pad


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
    cache = kv_cache.empty_cache() if cache is None else cache
    held = kv_cache.length(cache) if cache.layers else 0
    if held >= stop:
        return cache
    rows = [run(row, stop - pad, own) if stop > pad else None for row, own, pad in rows_alone(batch, cache)]
    filled = next(row for row in rows if row is not None)

    def join(layer: int, side: int) -> Tensor:
        like = kv_cache.layer(filled, layer)[side]
        parts = [like[:, :, :0] if row is None else kv_cache.layer(row, layer)[side] for row in rows]
        wide = [torch.nn.functional.pad(part, (0, 0, stop - part.shape[2], 0)) for part in parts]
        return torch.cat(wide)[:, :, held:]

    entries = [(join(layer, 0), join(layer, 1)) for layer in range(len(filled.layers))]
    if held:
        return kv_cache.append(cache, entries)
    for layer, (keys, values) in enumerate(entries):
        cache.update(keys, values, layer)
    return cache


@torch.no_grad()
def _run(model: Any) -> Probe:
    words = int(model.get_input_embeddings().num_embeddings)
    rows = [[(3 + 7 * index) % words for index in range(length)] for length in (6, 3)]
    alone = [_prefilled(model, left_pad([row], 0)) for row in rows]
    long = left_pad(rows[:1], 0).to(model.device)
    whole = logits_after(model, long.ids, None, long.positions, None, keep=1)[:, -1]
    parts = _same(alone[0][0], whole)
    try:
        logits, entries = _prefilled(model, left_pad(rows, 0))
    except (RuntimeError, ValueError, IndexError, TypeError):  # a model that takes no padding at all
        return Probe(parts, padding=False)
    same = all(
        _same(logits[row : row + 1], own)
        and all(_same(x[row : row + 1, :, -y.shape[2] :], y) for x, y in zip(entries, kept, strict=True))
        for row, (own, kept) in enumerate(alone)
    )
    return Probe(parts, padding=same)


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
