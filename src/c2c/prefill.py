"""Prefill: run a frozen model over prompt tokens and keep its KV cache; the only module that passes positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from c2c import kv_cache
from c2c.rope import prompt_length, reading_steps, switch_length
from c2c.tokens import TokenBatch


class EvaluationMode:
    """Keep a model in ``eval()`` mode at little cost: its modules are listed anew only where some were replaced."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._modules: list[nn.Module] = []
        self._children: list[tuple[dict[str, nn.Module | None], list[nn.Module | None]]] = []

    def ensure(self) -> None:
        """Leave training mode, which a caller may have entered, also in layers of an adapter that was added later."""
        if not self._modules or any([list(held.values()) != known for held, known in self._children]):  # noqa: C419
            self._modules = list(self._model.modules())
            inside = [module._modules for module in self._modules]
            self._children = [(held, list(held.values())) for held in inside if held]
        if any([module.training for module in self._modules]):  # noqa: C419  a list is built faster
            self._model.eval()


@torch.no_grad()
def prefill(model: PreTrainedModel, batch: TokenBatch, stop: int, cache: Cache | None = None) -> Cache:
    """Extend ``cache`` (empty by default) to the first ``stop`` columns of ``batch``; the cache is changed.

    The decoder is called without its language-model head: no logits are needed here, and a head over 150,000 words
    costs a tenth of the prefill of a small model.

    Returns:
        The cache, whose layers hold ``[batch, kv_heads, stop, head_dim]``.
    """
    cache = kv_cache.empty_cache(model.config) if cache is None else cache
    start = kv_cache.length(cache)
    if start < stop:
        model.get_decoder()(
            input_ids=batch.ids[:, start:stop],
            attention_mask=batch.mask_until(stop),
            position_ids=batch.positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
    return cache


def last_output(
    model: PreTrainedModel, cache: Cache, positions: Tensor, *, logits: bool = False, **inputs: Tensor
) -> Tensor:
    """Run new tokens or embeddings on a cache, which grows, of rows without padding.

    Args:
        model: the model.
        cache: what was read before.
        positions: of the new columns, ``[batch, new]``.
        logits: whether the head is run.
        **inputs: ``input_ids``, ``[batch, new]``, or ``inputs_embeds``, ``[batch, new, hidden]``.

    Returns:
        Of the last column the state after the final norm, ``[batch, hidden]``, or the logits, ``[batch, vocab]``.
    """
    inputs |= {"position_ids": positions}
    if logits:
        last: Tensor = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    else:
        last = model.get_decoder()(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
    return last[:, -1]


def next_logits(model: PreTrainedModel, batch: TokenBatch, cache: Cache) -> Tensor:
    """Run the columns that ``cache`` does not hold yet and return the logits after the last, ``[batch, vocab]``."""
    start = kv_cache.length(cache)
    mask = batch.mask_until(batch.length)
    return logits_after(model, batch.ids[:, start:], mask, batch.positions[:, start:], cache, keep=1)[:, -1]


def continued_logits(model: PreTrainedModel, batch: TokenBatch, ids: Tensor, real: Tensor, cache: Cache) -> Tensor:
    """Run the last column of ``batch`` and the tokens that follow it; the cache is changed.

    Args:
        model: the model.
        batch: the prompts.
        ids: what follows them, ``[batch, read]``, right-padded.
        real: False on padding, ``[batch, read]``.
        cache: all columns of ``batch`` but the last.

    Returns:
        The logits after the last prompt token and after each of ``ids``, ``[batch, read + 1, vocab]``.
    """
    from c2c.probe import reads_rows_apart, rows_alone  # which reads tiny prompts with this module

    if reads_rows_apart(model, batch, ids.shape[1]):
        rows = [(row, own or kv_cache.empty_cache(model.config)) for row, own in rows_alone(batch, cache)]
        alone = ((row, ids[i : i + 1], real[i : i + 1], own) for i, (row, own) in enumerate(rows))
        return torch.cat([continued_logits(model, *arguments) for arguments in alone])
    new = torch.cat([batch.ids[:, -1:], ids], dim=1)
    mask = torch.cat([batch.mask, real], dim=1)
    positions = batch.positions[:, -1:] + torch.arange(new.shape[1], device=new.device)
    return logits_after(model, new, mask, positions, cache, following=ids.shape[1])


def logits_after(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    cache: Cache | None,
    keep: int = 0,
    following: int = 0,
) -> Tensor:
    """Run new tokens on a cache, which grows, or without one.

    Args:
        model: the model.
        ids: the new tokens, ``[batch, new]``.
        mask: False on padding, over the cache and the new tokens, ``[batch, cached + new]``; None where there is none,
            which keeps the causal fast path of the attention kernels.
        positions: of the new tokens, ``[batch, new]``.
        cache: what was read before.
        keep: logits of so many last tokens; 0 for all.
        following: how many of the last columns follow the prompt; they are rotated as decoding rotates them.

    Returns:
        Logits after each token kept, ``[batch, keep or new, vocab]``.
    """
    steps, count, logits = reading_steps(model, positions, following), ids.shape[1], list[Tensor]()
    if cache is None and len(steps) > 1:
        cache = kv_cache.empty_cache(model.config)
    wanted = count - (keep or count)
    for step in steps:
        length = None if switch_length(model) is None else int(positions[:, step].max()) + 1
        with prompt_length(model, length):
            out = model(
                input_ids=ids[:, step],
                attention_mask=None if mask is None else mask[:, : mask.shape[1] - count + step.stop].long(),
                position_ids=positions[:, step],
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=min(step.stop - wanted, step.stop - step.start) if step.stop > wanted else 1,
            )
        if step.stop > wanted:
            logits.append(out.logits)
    return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)
