"""Alignment by slots, as published: both models read sequences of one length, slot by slot.

Each receiver token of a message is decoded alone and re-encoded with the sharer's tokenizer; template sections keep
each model's own tokens and are padded to one length. It loses information (a character split over tokens becomes
U+FFFD), and is here so that fusers trained with it read what they were trained on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Any, Literal

import torch
from torch import Tensor

from c2c.alignment.base import Alignment, Chunk, Prompt
from c2c.errors import AlignmentError, PromptError
from c2c.messages import Conversation
from c2c.prompting import Rendered, RenderOptions, Span, encode, pad_id, render, require_tokenizer
from c2c.tokens import TokenBatch

Strategy = Literal["first", "longest"]


@dataclass(frozen=True)
class Section:
    """Mark a run of slots as message text or template.

    Attributes:
        kind: which of them.
        slots: the receiver's and the sharer's id of each slot; None for an inserted pad.
    """

    kind: Literal["message", "template"]
    slots: list[tuple[int | None, int | None]]


@dataclass(frozen=True)
class PublishedAligner:
    """Align tokens as the published code does, for published fusers.

    Attributes:
        strategy: which of several sharer tokens stands for a receiver token: the ``first``, or the one with the
            ``longest`` text.
        enabled: off means what the published code does by default: the sharer is fed the receiver's ids, and all
            prompt tokens but the last are fused.
    """

    strategy: Strategy = "first"
    enabled: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return name and options, for the fuser's config."""
        return {"name": "published", "strategy": self.strategy, "enabled": self.enabled}

    def align(
        self, receiver: Any, sharers: Sequence[Any], batch: Sequence[Conversation], options: RenderOptions
    ) -> list[Prompt]:
        """Align each conversation to a prompt of its own, since sections differ; see :class:`.Aligner`."""
        require_tokenizer(receiver, "receiver")
        if not self.enabled:
            return [_same_ids(receiver, len(sharers), conversation, options) for conversation in batch]
        if len(sharers) != 1:
            raise AlignmentError(
                f"the published alignment pads two models to one length; it can't be used with {len(sharers)} sharers. "
                "Use alignment='spans', or sharers that read the receiver's ids."
            )
        sharer, prompts = require_tokenizer(sharers[0], "sharer"), []
        for conversation in batch:
            rendered = render(receiver, conversation, options), render(sharer, conversation, options)
            sections = align_rendered(receiver, sharer, *rendered, strategy=self.strategy)
            prompts.append(_prompt(sections, pad_id(receiver), pad_id(sharer)))
        return prompts


def _same_ids(receiver: Any, sharers: int, conversation: Conversation, options: RenderOptions) -> Prompt:
    ids = torch.tensor([encode(receiver, render(receiver, conversation, options)).ids])
    if ids.shape[1] < 2:
        raise AlignmentError(
            f"the prompt has {ids.shape[1]} token, and the last token is never fused: nothing is left to fuse. "
            "Pass a longer prompt, or ask the receiver alone."
        )
    fuse = torch.full_like(ids[0], 2**sharers - 1)
    fuse[-1] = 0
    mask = torch.ones_like(ids, dtype=torch.bool)
    tokens = TokenBatch(ids, mask, slot_positions(mask, [mask]), padded=False)
    return Prompt(tokens, (tokens,) * sharers, *plan_sections(fuse, mask, sharers))


def _prompt(sections: Sequence[Section], pad: int, sharer_pad: int) -> Prompt:
    slots = [(section.kind == "message", *slot) for section in sections for slot in section.slots]
    while slots[-1][1] is None:  # pads at the end are of no use
        slots.pop()
    messages, ours, theirs = zip(*slots, strict=True)
    mask, their_mask = (torch.tensor([[token is not None for token in side]]) for side in (ours, theirs))
    positions = slot_positions(mask, [their_mask])
    chunks, skipped = plan_sections(torch.tensor(messages).long(), mask, sharers=1)
    if not chunks:
        raise AlignmentError(
            "no token can be fused: with the published alignment the last section of a prompt is never fused, and "
            "this prompt has no message before it. Use alignment='spans', or end the prompt with the generation prompt."
        )
    whole = bool(mask.all())
    ids = torch.tensor([[pad if token is None else token for token in ours]])
    their_ids = torch.tensor([[sharer_pad if token is None else token for token in theirs]])
    receiver = TokenBatch(ids, mask, positions, not whole, natural=whole)
    sharer = TokenBatch(their_ids, their_mask, positions, not bool(their_mask.all()))
    return Prompt(receiver, (sharer,), chunks, skipped)


def align_rendered(
    receiver: Any, sharer: Any, ours: Rendered, theirs: Rendered, strategy: Strategy = "first"
) -> list[Section]:
    """Align one conversation slot by slot.

    Where both templates show the same messages the result is that of the published code. Where one template drops or
    trims a message away, which the published code fails on, that message counts as template on both sides.

    Args:
        receiver: the receiver's fast tokenizer.
        sharer: the sharer's.
        ours: the conversation as the receiver's template renders it.
        theirs: the same of the sharer's.
        strategy: see :class:`PublishedAligner`.
    """
    our_spans, their_spans = _published_spans(ours), _published_spans(theirs)
    if our_spans.keys() != their_spans.keys():  # only those that both templates show
        both = [(i, *pair) for i, pair in enumerate(zip(ours.spans, theirs.spans, strict=True))]
        our_spans = {i: mine[0] for i, mine, other in both if mine and other}
        their_spans = {i: other[0] for i, mine, other in both if mine and other}
    our_ids, our_runs = _token_runs(receiver, ours, our_spans.values())
    their_ids, their_runs = _token_runs(sharer, theirs, their_spans.values())
    sections: list[Section] = []
    cursor, their_cursor = 0, 0
    for (start, stop), (their_start, their_stop) in zip(our_runs, their_runs, strict=True):
        before = zip_longest(our_ids[cursor:start], their_ids[their_cursor:their_start])
        message = [(token, translate(receiver, sharer, token, strategy)) for token in our_ids[start:stop]]
        sections += [Section("template", list(before)), Section("message", list(message))]
        cursor, their_cursor = stop, their_stop
    sections.append(Section("template", list(zip_longest(our_ids[cursor:], their_ids[their_cursor:]))))
    return [section for section in sections if section.slots]


def translate(receiver: Any, sharer: Any, token: int, strategy: Strategy) -> int:
    """Translate one receiver token, taken alone, to a sharer token; a special one by its role, else by its string."""
    unknown = int(sharer.unk_token_id) if sharer.unk_token_id is not None else 0
    if token in receiver.all_special_ids:
        for role in ("unk_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(receiver, role) == token and getattr(sharer, role) is not None:
                return int(getattr(sharer, role))
        return int(sharer.get_vocab().get(receiver.convert_ids_to_tokens(token), unknown))
    text = receiver.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    candidates: list[int] = sharer.encode(text, add_special_tokens=False) or [unknown]
    if strategy == "first":
        return candidates[0]
    return max(candidates, key=lambda candidate: len(sharer.decode([candidate])))


def _published_spans(rendered: Rendered) -> dict[int, Span]:
    """Find message spans as the published code does: left to right, a hit counts if '<' or the end follows."""
    spans: dict[int, Span] = {}
    cursor = 0
    for index, content in enumerate(rendered.contents):
        text = re.escape(content)
        hits = (re.compile(pattern).search(rendered.text, cursor) for pattern in (text + r"(?=<|\Z)", text))
        if content and (hit := next(filter(None, hits), None)):
            spans[index] = hit.span()
            cursor = hit.end()
    return spans


def _token_runs(tokenizer: Any, rendered: Rendered, spans: Iterable[Span]) -> tuple[list[int], list[Span]]:
    """Tokenise a text, and find for each character span its run of tokens; a straddling token is message."""
    encoded = encode(tokenizer, rendered)
    starts, ends = [start for start, _ in encoded.offsets], [end for _, end in encoded.offsets]
    runs = [
        (
            next((i for i, stop in enumerate(ends) if stop > start), len(ends)),
            next((i for i, begin in enumerate(starts) if begin >= end), len(starts)),
        )
        for start, end in spans
    ]
    return encoded.ids, runs


def slot_positions(mask: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Compute the positions of the published code: slots from 0, inserted pads included, the same for all models.

    Columns at the start of a row where no model has a token are the padding of a batch, not of the alignment; they do
    not count, so that a row is the same in any batch. ``[batch, tokens]``.
    """
    empty = ~torch.stack([mask, *(other[:, : mask.shape[1]] for other in others)]).any(0)
    lead = empty.long().cumprod(-1).sum(-1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - lead).clamp_min(0)


def plan_sections(
    selection: Tensor, mask: Tensor, sharers: int, sections: Sequence[int] | None = None
) -> tuple[tuple[Chunk, ...], dict[str, int]]:
    """Plan the fusion of a batch whose rows all have this selection.

    Args:
        selection: for each slot a bit mask of the sharers to fuse, bit ``j`` for sharer ``j``; ``[tokens]``.
        mask: the receiver's mask, ``[batch, tokens]``: padding is never fused.
        sharers: number of sharers.
        sections: lengths of the sections, where two fused ones stand side by side; by default the runs.

    Returns:
        The chunks, and how many real receiver tokens are skipped, by reason.
    """
    counts = selection.unique_consecutive(return_counts=True)[1].tolist() if sections is None else list(sections)
    skipped: Counter[str] = Counter()
    chunks: list[Chunk] = []
    for stop, size in zip(accumulate(counts), counts, strict=True):
        start, bits = stop - size, int(selection[stop - 1])
        real = mask[:, start:stop]
        if stop == len(selection):
            skipped["last section, run on the fused cache"] += int(real.sum())
        elif bits <= 0:
            skipped["not selected"] += int(real.sum())
        else:
            rows, columns = real.nonzero(as_tuple=True)
            packed = Alignment(rows, columns + start, columns + start)
            alignment = Alignment.from_block(len(mask), start, stop) if bool(real.all()) else packed
            chunks.append(Chunk(stop, tuple(alignment if bits >> j & 1 else None for j in range(sharers))))
    return tuple(chunks), {reason: count for reason, count in skipped.items() if count}


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
    if any(bool((part != part[:, :1]).any()) for part in selection.split(list(sections), dim=1)):
        raise PromptError(f"sections {list(sections)} do not fit fuse_mask: a section has both values in a row.")
