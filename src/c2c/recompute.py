"""Recompute part of a receiver's entries that were copied: some layers of a document, or some of its tokens.

A variant (a fine-tune, another LoRA adapter) reads as the receiver does, but for some layers. The receiver runs these
over the document's tokens on its own cache, and takes the entries of the others as they are (DroidSpeak, Liu et al.
2024, arXiv:2411.02820). Layers from 0 on start at the token ids; layers from ``first`` on at the variant's hidden state
there, ``[1, tokens, hidden]``, which its prefill keeps.

A document that now stands behind other tokens than it was read behind differs most in its first tokens. All of these,
of several documents, are computed anew in one pass (EPIC, Hu et al. 2024, arXiv:2410.15332).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from c2c import kv_cache
from c2c.errors import CacheError
from c2c.kv_cache import KeyValue
from c2c.rope import prompt_length
from c2c.tokens import TokenBatch, left_pad

if TYPE_CHECKING:
    from c2c.language_model import LanguageModel

LayerRange = tuple[int, int]
_known: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()
_masked: WeakKeyDictionary[PreTrainedModel, dict[str, bool]] = WeakKeyDictionary()  # by attention implementation


def check_range(layers: Any, count: int) -> LayerRange:
    """Return ``(first, stop)`` of the layers to recompute.

    Raises:
        CacheError: not two whole numbers with ``0 <= first < stop <= count``.
    """
    pair = tuple(layers) if isinstance(layers, list | tuple) else ()
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in pair)
    if len(pair) != 2 or not whole or not 0 <= pair[0] < pair[1] <= count:
        raise CacheError(
            f"recompute is {layers!r}; expected the first layer and the one after the last, such as (0, {count // 2}), "
            f"of a model with {count} layers."
        )
    return pair[0], pair[1]


@torch.no_grad()
def recompute_layers(
    model: LanguageModel,
    tokens: TokenBatch,
    column: int,
    ids: Tensor,
    layers: LayerRange,
    cache: Cache,
    hidden: Tensor | None = None,
) -> list[KeyValue]:
    """Compute the entries of some layers for a document that begins at ``column``.

    Args:
        model: the receiver.
        tokens: its whole prompt, one row, with a column for each token of the document.
        column: where the document begins.
        ids: the document's tokens, ``[document]``.
        layers: the first layer and the one after the last.
        cache: everything before ``column``; it is not changed.
        hidden: the variant's hidden states at the first of the layers, ``[1, document, hidden]``; None for layer 0.

    Returns:
        Keys with rotation and values of these layers, ``[1, kv_heads, document, head_dim]`` each.

    Raises:
        CacheError: the model's layers can't be run one by one (with the reason), or ``hidden`` is missing.
    """
    check_layerwise(model)
    first, stop = check_range(layers, model.geometry.layers)
    if first and hidden is None:
        raise CacheError(
            f"layers from {first} on are recomputed from the sharer's hidden states there, and none were handed over. "
            f"Read with keep_hidden={first}, or recompute from layer 0."
        )
    with prompt_length(model.model, tokens.length):
        return _run(model.model, tokens.to(model.device), column, ids.to(model.device), (first, stop), cache, hidden)


def _run(
    model: PreTrainedModel,
    tokens: TokenBatch,
    column: int,
    ids: Tensor,
    layers: LayerRange,
    cache: Cache,
    hidden: Tensor | None,
) -> list[KeyValue]:
    first, stop = layers
    end = column + len(ids)
    decoder: Any = model.get_decoder()
    grown = kv_cache.view(cache)
    given = (
        {"input_ids": ids.unsqueeze(0)}
        if not first
        else {"inputs_embeds": None if hidden is None else hidden.to(model.device, model.dtype)}
    )
    _with_layers(decoder, [*map(_skipped, decoder.layers[:first]), *decoder.layers[first:stop]])(
        **given,
        attention_mask=tokens.mask_until(end),
        position_ids=tokens.positions[:, column:end],
        past_key_values=grown,
        use_cache=True,
    )
    found = kv_cache.layers(grown)
    found = found[first:stop] if column else found  # without anything before, only these layers hold entries
    return [(keys[:, :, column:], values[:, :, column:]) for keys, values in found]


@torch.no_grad()
def recompute_tokens(model: LanguageModel, tokens: TokenBatch, spans: Sequence[LayerRange], cache: Cache) -> None:
    """Compute the entries of some columns anew and put them in the place of those that the cache holds.

    Each attends to all that stands before it, and to those of ``spans`` as they are computed here.

    Args:
        model: the receiver.
        tokens: its whole prompt, one row.
        spans: ``(first, stop)`` of columns with tokens, in ascending order.
        cache: of the prompt up to the last of them at least; its tensors are replaced, not written to.
    """
    if not spans:
        return
    tokens = tokens.to(model.device)
    if len(spans) > 1 and _takes_masks(model, kv_cache.length(cache)):
        columns = torch.cat([torch.arange(*span, device=model.device) for span in spans])
        with prompt_length(model.model, tokens.length):
            _put(cache, columns, _in_one_pass(model.model, tokens, columns, cache))
        return
    for start, stop in spans:
        grown = model.prefill(tokens, stop, kv_cache.crop(cache, start))
        columns = torch.arange(start, stop, device=model.device)
        _put(cache, columns, [(keys[:, :, start:], values[:, :, start:]) for keys, values in kv_cache.layers(grown)])


def _in_one_pass(model: PreTrainedModel, tokens: TokenBatch, columns: Tensor, cache: Cache) -> list[KeyValue]:
    """Run the tokens of ``columns`` behind the whole cache; a mask hides what comes later, and their old entries."""
    held = kv_cache.length(cache)
    old = torch.arange(held, device=columns.device)
    seen = torch.cat([(old < columns[:, None]) & ~torch.isin(old, columns), columns <= columns[:, None]], 1)
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=columns.device)
    grown = kv_cache.view(cache)
    model.get_decoder()(
        input_ids=tokens.ids[:, columns],
        attention_mask=mask.masked_fill_(~seen, torch.finfo(model.dtype).min)[None, None],
        position_ids=tokens.positions[:, columns],
        past_key_values=grown,
        use_cache=True,
    )
    return [(keys[:, :, held:], values[:, :, held:]) for keys, values in kv_cache.layers(grown)]


def _put(cache: Cache, columns: Tensor, entries: Sequence[KeyValue]) -> None:
    for index, (new_keys, new_values) in enumerate(entries):
        keys, values = kv_cache.layer(cache, index)
        keys, values = keys.index_copy(2, columns, new_keys), values.index_copy(2, columns, new_values)
        kv_cache.set_layer(cache, index, keys, values)


@torch.no_grad()
def prefill_with_hidden(
    model: LanguageModel, tokens: TokenBatch, layer: int, cache: Cache | None = None
) -> tuple[Cache, Tensor]:
    """Prefill a prompt of one row and keep the hidden states that enter ``layer``.

    Args:
        model: the sharer.
        tokens: the prompt.
        layer: from 1 on; layer 0 is entered by the tokens themselves.
        cache: of the first columns; it is changed.

    Returns:
        The cache of all columns, and the hidden states of those that ``cache`` did not hold, ``[1, read, hidden]``.

    Raises:
        CacheError: the model's layers can't be run one by one.
    """
    check_layerwise(model)
    check_range((layer, model.geometry.layers), model.geometry.layers)
    tokens, seen = tokens.to(model.device), list[Tensor]()
    with prompt_length(model.model, tokens.length):
        return _prefill(model.model, tokens, layer, cache, seen), seen[0]


def _prefill(model: PreTrainedModel, tokens: TokenBatch, layer: int, cache: Cache | None, seen: list[Tensor]) -> Cache:
    decoder: Any = model.get_decoder()
    cache = kv_cache.empty_cache(model.config) if cache is None else cache
    start = kv_cache.length(cache)
    layers = [_tapped(one, seen) if index == layer else one for index, one in enumerate(decoder.layers)]
    _with_layers(decoder, layers)(
        input_ids=tokens.ids[:, start:],
        attention_mask=tokens.mask_until(tokens.length),
        position_ids=tokens.positions[:, start:],
        past_key_values=cache,
        use_cache=True,
    )
    return cache


# -- decoders with other layers ---------------------------------------------------------------------------------------
#
# Copies of modules, not of their weights: the model itself is left alone, so that other threads may run it meanwhile.


def _with_layers(decoder: nn.Module, layers: list[nn.Module]) -> nn.Module:
    made = copy.copy(decoder)
    made._modules = dict(decoder._modules) | {"layers": nn.ModuleList(layers)}
    return made


def _skipped(layer: nn.Module) -> nn.Module:
    """Return a layer that passes its input on; masks are chosen by a layer's number, so that it must be there."""
    made = copy.copy(layer)
    made.forward = _pass_on
    return made


def _pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _tapped(layer: nn.Module, seen: list[Tensor]) -> nn.Module:
    made = copy.copy(layer)
    made._forward_pre_hooks = OrderedDict(layer._forward_pre_hooks)
    made._forward_pre_hooks_with_kwargs = OrderedDict(layer._forward_pre_hooks_with_kwargs)

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    made.register_forward_pre_hook(keep, with_kwargs=True)
    return made


# -- which models can -------------------------------------------------------------------------------------------------


def _takes_masks(model: LanguageModel, length: int) -> bool:
    """Whether a model attends by a mask of any form: within its attention window, and found out by a tiny prompt."""
    config = model.model.config.get_text_config(decoder=True)
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    partial = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if any(window is not None and window < length for window in windows) or (partial and not any(windows)):
        return False
    known, implementation = _masked.setdefault(model.model, {}), str(config._attn_implementation)
    if implementation not in known:  # it may be switched
        known[implementation] = _probe_masks(model)
    return known[implementation]


@torch.no_grad()
def _probe_masks(model: LanguageModel) -> bool:
    tokens = left_pad([[1, 2, 3, 4, 5, 6]], 0).to(model.device)
    whole, columns = model.compute(tokens, tokens.length), torch.tensor([2, 4], device=model.device)
    spoiled = kv_cache.copy(whole)
    _put(spoiled, columns, [(keys[:, :, :2], values[:, :, :2]) for keys, values in kv_cache.layers(whole)])
    try:
        found = _in_one_pass(model.model, tokens, columns, spoiled)
    except Exception:  # whatever an attention kernel raises that knows causal masks only
        return False
    own = [(keys[:, :, columns], values[:, :, columns]) for keys, values in kv_cache.layers(whole)]
    return _near(model, found, own)


def _near(model: LanguageModel, found: Sequence[KeyValue], expected: Sequence[KeyValue]) -> bool:
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    pairs = [pair for one, own in zip(found, expected, strict=True) for pair in zip(one, own, strict=True)]
    return all(torch.dist(one, own) <= tolerance * own.norm() for one, own in pairs)


def check_layerwise(model: LanguageModel) -> None:
    """Make sure that a model's layers can be run one by one; found out by a tiny prompt, once for each model.

    Raises:
        CacheError: they can't; says why.
    """
    if model.model not in _known:
        _known[model.model] = _probe(model)
    if reason := _known[model.model]:
        raise CacheError(f"no layers of {model.name} can be recomputed: {reason}. Copy all of them, or none.")


@torch.no_grad()
def _probe(model: LanguageModel) -> str | None:
    """Return why not; None where layers run in parts give what they give in one pass."""
    decoder, kind = model.model.get_decoder(), type(model.model).__name__
    count = model.geometry.layers
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList) or len(decoder.layers) != count:
        return f"the decoder of {kind} has no plain list of {count} layers that each keep keys and values"
    if count < 2:
        return f"{kind} has {count} layer"
    tokens, column, middle = left_pad([[1, 2, 3, 4, 5]], 0).to(model.device), 2, count // 2
    seen: list[Tensor] = []
    try:
        whole = _prefill(model.model, tokens, middle, None, seen)
        before = kv_cache.crop(whole, column)
        ids = tokens.ids[0, column:]
        low = _run(model.model, tokens, column, ids, (0, middle), before, None)
        high = _run(model.model, tokens, column, ids, (middle, count), before, seen[0][:, column:])
        plain = model.prefill(tokens)
    except Exception as error:  # whatever a decoder raises whose layers are called in another way
        return f"its decoder can't be run without some of its layers ({type(error).__name__}: {error})"
    own = [(keys[:, :, column:], values[:, :, column:]) for keys, values in kv_cache.layers(plain)]
    if not _near(model, [*low, *high], own):
        return f"layers of {kind} that are run in parts give other entries than in one pass"
    return None
