"""Cache-to-cache: the receiver with the sharer's cache of the same prompt or context, and its controls."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch

from c2c import kv_cache
from c2c.alignment.base import derange
from c2c.errors import PromptError
from c2c.fusers import Fuser
from c2c.generation import PrefilledPrompt
from c2c.handoff import Handoff
from c2c.messages import Conversation, conversations
from c2c.model import C2CModel
from c2c.private_context import documents, read_handoffs
from c2c.prompting import RenderOptions, with_passage
from c2c.systems.base import System, SystemOptions, context_texts, count_tokens

Rows = list[list[list[Handoff]]]  # per conversation and sharer its documents


class CacheToCache(System):
    """Answer with the receiver from a cache fused with what the sharers have read."""

    name: ClassVar[str] = "c2c"
    title: ClassVar[str] = "cache-to-cache"
    needs_context: ClassVar[bool] = True
    drafts: ClassVar[bool] = True  # whether ``options.draft_tokens`` and ``options.think`` are heeded

    def prefill(
        self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None
    ) -> PrefilledPrompt:
        """Prefill all models and fuse; see :meth:`System.prefill`."""
        batch, single = conversations(messages)
        options = options or RenderOptions()
        self.model.check_context(sharer_messages)
        if not self.model.private:
            return self.fuse(batch, options)
        given = self.handoffs(batch, single, sharer_messages, options)
        return self.model.prefill(
            messages if single else batch, sharer_messages=given, options=options, blend=self.options.blend
        )

    def fuse(self, batch: list[Conversation], options: RenderOptions) -> PrefilledPrompt:
        """Fuse prompts that both models read."""
        return self.model.prefill(batch, options=options, blend=self.options.blend)

    def handoffs(self, batch: list[Conversation], single: bool, given: Any, options: RenderOptions) -> Any:
        """Return what is handed over: what is given, or what the sharer reads, with the question, thinks and drafts."""
        more: dict[str, Any] = {"draft_tokens": self.options.draft_tokens, "think": self.options.think}
        if not (self.drafts and any(more.values())):
            return given
        sharer, texts = self.model.sharers[self.model.private[0]], context_texts(given, len(batch), single)
        asked = (with_passage(one, *passages, options=options) for one, passages in zip(batch, texts, strict=True))
        return [sharer.read(conversation, realign=self.options.realign, **more) for conversation in asked]

    def check(self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None) -> int:
        """Check the prompt for all models that read it, and private context; see :meth:`System.check`."""
        self.model.check_context(sharer_messages)
        if sharer_messages is not None and options is not None and not options.chat_template:
            raise PromptError("private context needs messages and their chat template rather than raw text.")
        entries = count_tokens(self.model.receiver, messages, options)
        parts = iter(sharer_messages if isinstance(sharer_messages, tuple) else (sharer_messages,))
        for index, sharer in enumerate(self.model.sharers):
            if index not in self.model.private:
                count_tokens(sharer, messages, options)
                continue
            read = replace(options or RenderOptions(), tools=())
            for one in documents(next(parts), 1, single=True)[0]:
                entries += len(one.ids) if isinstance(one, Handoff) else count_tokens(sharer, one, read)
        return entries


class Matched(CacheToCache):
    """Cache-to-cache, under its name in results."""

    name: ClassVar[str] = "matched"
    drafts: ClassVar[bool] = False


class Draft(CacheToCache):
    """Cache-to-cache with a draft of the answer, under its name in results."""

    name: ClassVar[str] = "draft"
    title: ClassVar[str] = "cache-to-cache with a draft"


class Control(CacheToCache):
    """Cache-to-cache whose sharers' caches are exchanged before they are fused."""

    drafts: ClassVar[bool] = False

    def handoffs(self, batch: list[Conversation], single: bool, given: Any, options: RenderOptions) -> Any:
        """Return handoffs in place of what is given; see :meth:`CacheToCache.handoffs`."""
        given = super().handoffs(batch, single, given, options)
        rows = self.exchange(self.read(given, batch, single, options), batch, options)
        columns = tuple(list(column) for column in zip(*rows, strict=True))
        return tuple(column[0] for column in columns) if single else columns

    def read(self, given: Any, batch: list[Conversation], single: bool, options: RenderOptions) -> Rows:
        """Read private context, or take handoffs."""
        pairs = [(self.model.sharers[index], self.model.fusers[index]) for index in self.model.private]
        return read_handoffs(given, pairs, batch, single, options)  # type: ignore[arg-type]

    @abstractmethod
    def exchange(self, rows: Rows, batch: list[Conversation], options: RenderOptions) -> Rows:
        """Return other handoffs than their own."""


class Deranged(Control):
    """Control: each conversation gets the sharer's cache of the next one of the batch, or of ``options.other``."""

    name: ClassVar[str] = "deranged"
    title: ClassVar[str] = "deranged (another prompt's cache)"

    def fuse(self, batch: list[Conversation], options: RenderOptions) -> PrefilledPrompt:
        """Fuse with the caches of other prompts."""
        own = self.model.align(batch, options)
        if self.options.other is None:
            others = _rotate(own)
        else:
            read, _ = conversations(self.options.other)
            if len(read) != 1:
                raise PromptError(f"SystemOptions(other=...) holds {len(read)} conversations; expected one, for all.")
            others = self.model.align(read, options) * len(own)
        prompts = [derange(*pair) for pair in zip(own, others, strict=True)]
        return self.model.fuse_prompts(prompts, blend=self.options.blend)

    def exchange(self, rows: Rows, batch: list[Conversation], options: RenderOptions) -> Rows:
        """Return the handoffs of other conversations."""
        if self.options.other is None:
            return _rotate(rows)
        return [row for one in batch for row in self.read(self.options.other, [one], True, options)]


class DraftDeranged(Deranged):
    """Control of a draft: another conversation's context and draft."""

    name: ClassVar[str] = "draft_deranged"
    title: ClassVar[str] = "draft, deranged"
    drafts: ClassVar[bool] = True


class Zero(Control):
    """Control: the sharers' caches are zeros."""

    name: ClassVar[str] = "zero"
    title: ClassVar[str] = "zero (an empty cache)"

    def fuse(self, batch: list[Conversation], options: RenderOptions) -> PrefilledPrompt:
        """Fuse with zeros."""
        prompts = self.model.align(batch, options)
        return self.model.fuse_prompts(prompts, blend=self.options.blend, edit=kv_cache.zeros_like)

    def exchange(self, rows: Rows, batch: list[Conversation], options: RenderOptions) -> Rows:
        """Return handoffs of zeros."""
        return [[[handoff.zeros_like() for handoff in several] for several in row] for row in rows]


class Untrained(CacheToCache):
    """Control: new fusers of the same shapes, which leave the receiver as it is."""

    name: ClassVar[str] = "untrained"
    title: ClassVar[str] = "untrained fuser"

    @classmethod
    def unavailable(cls, model: C2CModel, options: SystemOptions) -> str | None:
        """Return why there is no untrained fuser of this kind; None where there is."""
        parameters = [list(fuser.parameters()) for fuser in model.fusers]
        return None if all(parameters) else "a fuser without parameters is never untrained."

    def __init__(self, model: C2CModel, options: SystemOptions | None = None) -> None:
        fusers: list[Fuser] = []
        for fuser in model.fusers:
            config = copy.deepcopy(fuser.config)
            config.training = None  # type: ignore[union-attr]
            torch.manual_seed((options or SystemOptions()).seed)
            fusers.append(type(fuser)(config).to(model.receiver.device).eval())  # type: ignore[arg-type]
        new = C2CModel(model.receiver, model.sharers, fusers, aligner=model.aligner, mode=model.mode)
        super().__init__(new, options)


def _rotate(items: list[Any]) -> list[Any]:
    if len(items) < 2:
        raise PromptError(
            "deranged gives each conversation the cache of another one: pass at least two, or one with "
            "SystemOptions(other=...)."
        )
    return [*items[1:], items[0]]
