"""Alignment by slots, as published: both models read sequences of one length, slot by slot.

Each receiver token of a message is decoded alone and re-encoded with the sharer's tokenizer; template sections keep
each model's own tokens and are padded to one length. It loses information (a character split over tokens becomes
U+FFFD), and is here so that fusers trained with it read what they were trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from c2c.alignment.base import Alignment, Chunk, Prompt
from c2c.errors import AlignmentError, PromptError
from c2c.messages import Conversation
from c2c.prompting import Rendered, RenderOptions, Span, encode, render, require_tokenizer
from c2c.tokens import TokenBatch

Strategy = Literal["first", "longest"]


@dataclass(frozen=True)
class Section:
    """Mark a run of slots as message text or template."""

    kind: Literal["message", "template"]
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

    def add_template(self, ours: Sequence[int], theirs: Sequence[int], our_pad: int, their_pad: int) -> None:
        """Append a template section, the shorter side filled with pads at its end."""
        width = max(len(ours), len(theirs))
        missing, their_missing = width - len(ours), width - len(theirs)
        self._add("template", [*ours, *[our_pad] * missing], [*theirs, *[their_pad] * their_missing])
        self.receiver_padding += [False] * len(ours) + [True] * missing
        self.sharer_padding += [False] * len(theirs) + [True] * their_missing

    def add_message(self, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """Append a message section, one sharer token per receiver token."""
        self._add("message", ours, theirs)
        self.receiver_padding += [False] * len(ours)
        self.sharer_padding += [False] * len(ours)

    def _add(self, kind: Literal["message", "template"], ours: Sequence[int], theirs: Sequence[int]) -> None:
        start = len(self.receiver_ids)
        if ours:
            self.sections.append(Section(kind, start, start + len(ours)))
        self.receiver_ids += ours
        self.sharer_ids += theirs
        self.message_mask += [kind == "message"] * len(ours)


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
        if self.enabled:
            return [self._align_one(receiver, sharers, conversation, options) for conversation in batch]
        return [self._same_ids(receiver, len(sharers), conversation, options) for conversation in batch]

    def _same_ids(self, receiver: Any, sharers: int, conversation: Conversation, options: RenderOptions) -> Prompt:
        ids = torch.tensor([encode(receiver, render(receiver, conversation, options)).ids])
        if ids.shape[1] < 2:
            raise AlignmentError(
                f"the prompt has {ids.shape[1]} token, and the last token is never fused: nothing is left to fuse. "
                "Pass a longer prompt, or ask the receiver alone."
            )
        fuse = torch.ones_like(ids)
        fuse[:, -1] = 0
        fuse *= 2**sharers - 1
        mask = torch.ones_like(ids, dtype=torch.bool)
        tokens = TokenBatch(ids, mask, slot_positions(mask, [mask]), padded=False)
        chunks, skipped = plan_sections(fuse[0], mask, sharers)
        return Prompt(tokens, (tokens,) * sharers, chunks, skipped)

    def _align_one(
        self, receiver: Any, sharers: Sequence[Any], conversation: Conversation, options: RenderOptions
    ) -> Prompt:
        if len(sharers) != 1:
            raise AlignmentError(
                f"the published alignment pads two models to one length; it can't be used with {len(sharers)} sharers. "
                "Use alignment='spans', or sharers that read the receiver's ids."
            )
        require_tokenizer(sharers[0], "sharer")
        slots = align_conversation(receiver, sharers[0], conversation, options=options, strategy=self.strategy)
        return _prompt(slots)


def _prompt(slots: AlignedSlots) -> Prompt:
    keep = max(i for i, padded in enumerate(slots.receiver_padding) if not padded) + 1  # pads at the end: no use
    fuse = torch.tensor(slots.message_mask[:keep]).long()
    ours = ~torch.tensor([slots.receiver_padding[:keep]])
    theirs = ~torch.tensor([slots.sharer_padding[:keep]])
    positions = slot_positions(ours, [theirs])
    chunks, skipped = plan_sections(fuse, ours, sharers=1)
    if not chunks:
        raise AlignmentError(
            "no token can be fused: with the published alignment the last section of a prompt is never fused, and "
            "this prompt has no message before it. Use alignment='spans', or end the prompt with the generation prompt."
        )
    receiver = TokenBatch(
        torch.tensor([slots.receiver_ids[:keep]]),
        ours,
        positions,
        bool((~ours).any()),
        natural=not bool((~ours).any()),
    )
    sharer = TokenBatch(torch.tensor([slots.sharer_ids[:keep]]), theirs, positions, bool((~theirs).any()))
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
        sharer: the sharer's fast tokenizer.
        conversation: the messages.
        options: how to render them.
        strategy: see :class:`PublishedAligner`.
        remove_last_suffix: render all but the last message with the generation prompt and append its raw text.
    """
    ours = _render(receiver, conversation, options, remove_last_suffix)
    theirs = _render(sharer, conversation, options, remove_last_suffix)
    our_spans = _published_spans(receiver, ours)
    their_spans = _published_spans(sharer, theirs)
    if {i for i, _ in our_spans} != {i for i, _ in their_spans}:
        our_spans, their_spans = _common_spans(ours, theirs)
    our_ids, our_runs = _token_runs(receiver, ours, [span for _, span in our_spans])
    their_ids, their_runs = _token_runs(sharer, theirs, [span for _, span in their_spans])
    our_pad, their_pad = _pad_id(receiver), _pad_id(sharer)
    slots = AlignedSlots()
    cursor, their_cursor = 0, 0
    for (start, stop), (their_start, their_stop) in zip(our_runs, their_runs, strict=True):
        slots.add_template(our_ids[cursor:start], their_ids[their_cursor:their_start], our_pad, their_pad)
        message = our_ids[start:stop]
        slots.add_message(message, [translate(receiver, sharer, token, strategy) for token in message])
        cursor, their_cursor = stop, their_stop
    slots.add_template(our_ids[cursor:], their_ids[their_cursor:], our_pad, their_pad)
    return slots


def translate(receiver: Any, sharer: Any, token: int, strategy: Strategy) -> int:
    """Translate one receiver token, taken alone, to a sharer token."""
    special = _special_token(receiver, sharer, token)
    if special is not None:
        return special
    text = receiver.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    candidates: list[int] = sharer.encode(text, add_special_tokens=False)
    if not candidates:
        return _unknown_id(sharer)
    if len(candidates) == 1 or strategy == "first":
        return candidates[0]
    return max(candidates, key=lambda candidate: len(sharer.decode([candidate])))


def _special_token(receiver: Any, sharer: Any, token: int) -> int | None:
    """Find the counterpart of a special token: by role (pad, eos, bos, unk), else the same string."""
    if token not in receiver.all_special_ids:
        return None
    found: int | None = None
    for role in ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id"):
        if getattr(receiver, role) == token and getattr(sharer, role) is not None:
            found = getattr(sharer, role)
    if found is not None:
        return found
    same = sharer.get_vocab().get(receiver.convert_ids_to_tokens(token))
    return int(same) if same is not None else _unknown_id(sharer)


def _unknown_id(tokenizer: Any) -> int:
    return int(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0


def _pad_id(tokenizer: Any) -> int:
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _render(tokenizer: Any, conversation: Conversation, options: RenderOptions, remove_last_suffix: bool) -> Rendered:
    if not remove_last_suffix:
        return render(tokenizer, conversation, options)
    opened = RenderOptions(True, "", options.enable_thinking)
    head = render(tokenizer, conversation[:-1], opened)
    last = conversation[-1]["content"]
    span = ((len(head.text), len(head.text) + len(last)), 0) if last else None
    return Rendered(head.text + last + options.answer_prefix, (*head.contents, last), (*head.spans, span))


def _published_spans(tokenizer: Any, rendered: Rendered) -> list[tuple[int, Span]]:
    """Find message spans as the published code does: left to right, a hit counts if '<' or the end follows."""
    spans: list[tuple[int, Span]] = []
    cursor = 0
    for index, content in enumerate(rendered.contents):
        start = _search(tokenizer, rendered.text, content, cursor) if content else -1
        if start >= 0:
            spans.append((index, (start, start + len(content))))
            cursor = start + len(content)
    return spans


def _search(tokenizer: Any, text: str, content: str, cursor: int) -> int:
    first = text.find(content, cursor)
    at = first
    while at >= 0:
        end = at + len(content)
        if end == len(text) or text[end] == "<":
            return at
        at = text.find(content, at + 1)
    return first


def _common_spans(ours: Rendered, theirs: Rendered) -> tuple[list[tuple[int, Span]], list[tuple[int, Span]]]:
    """Return the spans of messages that both templates show."""
    both = [i for i, pair in enumerate(zip(ours.spans, theirs.spans, strict=True)) if None not in pair]
    return (
        [(i, found[0]) for i in both if (found := ours.spans[i]) is not None],
        [(i, found[0]) for i in both if (found := theirs.spans[i]) is not None],
    )


def _token_runs(tokenizer: Any, rendered: Rendered, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
    """Tokenise a text, and find for each character span its run of tokens; a straddling token is message."""
    encoded = encode(tokenizer, rendered)
    offsets = encoded.offsets
    runs: list[Span] = []
    for start, end in spans:
        first = next((i for i, (_, stop) in enumerate(offsets) if stop > start), len(offsets))
        last = next((i for i, (begin, _) in enumerate(offsets) if begin >= end), len(offsets))
        runs.append((first, last))
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


def runs(selection: Tensor) -> list[tuple[int, int, int]]:
    """Return ``(value, start, stop)`` of each run of equal values in a 1-D tensor."""
    values = selection.tolist()
    borders = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return [(int(values[a]), a, b) for a, b in pairwise(borders) if a < b]


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
