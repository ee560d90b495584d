"""Prompts that are already aligned, made to fit what a tool asks for: other ends, fewer tokens, another's message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch

from c2c.alignment import Alignment, Chunk, Prompt
from c2c.alignment.plan import derange_columns
from c2c.errors import PromptError
from c2c.tokens import TokenBatch, left_pad


def fit(prompt: Prompt, ids: Sequence[int], cut: int, limits: Sequence[int]) -> Prompt:
    """The prompt of one row whose receiver reads ``ids`` without its first ``cut`` tokens.

    Args:
        prompt: one row.
        ids: the receiver's tokens; they may differ from the prompt's at its end, where a tool counts the trailing
            whitespace to the continuation.
        cut: receiver tokens to drop on the left.
        limits: how many tokens each sharer can read; what stands before them is dropped.

    Raises:
        PromptError: a prompt with pads in it (published alignment) would have to be cut.
    """
    ours = prompt.receiver
    drops = [max(0, theirs.length - limit) for theirs, limit in zip(prompt.sharers, limits, strict=True)]
    real = ours.mask[0].nonzero().flatten().tolist()
    same = _common(ours.ids[0, real].tolist(), ids)
    if ours.padded or any(theirs.padded for theirs in prompt.sharers):
        if cut or any(drops) or same < len(ids) - 1 or len(real) < len(ids):
            raise PromptError(
                "a prompt aligned the published way has pads inside, so it can't be cut to the context length. Give "
                "the model aligner=SpanAligner(), or use tasks with shorter prompts."
            )
        last = real[len(ids) - 1]
        receiver, sharers = _first(ours, last + 1, ids[-1]), prompt.sharers
    else:
        last = len(ids) - 1
        receiver = left_pad([ids[cut:]], 0)
        sharers = tuple(
            left_pad([theirs.ids[0, drop:].tolist()], 0) for theirs, drop in zip(prompt.sharers, drops, strict=True)
        )
    known = real[same] if same < len(real) else last
    return Prompt(receiver, sharers, _fit_chunks(prompt.chunks, cut, last, min(known, last), drops))


def merge(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts of one row each as one left-padded batch, where one fusion plan serves them all; else as they are."""
    if len(prompts) == 1 or not all(_simple(prompt) for prompt in prompts):
        return list(prompts)
    receiver = left_pad([_ids(prompt.receiver) for prompt in prompts], 0)
    sharers = tuple(
        left_pad([_ids(prompt.sharers[index]) for prompt in prompts], 0) for index in range(len(prompts[0].sharers))
    )
    alignments = tuple(_merged(prompts, index, receiver.length, theirs.length) for index, theirs in enumerate(sharers))
    return [Prompt(receiver, sharers, (Chunk(receiver.length - 1, alignments),))]


def derange(prompt: Prompt, other: Prompt) -> Prompt:
    """The prompt with what ``other``'s sharers read in place of its own, as in training and evaluation.

    What took the sharer's last position takes the other's last one, and the rest go by proportion.

    Raises:
        PromptError: a fusion plan of several steps (published alignment).
    """
    if len(prompt.chunks) != 1 or len(other.chunks) != 1:
        raise PromptError("another prompt's cache needs an aligner with a single chunk, such as 'spans'.")
    chunk = prompt.chunks[0]
    alignments = tuple(
        None if own is None or theirs is None else _borrow(own, theirs)
        for own, theirs in zip(chunk.alignments, other.chunks[0].alignments, strict=True)
    )
    return replace(prompt, sharers=other.sharers, chunks=(Chunk(chunk.stop, alignments),))


def _common(ours: Sequence[int], others: Sequence[int]) -> int:
    """Length of what two sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, others, strict=False)))


def _first(batch: TokenBatch, stop: int, last: int) -> TokenBatch:
    """The first ``stop`` columns, ending in the token ``last``."""
    ids = batch.ids[:, :stop].clone()
    ids[:, -1] = last
    mask = batch.mask[:, :stop]
    return TokenBatch(ids, mask, batch.positions[:, :stop], bool((~mask).any()), batch.natural)


def _fit_chunks(chunks: Sequence[Chunk], cut: int, last: int, known: int, drops: Sequence[int]) -> tuple[Chunk, ...]:
    """The plan for receiver columns ``cut`` to ``last``, of which those from ``known`` on are not fused."""
    fitted = []
    for chunk in chunks:
        alignments = tuple(
            None if alignment is None else _shifted(alignment, cut, known, drop)
            for alignment, drop in zip(chunk.alignments, drops, strict=True)
        )
        if any(alignment is not None for alignment in alignments):
            fitted.append(Chunk(min(chunk.stop, last) - cut, alignments))
    return tuple(fitted)


def _shifted(alignment: Alignment, cut: int, known: int, drop: int) -> Alignment | None:
    pairs = [(row, t - cut, s - drop) for row, t, s in _pairs(alignment) if cut <= t < known and s >= drop]
    return Alignment.from_pairs(pairs) if pairs else None


def _merged(prompts: Sequence[Prompt], index: int, width: int, sharer_width: int) -> Alignment | None:
    pairs = []
    for row, prompt in enumerate(prompts):
        alignment = prompt.chunks[0].alignments[index]
        ours, theirs = width - prompt.receiver.length, sharer_width - prompt.sharers[index].length
        if alignment is not None:
            pairs += [(row, t + ours, s + theirs) for _, t, s in _pairs(alignment)]
    return Alignment.from_pairs(pairs) if pairs else None


def _borrow(own: Alignment, other: Alignment) -> Alignment:
    taken = derange_columns(own.sharer.tolist(), other.sharer.tolist())
    return Alignment(own.rows, own.receiver, torch.tensor(taken, dtype=torch.long))


def _simple(prompt: Prompt) -> bool:
    return (
        len(prompt.chunks) == 1
        and prompt.chunks[0].stop == prompt.receiver.length - 1
        and not any(batch.padded for batch in (prompt.receiver, *prompt.sharers))
    )


def _pairs(alignment: Alignment) -> list[tuple[int, int, int]]:
    return list(zip(alignment.rows.tolist(), alignment.receiver.tolist(), alignment.sharer.tolist(), strict=True))


def _ids(batch: TokenBatch) -> list[int]:
    ids: list[int] = batch.ids[0].tolist()
    return ids
