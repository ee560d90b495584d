"""Published sections: runs of the fuse mask, prefilled one after the other.

A fused run is overwritten in the cache before the next tokens are read, so later runs see it. Runs that are not fused
need no step of their own: the receiver reads them together with what follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from c2c.alignment.plan import Alignment, Chunk
from c2c.errors import PromptError


def slot_positions(mask: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Positions of the published code: slots from 0, inserted pads included, the same for all models.

    Columns at the start of a row where no model has a token are the padding of a batch, not of the alignment; they do
    not count, so that a row is the same in any batch. ``[batch, tokens]``.
    """
    empty = ~mask
    for other in others:
        empty = empty & ~other[:, : mask.shape[1]]
    lead = empty.long().cumprod(-1).sum(-1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - lead).clamp_min(0)


def runs(selection: Tensor) -> list[tuple[int, int, int]]:
    """``(value, start, stop)`` of each run of equal values in a 1-D tensor."""
    values = selection.tolist()
    borders = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return [(int(values[a]), a, b) for a, b in pairwise(borders) if a < b]


def plan_sections(
    selection: Tensor, mask: Tensor, sharers: int, sections: Sequence[int] | None = None
) -> tuple[tuple[Chunk, ...], dict[str, int]]:
    """The fusion plan of a batch whose rows all have this selection.

    Args:
        selection: for each slot a bit mask of the sharers to fuse, bit ``j`` for sharer ``j``; ``[tokens]``.
        mask: the receiver's mask, ``[batch, tokens]``: padding is never fused.
        sharers: number of sharers.
        sections: lengths of the sections, where two fused ones stand side by side; by default the runs.

    Returns:
        The chunks, and how many real receiver tokens are skipped, by reason.
    """
    spans = runs(selection) if sections is None else _given(selection, sections)
    skipped: Counter[str] = Counter()
    chunks: list[Chunk] = []
    for place, (bits, start, stop) in enumerate(spans):
        real = int(mask[:, start:stop].sum())
        if place == len(spans) - 1:
            skipped["last section, run on the fused cache"] += real
        elif bits <= 0:
            skipped["not selected"] += real
        else:
            alignment = _section(mask, start, stop)
            chunks.append(Chunk(stop, tuple(alignment if bits >> j & 1 else None for j in range(sharers))))
    return tuple(chunks), {reason: count for reason, count in skipped.items() if count}


def _section(mask: Tensor, start: int, stop: int) -> Alignment:
    real = mask[:, start:stop]
    if bool(real.all()):
        return Alignment.from_block(mask.shape[0], start, stop)
    rows, columns = real.nonzero(as_tuple=True)
    return Alignment(rows, columns + start, columns + start)


def check_sections(selection: Tensor, sections: Sequence[int]) -> None:
    """Refuse sections that do not fit the selection, ``[batch, tokens]``.

    Raises:
        PromptError: lengths that do not add up, or a section with more than one value.
    """
    if sum(sections) != selection.shape[1] or min(sections, default=0) < 1:
        raise PromptError(
            f"sections {list(sections)} add up to {sum(sections)}, the prompt has {selection.shape[1]} tokens: give "
            "the length of every section, each at least 1."
        )
    for row in selection:
        for part in row.split(list(sections)):
            if not bool((part == part[0]).all()):
                raise PromptError(
                    f"sections {list(sections)} do not fit fuse_mask: a section has both values in a row."
                )


def _given(selection: Tensor, sections: Sequence[int]) -> list[tuple[int, int, int]]:
    spans, start = [], 0
    for size in sections:
        spans.append((int(selection[start]), start, start + size))
        start += size
    return spans
