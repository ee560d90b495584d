"""Alignment by slots, as published: both models read sequences of one length, slot by slot.

Each receiver token of a message is decoded alone and re-encoded with the sharer's tokenizer; template sections keep
each model's own tokens and are padded to one length. It loses information (a character split over tokens becomes
U+FFFD), and is here so that fusers trained with it read what they were trained on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from c2c.alignment.base import Alignment, Chunk, Prompt
from c2c.errors import AlignmentError, PromptError
from c2c.messages import Conversation
from c2c.prompting import Rendered, RenderOptions, Span, encode, pad_id, render, require_tokenizer
from c2c.tokens import TokenBatch

Kind = Literal["message", "template"]
Strategy = Literal["first", "longest"]


@dataclass(frozen=True)
class Section:
    """Mark a run of slots as message text or template."""

    kind: Kind
    start: int
    stop: int


@dataclass
class AlignedSlots:
    """Hold two id lists of one length.

    Attributes:
        receiver_ids: the receiver's ids, one per slot.
        sharer_ids: the sharer's ids, one per slot.
        message_mask: whether a slot is message text.
        receiver_padding: whether the receiver's id is an inserted pad.
        sharer_padding: the same for the sharer.
        sections: runs of template and message.
    """

    receiver_ids: list[int] = field(default_factory=list)
    sharer_ids: list[int] = field(default_factory=list)
    message_mask: list[bool] = field(default_factory=list)
    receiver_padding: list[bool] = field(default_factory=list)
    sharer_padding: list[bool] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def add(self, kind: Kind, ours: Sequence[int], theirs: Sequence[int], pads: tuple[int, int]) -> None:
        """Append a section, the shorter side filled with its pad at the end."""
        start, width = len(self.receiver_ids), max(len(ours), len(theirs))
        if width:
            self.sections.append(Section(kind, start, start + width))
        self.receiver_ids += [*ours, *[pads[0]] * (width - len(ours))]
        self.sharer_ids += [*theirs, *[pads[1]] * (width - len(theirs))]
        self.message_mask += [kind == "message"] * width
        self.receiver_padding += [slot >= len(ours) for slot in range(width)]
        self.sharer_padding += [slot >= len(theirs) for slot in range(width)]


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
        sharer = require_tokenizer(sharers[0], "sharer")
        return [
            _prompt(align_conversation(receiver, sharer, conversation, options=options, strategy=self.strategy))
            for conversation in batch
        ]


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


def _prompt(slots: AlignedSlots) -> Prompt:
    keep = max(i for i, padded in enumerate(slots.receiver_padding) if not padded) + 1  # pads at the end: no use
    ours, theirs = (~torch.tensor([side[:keep]]) for side in (slots.receiver_padding, slots.sharer_padding))
    positions = slot_positions(ours, [theirs])
    chunks, skipped = plan_sections(torch.tensor(slots.message_mask[:keep]).long(), ours, sharers=1)
    if not chunks:
        raise AlignmentError(
            "no token can be fused: with the published alignment the last section of a prompt is never fused, and "
            "this prompt has no message before it. Use alignment='spans', or end the prompt with the generation prompt."
        )
    whole = bool(ours.all())
    receiver = TokenBatch(torch.tensor([slots.receiver_ids[:keep]]), ours, positions, not whole, natural=whole)
    sharer = TokenBatch(torch.tensor([slots.sharer_ids[:keep]]), theirs, positions, not bool(theirs.all()))
    return Prompt(receiver, (sharer,), chunks, skipped)


def align_conversation(
    receiver: Any,
    sharer: Any,
    conversation: Conversation,
    *,
    options: RenderOptions,
    strategy: Strategy = "first",
    remove_last_suffix: bool = False,
) -> AlignedSlots:
    """Align one conversation slot by slot.

    Where both templates show the same messages the result is that of the published code. Where one template drops or
    trims a message away, which the published code fails on, that message counts as template on both sides.

    Args:
        receiver: the receiver's fast tokenizer.
        sharer: the sharer's.
        conversation: the messages.
        options: how to render them.
        strategy: see :class:`PublishedAligner`.
        remove_last_suffix: render all but the last message with the generation prompt and append its raw text.
    """
    ours = _render(receiver, conversation, options, remove_last_suffix)
    theirs = _render(sharer, conversation, options, remove_last_suffix)
    our_spans, their_spans = _published_spans(ours), _published_spans(theirs)
    if our_spans.keys() != their_spans.keys():  # only those that both templates show
        both = [(i, *pair) for i, pair in enumerate(zip(ours.spans, theirs.spans, strict=True))]
        our_spans = {i: mine[0] for i, mine, other in both if mine and other}
        their_spans = {i: other[0] for i, mine, other in both if mine and other}
    our_ids, our_runs = _token_runs(receiver, ours, our_spans.values())
    their_ids, their_runs = _token_runs(sharer, theirs, their_spans.values())
    slots, pads = AlignedSlots(), (pad_id(receiver), pad_id(sharer))
    cursor, their_cursor = 0, 0
    for (start, stop), (their_start, their_stop) in zip(our_runs, their_runs, strict=True):
        slots.add("template", our_ids[cursor:start], their_ids[their_cursor:their_start], pads)
        message = our_ids[start:stop]
        slots.add("message", message, [translate(receiver, sharer, token, strategy) for token in message], pads)
        cursor, their_cursor = stop, their_stop
    slots.add("template", our_ids[cursor:], their_ids[their_cursor:], pads)
    return slots


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


def _render(tokenizer: Any, conversation: Conversation, options: RenderOptions, remove_last_suffix: bool) -> Rendered:
    if not remove_last_suffix:
        return render(tokenizer, conversation, options)
    opened = RenderOptions(True, "", options.enable_thinking)
    head = render(tokenizer, conversation[:-1], opened)
    last = conversation[-1]["content"]
    span = ((len(head.text), len(head.text) + len(last)), 0) if last else None
    return Rendered(head.text + last + options.answer_prefix, (*head.contents, last), (*head.spans, span))


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
    empty = ~mask
    for other in others:
        empty = empty & ~other[:, : mask.shape[1]]
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
        bits, real = int(selection[stop - 1]), int(mask[:, stop - size : stop].sum())
        if stop == len(selection):
            skipped["last section, run on the fused cache"] += real
        elif bits <= 0:
            skipped["not selected"] += real
        else:
            alignment = _section(mask, stop - size, stop)
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
    if any(bool((part != part[:, :1]).any()) for part in selection.split(list(sections), dim=1)):
        raise PromptError(f"sections {list(sections)} do not fit fuse_mask: a section has both values in a row.")
