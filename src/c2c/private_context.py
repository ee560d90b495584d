"""Private context: entries made of what a sharer has read, in the cache of a receiver that has not read it.

They stand before the text of the first user message, where a document would stand: the receiver reads its template and
system message as always, then these entries lie in its cache, and everything after them attends to them. Positions
count them like tokens. Nothing that the receiver computes itself is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from c2c.model import C2CModel


@dataclass(frozen=True)
class PrivateEntries:
    """Hold entries for a receiver's cache, not yet at a position.

    Attributes:
        layers: keys without rotation and values per receiver layer, ``[1, kv_heads, slots, head_dim]``.
        sharer_bytes: bytes of the sharer's entries that they were made of.
    """

    layers: list[KeyValue]
    sharer_bytes: int

    @property
    def slots(self) -> int:
        """How many entries each layer gets."""
        return self.layers[0][0].shape[2]


@dataclass(frozen=True)
class PrivatePrompt(Prompt):
    """Hold a prompt of one row with the entries that are put into the receiver's cache.

    Its receiver's tokens have columns for the entries, and its fusion plan is moved accordingly.

    Attributes:
        column: where the entries begin.
        entries: the entries, one after the other.
    """

    column: int = 0
    entries: tuple[PrivateEntries, ...] = ()

    @property
    def slots(self) -> int:
        """Columns that are entries and no tokens."""
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
    return PrivateEntries(entries, per_token * len(kept))


def project_all(
    handoffs: Sequence[Sequence[Handoff]], pairs: Sequence[tuple[Sharer, Fuser]]
) -> list[list[PrivateEntries]]:
    """Project the handoffs of a batch, one per conversation and pair; one that many rows share only once."""
    given = {(index, id(handoff)): handoff for row in handoffs for index, handoff in enumerate(row)}
    projected = {key: project(handoff, *pairs[key[0]]) for key, handoff in given.items()}
    return [[projected[index, id(handoff)] for index, handoff in enumerate(row)] for row in handoffs]


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
    tokenizer: Any,
    conversation: Conversation,
    options: RenderOptions,
    entries: Sequence[PrivateEntries],
) -> PrivatePrompt:
    """Make room for entries, in this order, before the first user message of a prompt of one row."""
    column = first_user_column(tokenizer, conversation, options)
    slots = sum(part.slots for part in entries)
    receiver, chunks = prompt.receiver, list(prompt.chunks)
    if slots > 0:
        receiver = receiver.insert_slots(column, slots)
        chunks = []
        for chunk in prompt.chunks:
            moved = [
                part and Alignment(part.rows, part.receiver + slots * (part.receiver >= column), part.sharer)
                for part in chunk.alignments
            ]
            chunks.append(Chunk(chunk.stop + slots * (chunk.stop > column), tuple(moved)))
    return PrivatePrompt(receiver, prompt.sharers, tuple(chunks), prompt.skipped, column, tuple(entries))


def prefill_entries(cache: Cache, receiver: LanguageModel, prompt: PrivatePrompt) -> Cache:
    """Prefill a prompt up to where its entries stand and add them; the cache is changed and returned."""
    if prompt.slots == 0:
        return cache
    tokens, column = prompt.receiver, prompt.column
    if column > 0:
        cache = receiver.prefill(tokens, column, cache)
    for entries in prompt.entries:
        stop = column + entries.slots
        tables = receiver.rotary(tokens.positions[:, column:stop], tokens.length)
        layers = enumerate(entries.layers)
        rotated = [(keys if tables is None else tables[layer].apply(keys), values) for layer, (keys, values) in layers]
        kv_cache.append(cache, rotated)
        column = stop
    return cache


def first_user_column(tokenizer: Any, conversation: Conversation, options: RenderOptions) -> int:
    """Find the receiver's first token of the first user message.

    Raises:
        PromptError: there is no user message, or the template left it out.
    """
    encoded = encode(tokenizer, render(tokenizer, conversation, options))
    for message, found in zip(conversation, encoded.rendered.spans, strict=True):
        if message["role"] == "user" and found is not None:
            return next(column for column, (_, end) in enumerate(encoded.offsets) if end > found[0][0])
    raise PromptError("private context stands before the first user message, and there is none with any text.")


def read_handoffs(given: Any, sharers: Sequence[Sharer], rows: int, options: RenderOptions) -> list[list[Handoff]]:
    """Read (or take, where handoffs are given) the private context of each conversation and sharer.

    Args:
        given: messages or a :class:`Handoff`; a list with one for each conversation; for several sharers a tuple with
            one of these for each. One for a whole batch is read once.
        sharers: who reads.
        rows: conversations in the batch.
        options: how to render messages; tools are for the model that answers.

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
    options, columns = replace(options, tools=()), list[list[Handoff]]()
    for part, sharer in zip(per_sharer, sharers, strict=True):
        if isinstance(part, Handoff):
            part = [part] * rows
        elif not (isinstance(part, list) and part and all(isinstance(item, Handoff) for item in part)):
            batch, single = conversations(part)
            part = [sharer.read(conversation, options=options) for conversation in batch] * (rows if single else 1)
        if len(part) != rows:
            raise PromptError(f"got {len(part)} private contexts for {rows} conversations; give one for each, or one.")
        columns.append(part)
    return [list(row) for row in zip(*columns, strict=True)]
