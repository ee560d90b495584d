"""Private context: entries made of what a sharer has read, in the cache of a receiver that has not read it.

They stand before the text of the first user message, where a document would stand: the receiver reads its template and
system message as always, then these entries lie in its cache, and everything after them attends to them. Positions
count them like tokens. Nothing that the receiver computes itself is changed. Entries of several documents, each read by
itself, lie one after the other; all but the first have then been moved, and none has attended to those before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from c2c import identity, kv_cache
from c2c.alignment import Alignment, Chunk, Prompt
from c2c.errors import ContextLengthError, PromptError
from c2c.fusers import Fuser
from c2c.fusers.base import Entries
from c2c.handoff import Handoff
from c2c.kv_cache import KeyValue
from c2c.language_model import LanguageModel
from c2c.messages import Conversation, conversations
from c2c.prompting import RenderOptions, encode, first_user, render
from c2c.recompute import LayerRange, recompute_layers, recompute_tokens
from c2c.rope import switch_length
from c2c.sharer import Sharer
from c2c.tokens import TokenBatch, common_prefix

if TYPE_CHECKING:
    from c2c.model import C2CModel


_MANY_DOCUMENTS = 4  # from so many on those that the question is about are computed whole
_QUESTION_TOKENS = 64  # of what follows the documents, by which these are found


@dataclass(frozen=True)
class PrivateEntries:
    """Hold entries for a receiver's cache, not yet at a position.

    Attributes:
        layers: keys without rotation and values per receiver layer, ``[1, kv_heads, slots, head_dim]``.
        sharer_bytes: bytes of the sharer's entries that they were made of.
        handoff: what they are copied from, where they belong to tokens of the receiver's own vocabulary.
        refresh: how many of the first tokens of a copy the receiver computes itself, where it was moved.
        reread: how many of many documents the receiver computes whole, those that are nearest to the question; the
            others then stay as they are.
        recompute: layers ``(first, stop)`` of a copy that the receiver computes itself, as for a variant.
    """

    layers: list[KeyValue]
    sharer_bytes: int
    handoff: Handoff | None = None
    refresh: int = 0
    reread: int = 0
    recompute: LayerRange | None = None

    @property
    def slots(self) -> int:
        """How many entries each layer gets."""
        return self.layers[0][0].shape[2]

    def leading_tokens(self, most: int) -> int:
        """Count the first entries that the receiver can compute itself: thoughts have no tokens that it could read."""
        if self.handoff is None:
            return 0
        ids = self.handoff.ids[self.handoff.kept[:most]]
        return common_prefix(ids.tolist(), ids[ids >= 0].tolist())

    def insert_into(self, tokens: TokenBatch, column: int) -> TokenBatch:
        """Make room for the entries in the receiver's tokens."""
        if self.handoff is None:
            return tokens.insert_slots(column, self.slots)
        return tokens.insert_tokens(column, self.handoff.ids[self.handoff.kept])


@dataclass(frozen=True)
class PrivatePrompt(Prompt):
    """Hold a prompt of one row with the entries that are put into the receiver's cache.

    Its receiver's tokens have columns for the entries, and its fusion plan is moved accordingly.

    Attributes:
        column: where the entries begin.
        entries: the entries, one after the other.
        exact: the first of them were read behind the very tokens that they stand behind, and are taken with these.
    """

    column: int = 0
    entries: tuple[PrivateEntries, ...] = ()
    exact: bool = False

    @property
    def slots(self) -> int:
        """Columns of private context."""
        return sum(entries.slots for entries in self.entries)


def project(handoff: Handoff, sharer: Sharer, fuser: Fuser) -> PrivateEntries:
    """Project a handoff with a memory fuser; an untrained one makes no entries, and so leaves the receiver as it is.

    Raises:
        MismatchError: the handoff is another model's than the fuser's sharer.
    """
    made = handoff.projected(fuser)
    if made is not None:
        return PrivateEntries(made, handoff.nbytes)
    identity.check([("handoff", sharer.identity, handoff.sharer)], allow_mismatch=False)
    device, layers, kept = fuser.device, fuser.config.source_layers, handoff.kept
    keys, values = (
        [handoff.layers[layer][side].dequantize(sharer.dtype)[:, :, kept].to(device) for layer in layers]
        for side in (0, 1)
    )
    tables = sharer.rotary(handoff.tokens.positions[:, kept].to(device), handoff.tokens.length)
    rotary = None if tables is None else [tables[layer] for layer in layers]
    entries: list[KeyValue] = fuser(Entries(keys, values, rotary))
    if not fuser.trained:  # zeros are no entries: each would take its share of the receiver's attention
        entries = [(keys[:, :, :0], values[:, :, :0]) for keys, values in entries]
    per_token = sum(sum(part.nbytes for part in handoff.layers[layer]) // len(handoff.ids) for layer in set(layers))
    if not fuser.keeps_tokens:
        return PrivateEntries(entries, per_token * len(kept))
    config: Any = fuser.config
    layers = None if config.recompute is None else (config.recompute[0], config.recompute[1])
    if layers == (0, len(entries)):  # all of them are the receiver's own
        return PrivateEntries(entries, per_token * len(kept), handoff, recompute=layers)
    return PrivateEntries(entries, per_token * len(kept), handoff, config.refresh, config.reread, layers)


def project_all(
    handoffs: Sequence[Sequence[Sequence[Handoff]]], pairs: Sequence[tuple[Sharer, Fuser]]
) -> list[list[PrivateEntries]]:
    """Project the handoffs of a batch, some per conversation and pair; one that many rows share only once."""
    projected: dict[tuple[int, int], PrivateEntries] = {}
    for row in handoffs:
        for index, several in enumerate(row):
            for handoff in several:
                if (index, id(handoff)) not in projected:
                    projected[index, id(handoff)] = project(handoff, *pairs[index])
    return [
        [projected[index, id(handoff)] for index, several in enumerate(row) for handoff in several] for row in handoffs
    ]


def align_shared(model: C2CModel, conversation: Conversation, options: RenderOptions) -> Prompt:
    """Align one conversation for the receiver and those sharers that read it too, beside those of private context."""
    shared = [index for index in range(len(model.sharers)) if index not in model.private]
    if not shared:
        tokens = model.receiver.encode([conversation], options)
        return Prompt(tokens, (tokens,) * len(model.sharers), ())
    tokenizers = [model.sharers[index].tokenizer for index in shared]
    (prompt,) = model.aligner.align(model.receiver.tokenizer, tokenizers, [conversation], options)

    def spread(values: Sequence[Any], default: Any) -> tuple[Any, ...]:
        """Give the others a default."""
        placed = dict(zip(shared, values, strict=True))
        return tuple(placed.get(index, default) for index in range(len(model.sharers)))

    chunks = tuple(Chunk(chunk.stop, spread(chunk.alignments, None)) for chunk in prompt.chunks)
    return replace(prompt, sharers=spread(prompt.sharers, prompt.receiver), chunks=chunks)


def place(
    prompt: Prompt,
    receiver: LanguageModel,
    conversation: Conversation,
    options: RenderOptions,
    entries: Sequence[PrivateEntries],
    instruction: str = "",
) -> PrivatePrompt:
    """Make room for entries, in this order, in the first user message of a prompt of one row.

    Args:
        prompt: the conversation's tokens.
        receiver: the receiver.
        conversation: what it reads.
        options: how that was rendered.
        entries: what is put into its cache.
        instruction: what the message begins with; entries stand behind it.
    """
    column = first_user_column(receiver.tokenizer, conversation, options, len(instruction))
    slots = sum(part.slots for part in entries)
    tokens, chunks, at = prompt.receiver, list(prompt.chunks), column
    for part in entries:
        if part.slots:
            tokens = part.insert_into(tokens, at)
            at += part.slots
    if slots > 0:
        chunks = []
        for chunk in prompt.chunks:
            moved = [
                part and Alignment(part.rows, part.receiver + slots * (part.receiver >= column), part.sharer)
                for part in chunk.alignments
            ]
            chunks.append(Chunk(chunk.stop + slots * (chunk.stop > column), tuple(moved)))
    placed = PrivatePrompt(tokens, prompt.sharers, tuple(chunks), prompt.skipped, column, tuple(entries))
    return replace(placed, exact=_is_exact(placed, receiver))


def _is_exact(prompt: PrivatePrompt, receiver: LanguageModel) -> bool:
    """Whether the first entries and all that stands before them are the beginning of a handoff."""
    handoff = prompt.entries[0].handoff if prompt.entries else None
    if handoff is None or handoff.sharer.same_weights(receiver.identity) is False:
        return False  # of a variant; the receiver reads itself what stands before the document
    if receiver.left_out or handoff.precision != str(receiver.dtype).removeprefix("torch."):
        return False
    switch, stop = switch_length(receiver.model), prompt.column + prompt.entries[0].slots
    if switch is not None and prompt.receiver.length > switch:
        return False  # the frequencies of the rotation depend on the length
    alone = handoff.kept.tolist() == list(range(prompt.column, stop))
    return alone and prompt.receiver.ids[0, :stop].tolist() == handoff.ids[:stop].tolist()


def moved_entries(prompts: Sequence[PrivatePrompt]) -> list[str]:
    """Return remarks for the report: which copied entries are exact and which were moved."""
    copied = [part for prompt in prompts for part in prompt.entries if part.handoff is not None]
    exact = sum(prompt.exact for prompt in prompts)
    if not copied:
        return []
    if exact == len(copied):
        return ["copy: all documents lie where they were read, as the receiver itself would have read them"]
    refresh, layers = copied[0].refresh, copied[0].recompute
    again = f"; the receiver read their first {refresh} tokens itself" if refresh else ""
    again += f"; it recomputed layers {layers[0]} to {layers[1] - 1}" if layers else ""
    return [f"copy: {len(copied) - exact} of {len(copied)} documents were moved, or read by a variant{again}"]


def prefill_entries(cache: Cache, receiver: LanguageModel, prompt: PrivatePrompt) -> Cache:
    """Prefill a prompt up to where its entries stand and add them; the cache is changed and returned."""
    if prompt.slots == 0:
        return cache
    tokens, column, entries = prompt.receiver.to(receiver.device), prompt.column, list(prompt.entries)
    starts = list(accumulate((part.slots for part in entries), initial=column))
    if prompt.exact:
        cache = kv_cache.append(cache, _first_columns(entries[0], receiver, starts[1]))
    elif column > 0:
        cache = receiver.prefill(tokens, column, cache)
    moved = range(1 if prompt.exact else 0, len(entries))
    if any(part.recompute for part in entries):
        for index in moved:
            _append([entries[index]], receiver, tokens, starts[index], cache)
    elif moved:
        _append(entries[moved.start :], receiver, tokens, starts[moved.start], cache)
    whole = _nearest(receiver, tokens, entries, starts, cache)
    counts = [(index, whole.get(index, 0) if whole else entries[index].refresh) for index in moved]
    fresh = [(index, entries[index].leading_tokens(count)) for index, count in counts]
    recompute_tokens(
        receiver, tokens, [(starts[index], starts[index] + count) for index, count in fresh if count], cache
    )
    return cache


def _nearest(
    receiver: LanguageModel, tokens: TokenBatch, entries: Sequence[PrivateEntries], starts: Sequence[int], cache: Cache
) -> dict[int, int]:
    """Find those of many documents that are nearest to the question; return their indices, with their tokens.

    Late interaction as in ColBERT (Khattab and Zaharia 2020, arXiv:2004.12832): each token of the question takes the
    most similar one of a document, here by the cosine of their values, centred, over all layers. The host waits for
    the device once.
    """
    count, first, last = max(part.reread for part in entries), starts[0], starts[-1]
    stop = min(last + _QUESTION_TOKENS, tokens.length - 1)
    if not count or len(entries) < _MANY_DOCUMENTS or stop <= last:
        return {}
    asked = receiver.prefill(tokens, stop, kv_cache.view(cache))
    scores = torch.zeros(len(entries), device=receiver.device)
    for _, values in kv_cache.layers(asked):
        states = values[0, :, first:].float()
        states = torch.nn.functional.normalize(states - states.mean(1, keepdim=True), dim=-1)
        near = states[:, last - first :] @ states[:, : last - first].transpose(1, 2)
        parts = near.split([part.slots for part in entries], dim=2)
        scores += torch.stack([part.amax(2).mean() if part.shape[2] else part.sum() - 1 for part in parts])
    return {index: entries[index].slots for index in scores.topk(min(count, len(entries))).indices.tolist()}


def _append(
    entries: Sequence[PrivateEntries], receiver: LanguageModel, tokens: TokenBatch, column: int, cache: Cache
) -> None:
    """Add entries that begin at ``column`` to the cache, one after the other; several at once copy it only once."""
    stop = column + sum(part.slots for part in entries)
    tables = receiver.rotary(tokens.positions[:, column:stop], tokens.length)
    rotated: list[KeyValue] = []
    for index, parts in enumerate(zip(*(part.layers for part in entries), strict=True)):
        keys, values = (torch.cat([part[side].to(receiver.device) for part in parts], 2) for side in (0, 1))
        keys = keys if tables is None else tables[index].apply(keys)
        rotated.append((keys.to(receiver.dtype), values.to(receiver.dtype)))
    for part in entries:
        if part.recompute is not None and part.handoff is not None:
            rotated[slice(*part.recompute)] = _recomputed(part, receiver, tokens, column, cache)
    kv_cache.append(cache, rotated)


def _recomputed(
    entries: PrivateEntries, receiver: LanguageModel, tokens: TokenBatch, column: int, cache: Cache
) -> list[KeyValue]:
    """Compute the receiver's own entries of some layers for a document at ``column``."""
    handoff, layers, hidden = entries.handoff, entries.recompute, None
    assert handoff is not None
    assert layers is not None
    if layers[0] and handoff.hidden is not None and handoff.hidden[0] == layers[0]:
        hidden = handoff.hidden[1].dequantize(receiver.dtype)
    return recompute_layers(receiver, tokens, column, handoff.ids[handoff.kept], layers, cache, hidden)


def _first_columns(entries: PrivateEntries, receiver: LanguageModel, stop: int) -> list[KeyValue]:
    """Return the first entries of a handoff as they are, keys with their rotation."""
    assert entries.handoff is not None
    return [
        (keys[:, :, :stop], values[:, :, :stop])
        for keys, values in kv_cache.layers(entries.handoff.cache(receiver.dtype, receiver.device))
    ]


def first_user_column(tokenizer: Any, conversation: Conversation, options: RenderOptions, characters: int = 0) -> int:
    """Find the receiver's first token of the first user message, behind so many of its first characters.

    Raises:
        PromptError: there is no user message, or the template left it out.
    """
    encoded = encode(tokenizer, render(tokenizer, conversation, options))
    found = encoded.rendered.spans[first_user(conversation)]
    if found is None:
        raise PromptError("private context stands before the first user message, which the chat template left out.")
    start = found[0][0] + max(characters - found[1], 0)
    return next(column for column, (_, end) in enumerate(encoded.offsets) if end > start)


# What a sharer reads for one conversation: messages, or a handoff of what it has read.
Document = Conversation | Handoff


def documents(given: Any, rows: int, single: bool) -> list[list[Document]]:
    """Normalise what one sharer reads to a list of documents for each conversation.

    Args:
        given: messages or a :class:`Handoff`, for all conversations; for one conversation a list of several; for a
            batch a list with one of these, or a list of several, for each.
        rows: conversations in the batch.
        single: whether it is one conversation rather than a batch.

    Raises:
        PromptError: empty, or not so many as there are conversations.
    """
    if isinstance(given, Handoff) or _is_conversation(given):
        return [[_document(given)]] * rows
    if not isinstance(given, Sequence) or isinstance(given, bytes) or not given:
        raise PromptError(
            f"got {given!r:.200} as private context. Expected texts, messages, handoffs, or lists of them."
        )
    if single and not any(_is_several(item) for item in given):
        return [[_document(item) for item in given]]
    if len(given) != rows:
        raise PromptError(f"got {len(given)} private contexts for {rows} conversations; give one for each, or one.")
    return [[_document(one) for one in (item if _is_several(item) else [item])] for item in given]


def _is_conversation(item: Any) -> bool:
    messages = isinstance(item, Sequence) and bool(item) and all(isinstance(part, Mapping) for part in item)
    return isinstance(item, str) or messages


def _is_several(item: Any) -> bool:
    """Whether an item is a list of documents rather than one."""
    return isinstance(item, Sequence) and not isinstance(item, bytes) and bool(item) and not _is_conversation(item)


def _document(item: Any) -> Document:
    return item if isinstance(item, Handoff) else conversations(item)[0][0]


def read_handoffs(
    given: Any,
    pairs: Sequence[tuple[Sharer, Fuser]],
    batch: Sequence[Conversation],
    single: bool,
    options: RenderOptions,
) -> list[list[list[Handoff]]]:
    """Read (or take, where handoffs are given) the private context of each conversation and sharer.

    Args:
        given: what :func:`documents` takes; for several sharers a tuple with one of these for each. What several
            conversations are asked about is read once.
        pairs: who reads, for which fuser.
        batch: the conversations.
        single: whether they are one rather than a batch.
        options: how to render messages; tools are for the model that answers.

    Returns:
        Per conversation and sharer its handoffs.

    Raises:
        PromptError: not so many as there are sharers or conversations.
    """
    per_sharer = given if isinstance(given, tuple) else (given,)
    if len(per_sharer) != len(pairs):
        raise PromptError(
            f"sharer_messages are for {len(per_sharer)} sharers, and {len(pairs)} hand over private context: pass a "
            "tuple with one entry for each."
        )
    options, read = replace(options, tools=()), dict[tuple[int, str], Handoff]()

    def handoff(index: int, document: Document, conversation: Conversation, among: bool) -> Handoff:
        if isinstance(document, Handoff):
            return document
        sharer, fuser = pairs[index]
        before = conversation[: first_user(conversation)] if fuser.keeps_tokens else None
        key = (index, json.dumps([before, document, among], sort_keys=True))
        if key not in read:
            first = (getattr(fuser.config, "recompute", None) or (0,))[0]
            how: dict[str, Any] = {"before": before, "options": options, "keep_hidden": first}
            reader = sharer.for_fuser(fuser)
            if among and fuser.keeps_tokens:
                with suppress(ContextLengthError):  # where there is no room for another passage
                    read[key] = reader.read(document, among=True, **how)
            if key not in read:
                read[key] = reader.read(document, **how)
        return read[key]

    def read_row(index: int, row: Sequence[Document], conversation: Conversation) -> list[Handoff]:
        """Read each document for its place: the first follows no other."""
        return [handoff(index, one, conversation, place > 0) for place, one in enumerate(row)]

    found = [documents(part, len(batch), single) for part in per_sharer]
    return [
        [read_row(index, rows[place], conversation) for index, rows in enumerate(found)]
        for place, conversation in enumerate(batch)
    ]
