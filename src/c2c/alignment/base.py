"""Aligned prompts: tokens for every model, and which cache entries are fused with which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from c2c.errors import PromptError
from c2c.messages import Conversation
from c2c.prompting import RenderOptions
from c2c.tokens import TokenBatch, common_prefix, left_pad


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

    def pairs(self) -> list[tuple[int, int, int]]:
        """Return ``(row, receiver column, sharer column)`` of every pair."""
        return list(zip(self.rows.tolist(), self.receiver.tolist(), self.sharer.tolist(), strict=True))

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
        alignments = (alignment for chunk in self.chunks for alignment in chunk.alignments if alignment is not None)
        return len({(row, column) for alignment in alignments for row, column, _ in alignment.pairs()})


class Aligner(Protocol):
    """Turn conversations into prompts, one for each; :func:`merge` makes a batch of those with one fusion plan."""

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


def truncate(prompt: Prompt, ids: Sequence[int], cut: int, limits: Sequence[int]) -> Prompt:
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
    same = common_prefix(ours.ids[0, real].tolist(), ids)
    if ours.padded or any(theirs.padded for theirs in prompt.sharers):
        if cut or any(drops) or same < len(ids) - 1 or len(real) < len(ids):
            raise PromptError(
                "a prompt aligned the published way has pads inside, so it can't be cut to the context length. Give "
                "the model aligner=SpanAligner(), or use tasks with shorter prompts."
            )
        last = real[len(ids) - 1]
        kept, mask = ours.ids[:, : last + 1].clone(), ours.mask[:, : last + 1]
        kept[:, -1] = ids[-1]
        receiver = TokenBatch(kept, mask, ours.positions[:, : last + 1], bool((~mask).any()), ours.natural)
        sharers = prompt.sharers
    else:
        last = len(ids) - 1
        receiver = left_pad([ids[cut:]], 0)
        sharers = tuple(
            left_pad([theirs.ids[0, drop:].tolist()], 0) for theirs, drop in zip(prompt.sharers, drops, strict=True)
        )
    known = min(real[same], last) if same < len(real) else last  # tokens from here on are not those of the prompt
    chunks = []
    for chunk in prompt.chunks:
        alignments = tuple(_cut(part, cut, known, drop) for part, drop in zip(chunk.alignments, drops, strict=True))
        if any(part is not None for part in alignments):
            chunks.append(Chunk(min(chunk.stop, last) - cut, alignments))
    return Prompt(receiver, sharers, tuple(chunks))


def merge(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Merge prompts of one row each to one left-padded batch, where one fusion plan fits them all."""
    if len(prompts) == 1 or not all(_simple(prompt) for prompt in prompts):
        return list(prompts)
    models = zip(*((prompt.receiver, *prompt.sharers) for prompt in prompts), strict=True)
    receiver, *sharers = (left_pad([one.ids[0].tolist() for one in batches], 0) for batches in models)
    alignments: list[Alignment | None] = []
    for index, theirs in enumerate(sharers):
        pairs = [
            (row, t + receiver.length - prompt.receiver.length, s + theirs.length - prompt.sharers[index].length)
            for row, prompt in enumerate(prompts)
            if (alignment := prompt.chunks[0].alignments[index]) is not None
            for _, t, s in alignment.pairs()
        ]
        alignments.append(Alignment.from_pairs(pairs) if pairs else None)
    return [Prompt(receiver, tuple(sharers), (Chunk(receiver.length - 1, tuple(alignments)),))]


def derange(prompt: Prompt, other: Prompt) -> Prompt:
    """Replace what the sharers read by what those of ``other`` read; see :func:`derange_columns`.

    Raises:
        PromptError: a fusion plan of several steps (published alignment).
    """
    if len(prompt.chunks) != 1 or len(other.chunks) != 1:
        raise PromptError("another prompt's cache needs an aligner with a single chunk, such as 'spans'.")
    alignments = []
    for own, theirs in zip(prompt.chunks[0].alignments, other.chunks[0].alignments, strict=True):
        if own is not None and theirs is not None:
            columns = derange_columns(own.sharer.tolist(), theirs.sharer.tolist())
            own = Alignment(own.rows, own.receiver, torch.tensor(columns))
        alignments.append(own if theirs is not None else None)
    return replace(prompt, sharers=other.sharers, chunks=(Chunk(prompt.chunks[0].stop, tuple(alignments)),))


def _cut(alignment: Alignment | None, cut: int, known: int, drop: int) -> Alignment | None:
    """Keep the pairs of receiver columns ``cut`` to ``known`` whose sharer columns are not dropped."""
    pairs = alignment.pairs() if alignment is not None else []
    kept = [(row, t - cut, s - drop) for row, t, s in pairs if cut <= t < known and s >= drop]
    return Alignment.from_pairs(kept) if kept else None


def _simple(prompt: Prompt) -> bool:
    return (
        len(prompt.chunks) == 1
        and prompt.receiver.rows == 1
        and prompt.receiver.natural
        and prompt.chunks[0].stop == prompt.receiver.length - 1
        and not any(batch.padded for batch in (prompt.receiver, *prompt.sharers))
    )
