"""Aligned prompts: tokens for every model, and which cache entries are fused with which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor

from c2c.errors import PromptError
from c2c.messages import Conversation
from c2c.prompting import RenderOptions
from c2c.tokens import TokenBatch, left_pad


@dataclass(frozen=True)
class Alignment:
    """Pair cache positions of receiver and sharer, packed over the batch: no padding enters the fuser.

    Entry ``i`` fuses column ``receiver[i]`` of row ``rows[i]`` with column ``sharer[i]`` of the sharer's same row.

    Attributes:
        rows: ``[pairs]``, int64, on the host.
        receiver: ``[pairs]``, int64.
        sharer: ``[pairs]``, int64.
        block: ``(receiver start, sharer start, length)`` if every row fuses the same run of columns one to one, so
            that slices do instead of gathering.
    """

    rows: Tensor
    receiver: Tensor
    sharer: Tensor
    block: tuple[int, int, int] | None = None

    @classmethod
    def from_pairs(cls, pairs: Sequence[tuple[int, int, int]]) -> Alignment:
        """Make an alignment of ``(row, receiver column, sharer column)``."""
        table = torch.tensor(pairs, dtype=torch.long).reshape(-1, 3)
        rows, receiver, sharer = table.t().contiguous().unbind()
        return cls(rows, receiver, sharer)

    @classmethod
    def from_block(cls, batch: int, start: int, stop: int) -> Alignment:
        """Align the same columns of both models, in all rows."""
        columns = torch.arange(start, stop).repeat(batch)
        rows = torch.arange(batch).repeat_interleave(stop - start)
        return cls(rows, columns, columns, (start, start, stop - start))

    def __len__(self) -> int:
        return self.rows.numel()


def derange_columns(own: Sequence[int], other: Sequence[int]) -> list[int]:
    """Replace sharer columns by those of another prompt, for the deranged control.

    What took the sharer's last position (the closing template) takes the other's last one; the rest go by proportion.
    """
    tail = sum(column == own[-1] for column in own)
    body = other[: len(other) - sum(column == other[-1] for column in other)] or other
    count = len(own) - tail
    scale = (len(body) - 1) / max(count - 1, 1)
    return [body[round(place * scale)] for place in range(count)] + [other[-1]] * tail


@dataclass(frozen=True)
class Chunk:
    """Plan one step of the prefill: the receiver is prefilled up to column ``stop``, then these entries are fused.

    Attributes:
        stop: columns in the receiver's cache after this step.
        alignments: one per sharer; None where a sharer has no part in this step.
    """

    stop: int
    alignments: tuple[Alignment | None, ...]


@dataclass(frozen=True)
class Prompt:
    """Hold a tokenised batch for all models, with its fusion plan.

    Attributes:
        receiver: the receiver's tokens.
        sharers: each sharer's tokens.
        chunks: the plan; empty if nothing is fused. Ends before the last column, which the receiver runs on the
            fused cache.
        skipped: how many receiver tokens are not fused, by reason.
    """

    receiver: TokenBatch
    sharers: tuple[TokenBatch, ...]
    chunks: tuple[Chunk, ...]
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def fused_tokens(self) -> int:
        """Receiver positions fused with at least one sharer, summed over the batch."""
        pairs: Counter[tuple[int, int]] = Counter()
        for chunk in self.chunks:
            for alignment in chunk.alignments:
                if alignment is not None:
                    pairs.update(zip(alignment.rows.tolist(), alignment.receiver.tolist(), strict=True))
        return len(pairs)


class Aligner(Protocol):
    """Turn conversations into prompts. Rows that can't share one fusion plan become several prompts."""

    def align(
        self, receiver: Any, sharers: Sequence[Any], batch: Sequence[Conversation], options: RenderOptions
    ) -> list[Prompt]:
        """Align ``batch`` for the receiver's tokenizer and those of the sharers.

        Raises:
            AlignmentError: no token of some row can be fused.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the aligner's name and options, for the fuser's config."""
        ...


def fit(prompt: Prompt, ids: Sequence[int], cut: int, limits: Sequence[int]) -> Prompt:
    """Truncate a prompt of one row to the receiver tokens ``ids`` without the first ``cut``.

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
    """Merge prompts of one row each to one left-padded batch, where one fusion plan fits them all."""
    if len(prompts) == 1 or not all(_simple(prompt) for prompt in prompts):
        return list(prompts)
    receiver = left_pad([_ids(prompt.receiver) for prompt in prompts], 0)
    sharers = tuple(
        left_pad([_ids(prompt.sharers[index]) for prompt in prompts], 0) for index in range(len(prompts[0].sharers))
    )
    alignments = tuple(_merged(prompts, index, receiver.length, theirs.length) for index, theirs in enumerate(sharers))
    return [Prompt(receiver, sharers, (Chunk(receiver.length - 1, alignments),))]


def derange(prompt: Prompt, other: Prompt) -> Prompt:
    """Replace what the sharers read by what those of ``other`` read, as in training and evaluation.

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
    """Return the length of the common prefix of two sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, others, strict=False)))


def _first(batch: TokenBatch, stop: int, last: int) -> TokenBatch:
    """Crop to the first ``stop`` columns, ending in the token ``last``."""
    ids = batch.ids[:, :stop].clone()
    ids[:, -1] = last
    mask = batch.mask[:, :stop]
    return TokenBatch(ids, mask, batch.positions[:, :stop], bool((~mask).any()), batch.natural)


def _fit_chunks(chunks: Sequence[Chunk], cut: int, last: int, known: int, drops: Sequence[int]) -> tuple[Chunk, ...]:
    """Restrict a plan to receiver columns ``cut`` to ``last``, of which those from ``known`` on are not fused."""
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
        and prompt.receiver.rows == 1
        and prompt.receiver.natural
        and prompt.chunks[0].stop == prompt.receiver.length - 1
        and not any(batch.padded for batch in (prompt.receiver, *prompt.sharers))
    )


def _pairs(alignment: Alignment) -> list[tuple[int, int, int]]:
    return list(zip(alignment.rows.tolist(), alignment.receiver.tolist(), alignment.sharer.tolist(), strict=True))


def _ids(batch: TokenBatch) -> list[int]:
    ids: list[int] = batch.ids[0].tolist()
    return ids
