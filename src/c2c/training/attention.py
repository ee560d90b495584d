"""Attention that the entries of a cache receive: weights for fitting a linear fuser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from c2c import kv_cache
from c2c.errors import FuserError
from c2c.language_model import LanguageModel
from c2c.tokens import TokenBatch


@torch.no_grad()
def attention_received(receiver: LanguageModel, prompt: TokenBatch, cache: Cache, responses: Tensor) -> list[Tensor]:
    """Compute how much attention each prompt entry gets from the tokens that will read the fused cache.

    These are the last prompt token and the response: the receiver reads the rest of the prompt before it is fused. A
    head with attention ``a`` that reads values with errors ``e`` is off by at most ``sum_i a_i |e_i|^2``, squared. So
    with this weight ridge regression minimises a bound on the error of the attention output, as far as values go; for
    keys it is a heuristic.

    Costs one pass of the receiver over last prompt token and responses, with eager attention, since no other returns
    probabilities; the model's own implementation is restored afterwards.

    Args:
        receiver: the receiver.
        prompt: its prompts.
        cache: its cache of all but the last prompt token; not changed.
        responses: ids of the responses, ``[batch, response]``, -100 on padding.

    Returns:
        For every receiver layer ``[batch, tokens]``: attention on the clean cache, mean over readers and heads.

    Raises:
        FuserError: the receiver's eager attention returns no probabilities.
    """
    ids = torch.cat([prompt.ids[:, -1:], responses[:, :-1].clamp_min(0)], dim=1)
    mask = torch.cat([prompt.mask, responses[:, :-1] != -100], dim=1)
    decoder: Any = receiver.model.get_decoder()
    with _eager_attention(decoder):
        out = decoder(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=prompt.positions[:, -1:] + torch.arange(ids.shape[1], device=ids.device),
            past_key_values=kv_cache.from_layers(kv_cache.layers(cache)),  # a copy: it grows
            use_cache=True,
            output_attentions=True,
        )
    if not out.attentions or any(layer is None for layer in out.attentions):
        raise FuserError(f"{receiver.name} returns no attention probabilities: fit with linear_weight 'none'.")
    reads = (responses != -100).unsqueeze(-1)  # tokens that predict a token of the response
    share = reads / reads.sum(1, keepdim=True)
    return [(layer.float().mean(1) * share).sum(1)[:, : prompt.length - 1] for layer in out.attentions]


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
