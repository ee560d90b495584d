"""The Sharer: reads a prompt and hands over its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache

from c2c import kv
from c2c.errors import MismatchError, PromptError
from c2c.handoff import Handoff
from c2c.identity import differences
from c2c.language_model import LanguageModel
from c2c.messages import Conversation, conversations
from c2c.prompting import RenderOptions, encode, render, require_tokenizer, text_tokens
from c2c.tokens import TokenBatch, left_pad


@dataclass(frozen=True)
class Wanted:
    """Which entries of a sharer's cache fusion reads: in these layers, column ``columns[i]`` of row ``rows[i]``.

    Attributes:
        layers: sharer layers; one that several receiver layers read may stand there several times.
        rows: ``[pairs]``, int64, on the host.
        columns: ``[pairs]``, int64.
    """

    layers: Sequence[int]
    rows: Tensor
    columns: Tensor

    @property
    def stop(self) -> int:
        """How many columns must be read to have them all."""
        return 1 + int(self.columns.max())


@dataclass(frozen=True)
class Reading:
    """What a sharer reads for a handoff: its tokens, and the columns that are handed over."""

    ids: list[int]
    kept: list[int]

    def followed_by(self, draft: Sequence[int]) -> Reading:
        """With what the sharer wrote after it; all of that is handed over."""
        length = len(self.ids)
        return Reading([*self.ids, *draft], [*self.kept, *range(length, length + len(draft))])


class Sharer(LanguageModel):
    """A frozen model whose cache is shared. Fusion asks ``share`` of it, and ``for_fuser`` and ``read``."""

    role = "sharer"

    def share(self, batch: TokenBatch, wanted: Wanted) -> Cache:
        """The cache of ``batch``, filled at least where ``wanted`` says; other entries must not be read."""
        return self.prefill(batch, wanted.stop)

    def for_fuser(self, fuser: Any) -> Self:
        """Who reads for this fuser: the sharer itself. One on another machine sends what the fuser needs, no more."""
        return self

    @torch.no_grad()
    def read(
        self,
        messages: Any,
        *,
        draft_tokens: int = 0,
        options: RenderOptions | None = None,
        reuse: Handoff | None = None,
    ) -> Handoff:
        """Read messages, to be handed over to a receiver that has not read them.

        Args:
            messages: one text or conversation.
            draft_tokens: first write at most so many tokens of an answer, greedily, and hand them over as well.
            options: how to render the messages.
            reuse: an earlier handoff of this sharer; what both begin with is not read again. So a document can grow.

        Raises:
            PromptError: several conversations, or none that can be read. MismatchError: ``reuse`` is another model's.
        """
        batch, single = conversations(messages)
        if not single:
            raise PromptError("a handoff holds one conversation: call read once for each.")
        plan = reading(self.tokenizer, batch[0], options or RenderOptions())
        tokens = left_pad([plan.ids], 0)
        self.check_prompt(tokens)
        cache: Cache = kv.empty_cache()
        known = 0
        if reuse is not None:
            hard, soft = differences("sharer", reuse.sharer, self.identity)
            if hard or soft:
                raise MismatchError(hard + soft, "Extend a handoff with the model that made it.")
            known = min(reuse.shared_prefix(plan.ids), len(plan.ids) - 1)
        if known:
            cache = kv.crop(reuse.cache(self.dtype, self.device), known)  # type: ignore[union-attr]
        if draft_tokens <= 0:
            cache = self.prefill(tokens, cache=cache)
            return Handoff.from_cache(self.identity, torch.tensor(plan.ids), torch.tensor(plan.kept), kv.layers(cache))
        ids, cache = self.draft(tokens, cache, draft_tokens)
        plan = plan.followed_by(ids[len(plan.ids) :])
        return Handoff.from_cache(self.identity, torch.tensor(plan.ids), torch.tensor(plan.kept), kv.layers(cache))

    def draft(self, tokens: TokenBatch, cache: Cache, count: int) -> tuple[list[int], Cache]:
        """Write at most ``count`` tokens after a prompt of one row, greedily: all ids, and the cache of them all."""
        cache = self.prefill(tokens, tokens.length - 1, cache)
        drafted = self.generate(tokens, cache, max_new_tokens=count, do_sample=False)[0].tolist()
        ids = [*tokens.ids[0].tolist(), *drafted]
        return ids, self.prefill(left_pad([ids], 0), cache=cache)  # the last drafted token is not in the cache yet


def reading(tokenizer: Any, conversation: Conversation, options: RenderOptions) -> Reading:
    """A conversation as a sharer reads it, and what of it is handed over.

    Kept are the texts of the messages, and the template after the last one, whose positions have read everything; other
    template tokens say nothing about the messages, and the first token of a prompt holds values out of all proportion.

    Raises:
        PromptError: no text of any message is found in the rendered prompt.
    """
    encoded = encode(require_tokenizer(tokenizer, "sharer"), render(tokenizer, conversation, options))
    owners = text_tokens(encoded)
    texts = [column for column, owner in enumerate(owners) if owner is not None]
    if not texts:
        raise PromptError(
            f"nothing to hand over: no message text was found in the rendered prompt {encoded.rendered.text!r}."
        )
    return Reading(encoded.ids, [*texts, *range(texts[-1] + 1, len(encoded.ids))])
