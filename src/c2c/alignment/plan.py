"""What an aligner hands to fusion: tokens for every model, and which entries are fused with which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from c2c.messages import Conversation
from c2c.prompting import RenderOptions
from c2c.tokens import TokenBatch


@dataclass(frozen=True)
class Alignment:
    """Pairs of cache positions, packed over the batch: no padding enters the fuser.

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
        """From ``(row, receiver column, sharer column)``."""
        table = torch.tensor(pairs, dtype=torch.long).reshape(-1, 3)
        rows, receiver, sharer = table.t().contiguous().unbind()
        return cls(rows, receiver, sharer)

    @classmethod
    def from_block(cls, batch: int, start: int, stop: int) -> Alignment:
        """The same columns of both models, in all rows."""
        columns = torch.arange(start, stop).repeat(batch)
        rows = torch.arange(batch).repeat_interleave(stop - start)
        return cls(rows, columns, columns, (start, start, stop - start))

    def __len__(self) -> int:
        return self.rows.numel()


def derange_columns(own: Sequence[int], other: Sequence[int]) -> list[int]:
    """Another prompt's sharer columns in the place of ours, for the control with a wrong message.

    What took the sharer's last position (the closing template) takes the other's last one; the rest go by proportion.
    """
    tail = sum(column == own[-1] for column in own)
    body = other[: len(other) - sum(column == other[-1] for column in other)] or other
    count = len(own) - tail
    scale = (len(body) - 1) / max(count - 1, 1)
    return [body[round(place * scale)] for place in range(count)] + [other[-1]] * tail


@dataclass(frozen=True)
class Chunk:
    """One step of the prefill: the receiver reads up to column ``stop``, then these entries are fused.

    Attributes:
        stop: columns in the receiver's cache after this step.
        alignments: one per sharer; None where a sharer has no part in this step.
    """

    stop: int
    alignments: tuple[Alignment | None, ...]


@dataclass(frozen=True)
class Prompt:
    """An encoded batch for all models, with its fusion plan.

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
    """Turns conversations into prompts. Rows that can't share one fusion plan become several prompts."""

    def align(
        self, receiver: Any, sharers: Sequence[Any], batch: Sequence[Conversation], options: RenderOptions
    ) -> list[Prompt]:
        """Align ``batch`` for the receiver's tokenizer and those of the sharers.

        Raises:
            AlignmentError: no token of some row can be fused.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """The aligner's name and options, for the fuser's config."""
        ...
