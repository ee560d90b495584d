"""Tokens: a batch of token ids for one model, with its mask and positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from c2c.errors import PromptError

SLOT = -(2**31)  # stands in the ids for an entry of the cache that is no token; no vocabulary has it


@dataclass(frozen=True)
class TokenBatch:
    """Hold token ids of one model, with mask and positions.

    Attributes:
        ids: token ids, ``[batch, tokens]``, int64; no ids where :attr:`slots` says so.
        mask: True where a token is real and False on padding, ``[batch, tokens]``, bool.
        positions: position ids used for the rotary embedding, ``[batch, tokens]``, int64.
        padded: whether any row has padding. Known on the host, so that no device has to be asked.
        natural: whether ``positions`` count the unmasked tokens of each row, as ``generate`` would.
        has_slots: whether some column is an entry of the cache and no token; known on the host as well.
        whole: tokens of the whole prompt of each row, where these are only its first ones; else empty.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    padded: bool
    natural: bool = True
    has_slots: bool = False
    whole: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Number of columns, padding included."""
        return self.ids.shape[1]

    @property
    def rows(self) -> int:
        """Batch size."""
        return self.ids.shape[0]

    @property
    def slots(self) -> Tensor:
        """True where a column is an entry of the cache and no token, ``[batch, tokens]``, bool."""
        return self.ids == SLOT

    @property
    def lengths(self) -> Tensor:
        """Tokens of the prompt of each row, ``[batch, 1]``; they choose the frequencies of some rotary embeddings."""
        if self.whole:
            return torch.tensor(self.whole, device=self.ids.device).unsqueeze(1)
        return self.positions.amax(-1, keepdim=True) + 1

    def to(self, device: torch.device) -> TokenBatch:
        """Move the batch to a device."""
        return self._each(lambda x: x.to(device))

    def select(self, rows: Sequence[int]) -> TokenBatch:
        """Select rows."""
        index = torch.tensor(list(rows), device=self.ids.device)
        return replace(self._each(lambda x: x[index]), whole=tuple(self.whole[row] for row in rows if self.whole))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        return replace(self, ids=change(self.ids), mask=change(self.mask), positions=change(self.positions))

    def insert_slots(self, column: int, slots: int) -> TokenBatch:
        """Insert columns that hold no token but count as read; for entries put into the cache.

        Args:
            column: where they are inserted, the same in all rows.
            slots: how many.
        """
        filler = self.ids.new_full((self.rows, slots), SLOT)
        ids = torch.cat([self.ids[:, :column], filler, self.ids[:, column:]], dim=1)
        mask = torch.cat([self.mask[:, :column], filler == SLOT, self.mask[:, column:]], dim=1)
        return TokenBatch(ids, mask, natural_positions(mask), self.padded, has_slots=self.has_slots or slots > 0)

    def insert_tokens(self, column: int, ids: Tensor) -> TokenBatch:
        """Insert columns of tokens whose entries are put into the cache, the same in all rows.

        Args:
            column: where they are inserted.
            ids: ``[tokens]``, on the host; thoughts among them are slots.
        """
        inserted = ids.to(self.ids).expand(self.rows, -1)
        joined = torch.cat([self.ids[:, :column], inserted, self.ids[:, column:]], dim=1)
        mask = torch.cat([self.mask[:, :column], torch.ones_like(inserted, dtype=torch.bool), self.mask[:, column:]], 1)
        slots = self.has_slots or bool((ids == SLOT).any())
        return TokenBatch(joined, mask, natural_positions(mask), self.padded, has_slots=slots)

    def mask_until(self, stop: int) -> Tensor | None:
        """Return the attention mask of the first ``stop`` columns, or None where nothing is padded.

        None lets attention kernels take their causal fast path without looking at the mask on the device.
        """
        return self.mask[:, :stop].long() if self.padded else None


def natural_positions(mask: Tensor) -> Tensor:
    """Count the unmasked tokens of each row, from 0; 0 on padding. ``[batch, tokens]``, int64.

    A forward pass without them numbers padding as well, which rotates a left-padded row wrongly.
    """
    return (mask.long().cumsum(-1) - 1).clamp_min(0) * mask.long()


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> TokenBatch:
    """Left-pad rows of ids to one length.

    Raises:
        PromptError: there is no row, or a row is empty.
    """
    if not rows or any(len(row) == 0 for row in rows):
        raise PromptError("empty prompt: at least one token per row is needed. Pass a non-empty text or messages.")
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return TokenBatch(ids, mask, natural_positions(mask), padded=any(len(row) < width for row in rows))


def common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Count the first ids that two sequences have in common."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def require_left_padding(mask: Tensor, whose: str) -> None:
    """Refuse a batch whose last column is padding: the answer would be decoded from a padding token.

    Raises:
        PromptError: some row ends in padding.
    """
    ends = mask[:, -1].cpu()
    if not bool(ends.all()):
        rows = (~ends).nonzero().flatten().tolist()
        raise PromptError(
            f"right-padded batch: rows {rows} of the {whose} end in padding (mask 0 in the last column), so the next "
            "token would be predicted from a pad. Pad on the left: tokenizer.padding_side = 'left'."
        )


def concatenate(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Left-pad batches to one width and stack their rows; positions are kept."""
    width = max(batch.length for batch in batches)

    def stack(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(x, (width - x.shape[1], 0)) for x in tensors])

    return TokenBatch(
        stack([batch.ids for batch in batches]),
        stack([batch.mask for batch in batches]),
        stack([batch.positions for batch in batches]),
        any(batch.padded or batch.length < width for batch in batches),
        natural=all(batch.natural for batch in batches),
        has_slots=any(batch.has_slots for batch in batches),
    )


class OrdinaryPrompt:
    """Hold the prompt as it would be without entries of private context, for what reads its ids.

    Attributes:
        rows: the real tokens of each row.
        ids: the same, left-padded, ``[batch, tokens]``.
    """

    def __init__(self, batch: TokenBatch, pad_id: int) -> None:
        self._length = batch.length
        kept = batch.mask & ~batch.slots
        self.rows = [ids[real] for ids, real in zip(batch.ids, kept, strict=True)]
        self.ids = left_pad([row.tolist() for row in self.rows], pad_id).ids.to(batch.ids.device)

    def of(self, ids: Tensor) -> Tensor:
        """Return ``[batch * copies, tokens + new]`` with the prompt in its ordinary form."""
        return torch.cat([self.ids.repeat_interleave(ids.shape[0] // len(self.rows), 0), ids[:, self._length :]], 1)

    def row(self, index: int, ids: Tensor) -> Tensor:
        """Return the real tokens of one row of the prompt and what follows them in ``ids``, ``[tokens + new]``."""
        return torch.cat([self.rows[index], ids[self._length :]])


def as_list(value: Any) -> list[int]:
    """Return token ids of a generation config as a list."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]
