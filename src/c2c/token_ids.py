"""Token ids: calls with ids that are aligned one to one, as in the published code."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from c2c import kv_cache
from c2c.alignment import Prompt
from c2c.alignment.slots import check_sections, plan_sections, slot_positions
from c2c.errors import AlignmentError, PromptError, SharerLost
from c2c.generation import FusionReport, PrefilledPrompt
from c2c.tokens import TokenBatch

if TYPE_CHECKING:
    from c2c.language_model import Receiver
    from c2c.sharer import Sharer


@dataclass
class FusedIds:
    """Hold a fused cache and the logits after it.

    Attributes:
        keys: one tensor per receiver layer, ``[batch, kv_heads, tokens, head_dim]``, after the rotary embedding.
        values: the same shapes.
        last_logits: after the last token, ``[batch, vocab]``.
        report: what was fused.
    """

    keys: list[Tensor]
    values: list[Tensor]
    last_logits: Tensor
    report: FusionReport | None


class TokenIds:
    """Answer from token ids in place of messages (part of :class:`~c2c.model.C2CModel`)."""

    receiver: Receiver
    sharers: list[Sharer]
    fuse_prompts: Callable[..., PrefilledPrompt]
    prefill_receiver: Callable[..., PrefilledPrompt]

    @torch.no_grad()
    def generate_ids(
        self,
        receiver_ids: Any,
        sharer_ids: Any,
        *,
        fuse_mask: Any,
        receiver_mask: Any = None,
        sharer_mask: Any = None,
        sections: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Answer from token ids that are aligned one to one, as the published code does.

        Args:
            receiver_ids: ``[batch, tokens]``.
            sharer_ids: ``[batch, tokens]``, or one per sharer.
            fuse_mask: ``[batch, tokens]`` or ``[tokens]``, the receiver positions to fuse; True fuses all sharers, an
                integer is a bit mask (1 the first sharer, 2 the second, 3 both). Its runs are the published sections:
                later ones are read on top of fused earlier ones, and the last is never fused.
            receiver_mask: False on padding, ``[batch, tokens]``; kept while decoding.
            sharer_mask: the same for the sharer, or one per sharer.
            sections: lengths of the sections, where two fused ones stand side by side.
            **kwargs: passed to the receiver's ``generate``.

        Returns:
            The new ids, ``[batch, new]``.

        Raises:
            PromptError: shapes that do not agree, or right padding.
        """
        fused = self._fuse_ids(receiver_ids, sharer_ids, fuse_mask, receiver_mask, sharer_mask, sections)
        return self.receiver.generate(fused.tokens, fused.cache, fused=True, **kwargs)

    @torch.no_grad()
    def fuse_ids(
        self,
        receiver_ids: Any,
        sharer_ids: Any,
        *,
        fuse_mask: Any,
        receiver_mask: Any = None,
        sharer_mask: Any = None,
        sections: Sequence[int] | None = None,
    ) -> FusedIds:
        """Return the fused cache of the whole prompt and the logits after it; arguments as in :meth:`generate_ids`."""
        fused = self._fuse_ids(receiver_ids, sharer_ids, fuse_mask, receiver_mask, sharer_mask, sections)
        logits = self.receiver.next_logits(fused.tokens, fused.cache)
        keys, values = zip(*kv_cache.layers(fused.cache), strict=True)
        return FusedIds(list(keys), list(values), logits, fused.report)

    def _fuse_ids(
        self, receiver_ids: Any, sharer_ids: Any, fuse_mask: Any, receiver_mask: Any, sharer_mask: Any, sections: Any
    ) -> PrefilledPrompt:
        count = len(self.sharers)
        ids = _ids(receiver_ids, "receiver_ids")
        others = [_ids(given, "sharer_ids") for given in _per_sharer(sharer_ids, count)]
        if wrong := [tuple(other.shape) for other in others if other.shape != ids.shape]:
            raise AlignmentError(
                f"unaligned prompt: receiver_ids are {tuple(ids.shape)}, sharer_ids {wrong[0]}. Ids must be aligned "
                "one to one; for text use generate(messages), which aligns."
            )
        mask = _like(ids, receiver_mask, "receiver_mask").bool()
        other_masks = [_like(ids, given, "sharer_mask").bool() for given in _per_sharer(sharer_mask, count)]
        selection = _selection(ids, fuse_mask, 2**count - 1)
        if sections is not None:
            check_sections(selection, sections)
        positions = slot_positions(mask, other_masks)
        tokens, *sharers = (
            TokenBatch(one, real, positions, bool((~real).any()), natural=False)
            for one, real in zip((ids, *others), (mask, *other_masks), strict=True)
        )
        plans, group = selection.unique(dim=0, return_inverse=True)
        groups = [(group == index).nonzero().flatten().tolist() for index in range(len(plans))]
        prompts = []
        for rows, plan in zip(groups, plans, strict=True):
            chunks, skipped = plan_sections(plan, mask[rows], count, sections)
            prompts.append(Prompt(tokens.select(rows), tuple(one.select(rows) for one in sharers), chunks, skipped))
        if bool(selection.any()) and not any(prompt.chunks for prompt in prompts):
            warnings.warn(
                "fuse_mask selects positions of the last section only, which is never fused: the answer is the "
                "receiver's alone. Leave at least the last token out of the mask.",
                stacklevel=3,
            )
        try:
            fused = self.fuse_prompts(prompts)
        except SharerLost as lost:
            return self.prefill_receiver(tokens, lost)
        if len(prompts) > 1:  # rows were grouped by their sections: back to the caller's order
            order = torch.tensor([row for rows in groups for row in rows]).argsort()
            tokens, cache = fused.tokens.select(order.tolist()), kv_cache.select_rows(fused.cache, order)
            fused = replace(fused, tokens=tokens, cache=cache)
        return fused


def _ids(value: Any, name: str) -> Tensor:
    ids = torch.as_tensor(value).cpu()
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise PromptError(
            f"{name} has shape {tuple(ids.shape)} and type {ids.dtype}; expected integers [batch, tokens]."
        )
    return ids.long()


def _like(ids: Tensor, value: Any, name: str) -> Tensor:
    """Convert to a tensor of the shape of ``ids``; one row is meant for all, and None is all ones."""
    mask: Tensor = torch.ones_like(ids) if value is None else torch.as_tensor(value).cpu()
    mask = mask.expand(len(ids), -1) if mask.dim() == 1 else mask
    if mask.shape != ids.shape:
        raise PromptError(f"{name} is {tuple(mask.shape)}, expected {tuple(ids.shape)} like the ids.")
    return mask


def _selection(ids: Tensor, fuse_mask: Any, everyone: int) -> Tensor:
    """Convert the fuse mask to bit masks of sharers, ``[batch, tokens]``; the bits of ``everyone`` are all of them."""
    mask = _like(ids, fuse_mask, "fuse_mask")
    bits = mask.long() * everyone if mask.dtype == torch.bool else mask.long().clamp_min(0)
    if int(bits.max()) > everyone:
        raise PromptError(f"fuse_mask selects sharers by bit mask {int(bits.max())}; the largest here is {everyone}.")
    return bits


def _depth(value: Any) -> int:
    """Return how deep lists are nested: 2 for ids of a batch, 3 for those of several sharers."""
    return 1 + _depth(value[0]) if isinstance(value, list | tuple) and value else 0


def _per_sharer(value: Any, count: int) -> list[Any]:
    """Return one value per sharer; a single tensor is meant for all of them."""
    if isinstance(value, list | tuple) and value and (isinstance(value[0], Tensor) or _depth(value) == 3):
        if len(value) != count:
            raise PromptError(f"got {len(value)} tensors for {count} sharers; give one for each, or one for all.")
        return list(value)
    return [value] * count
