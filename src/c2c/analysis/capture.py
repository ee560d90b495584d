"""Capture cache entries at aligned positions, before and after fusion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from c2c import kv_cache
from c2c.alignment import Alignment
from c2c.analysis.config import AnalysisError
from c2c.fusers import Fuser
from c2c.fusion import AlignedIndex, Source, aligned_entries
from c2c.language_model import LanguageModel
from c2c.messages import conversations
from c2c.model import C2CModel
from c2c.prompting import RenderOptions
from c2c.rope import Rotary
from c2c.tokens import TokenBatch

Side = Literal["sharer", "receiver", "fused"]
SIDES: tuple[Side, ...] = get_args(Side)
KINDS = ("keys", "values")


@dataclass(frozen=True)
class LayerCapture:
    """Aligned entries of one fused receiver layer; row ``i`` of all sides belongs together.

    Attributes:
        source: sharer layer that ``layer`` reads.
        entries: by side and kind ``[pairs, kv_heads * head_dim]``, float32 on the CPU. Kinds: ``keys`` (as they lie in
            the cache), ``keys_unrotated`` (without their rotary embedding) and ``values``.
        unique: True where a sharer entry is read for the first time, ``[pairs]``; several positions may read one.
    """

    layer: int
    source: int
    entries: dict[Side, dict[str, Tensor]]
    unique: Tensor


@torch.no_grad()
def capture_layers(
    receiver: LanguageModel, tokens: TokenBatch, source: Source, alignment: Alignment, clean: Cache, fused: Cache
) -> Iterator[LayerCapture]:
    """Yield the aligned entries of each fused layer; ``clean`` and ``fused`` are the receiver's caches."""
    theirs, ours = aligned_entries(clean, receiver, tokens, source, alignment)
    _, merged = aligned_entries(fused, receiver, tokens, source, alignment)
    device, config = source.fuser.device, source.fuser.config
    our_rotary = _rotary(receiver, tokens, AlignedIndex(alignment, "receiver"), device)
    their_rotary = _rotary(source.sharer, source.tokens, AlignedIndex(alignment, "sharer"), device)
    read = torch.stack([alignment.rows, alignment.sharer]).cpu().numpy()
    unique = torch.zeros(len(alignment), dtype=torch.bool)
    unique[np.unique(read, axis=1, return_index=True)[1]] = True
    for index, (layer, source_layer) in enumerate(zip(config.fused_layers, config.source_layers, strict=True)):
        sides = zip(SIDES, (theirs, ours, merged), (their_rotary[source_layer], *[our_rotary[layer]] * 2), strict=True)
        yield LayerCapture(
            layer, source_layer, {side: _flatten(*part.layer(index), rotary) for side, part, rotary in sides}, unique
        )


def _rotary(
    model: LanguageModel, tokens: TokenBatch, aligned: AlignedIndex, device: torch.device
) -> Sequence[Rotary | None]:
    """Return each layer's rotary table at aligned positions; None for a model without rotary embedding."""
    return aligned.rotary(model, tokens, device) or [None] * model.geometry.layers


def _flatten(keys: Tensor, values: Tensor, rotary: Rotary | None) -> dict[str, Tensor]:
    keys, values = keys.float(), values.float()
    found = {"keys": keys, "keys_unrotated": keys if rotary is None else rotary.undo(keys), "values": values}
    return {kind: x.transpose(1, 2).flatten(2).flatten(0, 1).cpu() for kind, x in found.items()}


@dataclass(frozen=True)
class PromptCapture:
    """One prompt as a pair reads it.

    Attributes:
        names: of the receiver and the sharer.
        receiver_tokens: text of each receiver token, template included; ``sharer_tokens`` likewise.
        pairs: receiver token and sharer token that it reads, in order.
        layers: aligned entries of every fused layer; row ``i`` belongs to ``pairs[i]``.
    """

    fuser: Fuser
    names: tuple[str, str]
    receiver_tokens: list[str]
    sharer_tokens: list[str]
    pairs: list[tuple[int, int]]
    layers: list[LayerCapture]


@torch.no_grad()
def capture_prompt(model: C2CModel, messages: Any, options: RenderOptions | None = None) -> PromptCapture:
    """Prefill one prompt with both models, fuse, and capture the aligned entries.

    Raises:
        AnalysisError: several sharers or prompts, a fuser of private context, or a prompt that is fused in steps.
        PromptError: a prompt that one of the models can't read.
    """
    fuser = only_fuser(model.fusers, "this model")
    prompts = model.align(conversations(messages)[0], options or RenderOptions())
    alignments = [chunk.alignments[0] for prompt in prompts for chunk in prompt.chunks]
    if len(prompts) != 1 or len(alignments) != 1 or (alignment := alignments[0]) is None:
        raise AnalysisError(
            f"expected one prompt that is fused in one step, got {len(prompts)} with {len(alignments)} steps. Give a "
            "single user message, or use a fuser aligned by spans."
        )
    shared: list[Cache] = []

    def keep(cache: Cache) -> Cache:
        shared.append(cache)
        return cache

    fused = model.fuse_prompts(prompts, edit=keep)
    receiver, sharer = model.receiver, model.sharers[0]
    source = Source(sharer, prompts[0].sharers[0].to(sharer.device), shared[0], fuser)
    clean = receiver.prefill(fused.tokens, kv_cache.length(fused.cache))
    return PromptCapture(
        fuser,
        (receiver.name, sharer.name),
        [str(receiver.tokenizer.decode([token])) for token in fused.tokens.ids[0].tolist()],
        [str(sharer.tokenizer.decode([token])) for token in source.tokens.ids[0].tolist()],
        list(zip(alignment.receiver.tolist(), alignment.sharer.tolist(), strict=True)),
        list(capture_layers(receiver, fused.tokens, source, alignment, clean, fused.cache)),
    )


def only_fuser(fusers: Iterable[Any], name: str) -> Fuser:
    """Return the single fuser of a model; raise AnalysisError for several, or one of private context."""
    fuser: Fuser
    fuser, *others = fusers
    if others:
        raise AnalysisError(f"{name} has {len(others) + 1} sharers; one is analysed at a time: give one of its fusers.")
    if fuser.context != "shared":
        raise AnalysisError(
            f"{name} is for {fuser.context} context (family {fuser.family!r}): it adds entries and merges none, so "
            "nothing can be compared before and after. Use a fuser of shared context, such as 'bottleneck'."
        )
    return fuser
