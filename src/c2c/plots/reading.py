"""One prompt as a pair reads it: tokens of both models, which belong together, and their cache entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from c2c import kv_cache
from c2c.alignment import Alignment, Chunk, Prompt
from c2c.analysis.entries import LayerEntries, Side, flat
from c2c.analysis.settings import AnalysisError
from c2c.fusers import Fuser
from c2c.fusion import Picker, Source, fuse
from c2c.language_model import LanguageModel, Wanted
from c2c.messages import conversations
from c2c.model import C2CModel
from c2c.prompting import RenderOptions
from c2c.rope import Rotary
from c2c.tokens import TokenBatch


@dataclass(frozen=True)
class Reading:
    """What the pictures of one prompt are made of.

    Attributes:
        receiver: the receiver's name.
        sharer: the sharer's name.
        ours: text of each receiver token, template included.
        theirs: text of each sharer token.
        pairs: receiver token and sharer token that it takes, in order.
        layers: the aligned entries of every fused layer; row ``i`` belongs to ``pairs[i]``.
        kv_heads: of the receiver.
    """

    receiver: str
    sharer: str
    ours: list[str]
    theirs: list[str]
    pairs: list[tuple[int, int]]
    layers: list[LayerEntries]
    kv_heads: int


@torch.no_grad()
def read_prompt(model: C2CModel, messages: Any, options: RenderOptions | None = None) -> Reading:
    """Let both models read a prompt, fuse, and keep what the pictures need.

    Args:
        model: a pair whose fuser merges entries.
        messages: a text or a conversation.
        options: how to render it.

    Raises:
        AnalysisError: several sharers, several prompts, a fuser of private context, or a fusion plan of several steps.
    """
    fuser = _only_fuser(model)
    batch, _ = conversations(messages)
    if len(batch) != 1:
        raise AnalysisError(f"pictures are of one prompt, got {len(batch)}.")
    receiver, sharer = model.receiver, model.sharers[0]
    prompts = model.aligner.align(receiver.tokenizer, [sharer.tokenizer], batch, options or RenderOptions())
    prompt, chunk, alignment = _one_step(prompts)
    receiver.check_prompt(prompt.receiver)
    sharer.check_tokens(prompt.sharers[0])
    return Reading(
        receiver.name,
        sharer.name,
        _texts(receiver, prompt.receiver),
        _texts(sharer, prompt.sharers[0]),
        list(zip(alignment.receiver.tolist(), alignment.sharer.tolist(), strict=True)),
        list(_entries(model, fuser, prompt, chunk, alignment)),
        receiver.geometry.kv_heads,
    )


def check_fuser(fuser: Fuser) -> None:
    """Refuse a fuser that merges nothing.

    Raises:
        AnalysisError: it is for private context.
    """
    if fuser.context != "shared":
        raise AnalysisError(
            f"this fuser is for {fuser.context} context (family {fuser.family!r}): it adds entries and merges none, so "
            "there is nothing to draw of a prompt. Use a fuser that merges, such as 'bottleneck'."
        )


def _only_fuser(model: C2CModel) -> Fuser:
    if len(model.sharers) != 1:
        raise AnalysisError(f"pictures are of one pair; this model has {len(model.sharers)} sharers.")
    fuser: Fuser = model.fusers[0]  # type: ignore[assignment]
    check_fuser(fuser)
    return fuser


def _one_step(prompts: Sequence[Prompt]) -> tuple[Prompt, Chunk, Alignment]:
    chunks = [(prompt, chunk) for prompt in prompts for chunk in prompt.chunks]
    if len(chunks) == 1 and (alignment := chunks[0][1].alignments[0]) is not None:
        return *chunks[0], alignment
    raise AnalysisError(
        f"this prompt is fused in {len(chunks)} steps; pictures are of one. Give a single user message, or use a fuser "
        "aligned by spans."
    )


def _entries(
    model: C2CModel, fuser: Fuser, prompt: Prompt, chunk: Chunk, alignment: Alignment
) -> Iterator[LayerEntries]:
    receiver, sharer = model.receiver, model.sharers[0]
    ours, theirs = prompt.receiver.to(receiver.device), prompt.sharers[0].to(sharer.device)
    own = receiver.prefill(ours, chunk.stop)
    shared = sharer.share(theirs, Wanted(fuser.config.source_layers, alignment.rows, alignment.sharer))
    fused = kv_cache.copy(own)
    fuse(fused, receiver, ours, [Source(sharer, theirs, shared, fuser)], chunk)
    mine, other = Picker(alignment, alignment.receiver, 0), Picker(alignment, alignment.sharer, 1)
    tables, their_tables = _tables(receiver, ours, mine), _tables(sharer, theirs, other)
    first = _first(alignment.sharer.tolist())
    for layer, source in zip(fuser.config.fused_layers, fuser.config.source_layers, strict=True):
        table = None if tables is None else tables[layer]
        yield LayerEntries(
            layer,
            source,
            _side(kv_cache.layer(shared, source), other, None if their_tables is None else their_tables[source]),
            _side(kv_cache.layer(own, layer), mine, table),
            _side(kv_cache.layer(fused, layer), mine, table),
            first,
        )


def _tables(model: LanguageModel, tokens: TokenBatch, picker: Picker) -> list[Rotary] | None:
    return model.rotary(picker.take_positions(tokens.positions))


def _side(entry: kv_cache.KeyValue, picker: Picker, table: Rotary | None) -> Side:
    keys, values = (picker.take(part).float().cpu() for part in entry)
    if table is None:
        return Side(flat(keys), flat(keys), flat(values))
    return Side(flat(keys), flat(Rotary(table.cos.cpu(), table.sin.cpu()).undo(keys)), flat(values))


def _first(columns: list[int]) -> Tensor:
    """True where a sharer token is read for the first time."""
    return torch.tensor([column not in columns[:place] for place, column in enumerate(columns)])


def _texts(model: LanguageModel, tokens: TokenBatch) -> list[str]:
    """The text of each token; a part of a character comes out as a replacement mark."""
    return [str(model.tokenizer.decode([token])) for token in tokens.ids[0].tolist()]
