"""Private context: entries made of what a sharer has read, put into the cache of a receiver that has not read it.

They stand before the text of the first user message, where a document would stand: the receiver reads its template and
system message as always, then these entries lie in its cache, and everything after them attends to them. Positions
count them like tokens. Nothing that the receiver computes itself is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache

from c2c import identity, kv_cache
from c2c.alignment import Alignment, Chunk, Prompt
from c2c.errors import PromptError
from c2c.fusers import Fuser
from c2c.fusers.base import Entries
from c2c.handoff import Handoff
from c2c.kv_cache import KeyValue
from c2c.language_model import LanguageModel, Sharer
from c2c.messages import Conversation, conversations
from c2c.prompting import RenderOptions, encode, render


@dataclass(frozen=True)
class Memory:
    """Entries for a receiver's cache, not yet at a position.

    Attributes:
        entries: keys without rotation and values per receiver layer, ``[1, kv_heads, slots, head_dim]``.
        read: bytes of the sharer's entries that they were made of.
    """

    entries: list[KeyValue]
    read: int

    @property
    def slots(self) -> int:
        """How many entries each layer gets."""
        return self.entries[0][0].shape[2]


@dataclass(frozen=True)
class Placed:
    """One prompt with the entries that go into it.

    Attributes:
        prompt: one row; its receiver's tokens have columns for the entries, and its plan is moved accordingly.
        column: where the entries begin.
        memories: the entries, one after the other.
    """

    prompt: Prompt
    column: int
    memories: list[Memory]


def project(handoff: Handoff, sharer: Sharer, fuser: Fuser) -> Memory:
    """A handoff through a memory fuser; an untrained one makes no entries, and so leaves the receiver as it is.

    Raises:
        MismatchError: the handoff is another model's than the fuser's sharer.
    """
    identity.check([("handoff", sharer.identity, handoff.sharer)], allow_mismatch=False)
    device, layers = fuser.device, fuser.config.source_layers
    kept = handoff.kept
    keys = [handoff.layers[layer][0].unpack(sharer.dtype)[:, :, kept].to(device) for layer in layers]
    values = [handoff.layers[layer][1].unpack(sharer.dtype)[:, :, kept].to(device) for layer in layers]
    tables = sharer.rotary(handoff.tokens.positions[:, kept].to(device))
    rotary = None if tables is None else [tables[layer] for layer in layers]
    entries: list[KeyValue] = fuser(Entries(keys, values, rotary))
    if not fuser.trained:  # zeros are no entries: each would take its share of the receiver's attention
        entries = [(keys[:, :, :0], values[:, :, :0]) for keys, values in entries]
    used = dict.fromkeys(layers, 0)  # several receiver layers may read one sharer layer
    per_token = {layer: sum(part.nbytes for part in handoff.layers[layer]) // len(handoff.ids) for layer in used}
    return Memory(entries, sum(per_token.values()) * len(kept))


def place(prompt: Prompt, column: int, memories: Sequence[Memory]) -> Placed:
    """Make room for entries in a prompt of one row.

    Args:
        prompt: the prompt without them.
        column: before which token they stand.
        memories: the entries.
    """
    slots = sum(memory.slots for memory in memories)
    if slots == 0:
        return Placed(prompt, column, [])
    moved = [
        Chunk(
            chunk.stop + slots * (chunk.stop > column),
            tuple(None if alignment is None else _moved(alignment, column, slots) for alignment in chunk.alignments),
        )
        for chunk in prompt.chunks
    ]
    tokens = prompt.receiver.with_slots(column, slots)
    return Placed(replace(prompt, receiver=tokens, chunks=tuple(moved)), column, list(memories))


def lay_down(cache: Cache, receiver: LanguageModel, placed: Placed) -> Cache:
    """Prefill the prompt up to where the entries stand and add them; the cache is changed and returned."""
    tokens = placed.prompt.receiver
    if placed.column > 0:
        receiver.prefill(tokens, placed.column, cache)
    column = placed.column
    for memory in placed.memories:
        stop = column + memory.slots
        tables = receiver.rotary(tokens.positions[:, column:stop])
        kv_cache.append(cache, [_rotated(entry, tables, layer) for layer, entry in enumerate(memory.entries)])
        column = stop
    return cache


def first_user_column(tokenizer: Any, conversation: Conversation, options: RenderOptions) -> int:
    """The receiver's first token of the first user message.

    Raises:
        PromptError: there is no user message, or the template left it out.
    """
    encoded = encode(tokenizer, render(tokenizer, conversation, options))
    for message, found in zip(conversation, encoded.rendered.spans, strict=True):
        if message["role"] == "user" and found is not None:
            (start, _), _ = found
            return next(column for column, (_, end) in enumerate(encoded.offsets) if end > start)
    raise PromptError("private context stands before the first user message, and there is none with any text.")


def handoffs_of(given: Any, sharers: Sequence[Sharer], rows: int, options: RenderOptions) -> list[list[Handoff]]:
    """What each sharer hands over to each conversation of a batch.

    Args:
        given: messages or a :class:`Handoff`; a list with one for each conversation; for several sharers a tuple with
            one of these for each. One for a whole batch is read once.
        sharers: who reads.
        rows: conversations in the batch.
        options: how to render messages.

    Returns:
        Per conversation one handoff per sharer.

    Raises:
        PromptError: not so many as there are sharers or conversations.
    """
    per_sharer = given if isinstance(given, tuple) else (given,)
    if len(per_sharer) != len(sharers):
        raise PromptError(
            f"sharer_messages are for {len(per_sharer)} sharers, and {len(sharers)} hand over private context: pass a "
            "tuple with one entry for each."
        )
    columns = [_read_all(part, sharer, rows, options) for part, sharer in zip(per_sharer, sharers, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def _read_all(given: Any, sharer: Sharer, rows: int, options: RenderOptions) -> list[Handoff]:
    if isinstance(given, Handoff):
        return [given] * rows
    if isinstance(given, list) and given and all(isinstance(item, Handoff) for item in given):
        found = given
    else:
        batch, single = conversations(given)
        found = [sharer.read(conversation, options=options) for conversation in batch]
        if single:
            return found * rows
    if len(found) != rows:
        raise PromptError(f"got {len(found)} private contexts for {rows} conversations; give one for each, or one.")
    return found


def _moved(alignment: Alignment, column: int, slots: int) -> Alignment:
    receiver = torch.where(alignment.receiver >= column, alignment.receiver + slots, alignment.receiver)
    return Alignment(alignment.rows, receiver, alignment.sharer)


def _rotated(entry: KeyValue, tables: Any, layer: int) -> KeyValue:
    keys, values = entry
    return (keys if tables is None else tables[layer].apply(keys)), values
