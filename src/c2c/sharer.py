"""A sharer: a language model that prefills what it shares, or reads what it hands over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache

from c2c import kv_cache, thinking
from c2c.errors import ContextLengthError, MismatchError, PromptError
from c2c.handoff import Handoff, SharerPrompt, passage_prompt, sharer_prompt
from c2c.identity import differences
from c2c.language_model import LanguageModel
from c2c.messages import conversations
from c2c.prompting import RenderOptions
from c2c.recompute import prefill_with_hidden
from c2c.rope import prompt_length, switch_length
from c2c.thinking import Realignment
from c2c.tokens import TokenBatch, left_pad


@dataclass(frozen=True)
class EntrySelection:
    """Select the entries of a sharer's cache that fusion reads: column ``columns[i]`` of row ``rows[i]`` in ``layers``.

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


class Sharer(LanguageModel):
    """Prefill what is shared: the cache of a common prompt (``share``), or a handoff of private context (``read``)."""

    role = "sharer"

    def share(self, batch: TokenBatch, wanted: EntrySelection) -> Cache:
        """Return the cache of ``batch``, filled at least where ``wanted`` says; other entries must not be read."""
        # what follows changes the entries of a model that sees it, and must not depend on the batch
        return self.prefill(batch, wanted.stop if self._continuation_error is None else batch.length)

    def for_fuser(self, fuser: Any) -> Self:
        """Return the sharer to read with for this fuser; a remote one sends what the fuser needs and no more."""
        return self

    @torch.no_grad()
    def read(
        self,
        messages: Any,
        *,
        before: Any = None,
        among: bool | str = False,
        draft_tokens: int = 0,
        think: int = 0,
        realign: Realignment = "soft",
        options: RenderOptions | None = None,
        reuse: Handoff | None = None,
        keep_hidden: int = 0,
    ) -> Handoff:
        """Prefill messages and return them as a handoff for a receiver that has not read them.

        Args:
            messages: one text or conversation.
            before: for a receiver that is the same model (``copy``): the system message (or messages) that its prompt
                will begin with, ``""`` for none; ``messages`` is then one document, read at the place where the
                receiver would read it.
            among: with ``before``, for a document that will stand among others: read it behind another passage (this
                text, or True for one that the package has), which is not handed over.
            draft_tokens: first write at most so many tokens of an answer, greedily, and hand them over as well.
            think: before that, so many steps in which the last hidden state goes back in as the next input; their
                entries are handed over as well.
            realign: how a state becomes an input, see :mod:`c2c.thinking`.
            options: how to render the messages.
            reuse: an earlier handoff of this sharer; what both begin with is not read again. So a document can grow.
            keep_hidden: hand over the hidden states that enter this layer too, for a variant of this model that
                recomputes layers from there on; 0 for none.

        Raises:
            PromptError: several conversations, or none that can be read; ``draft_tokens`` or ``think`` is no number
                from 0. CacheError: the model takes no thinking steps.
            MismatchError: ``reuse`` is another model's.
        """
        for name, count in (("draft_tokens", draft_tokens), ("think", think)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise PromptError(f"{name} is {count!r}; expected an integer from 0 (none).")
        batch, single = conversations(messages)
        if not single:
            raise PromptError("a handoff holds one conversation: call read once for each.")
        if before is None:
            if among is not False:
                raise PromptError(f'among is {among!r:.80}, which is for a document with before=... ("" for none).')
            plan = sharer_prompt(self.tokenizer, batch[0], options or RenderOptions())
        else:
            if len(batch[0]) != 1 or draft_tokens:
                raise PromptError("before=... is for one document (a text) without a draft; pass each document alone.")
            if not isinstance(among, bool) and not (isinstance(among, str) and among.strip()):
                raise PromptError(f"among is {among!r:.80}; expected True, False or the text of another passage.")
            plan = passage_prompt(self.tokenizer, batch[0][0]["content"], before, options or RenderOptions(), among)
        tokens = left_pad([plan.ids], 0)
        self.check_prompt(tokens)
        cache = self.empty_cache()
        if reuse is not None:
            hard, soft = differences("sharer", reuse.sharer, self.identity, "handoff")
            if hard or soft:
                raise MismatchError(hard + soft, "Extend a handoff with the model that made it.", "handoff")
            known = min(reuse.shared_prefix(plan.ids), len(plan.ids) - 1)
            switch = switch_length(self.model)
            if switch is not None and max(len(plan.ids), len(reuse.ids)) > switch:
                known = 0  # the entries are rotated for another length
            if known and not self.left_out:  # a handoff has nothing of other layers to go on from
                cache = kv_cache.crop(reuse.cache(self.dtype, self.device), known)
        if keep_hidden:
            if think:
                raise PromptError("keep_hidden=... is for a document without thinking steps.")
            return self._read_with_hidden(plan, tokens, keep_hidden, draft_tokens)
        if think:
            return self._read_thinking(plan, tokens, cache, think, realign, draft_tokens)
        return self._read_prompt(plan, tokens, cache, draft_tokens)

    def _read_with_hidden(self, plan: SharerPrompt, tokens: TokenBatch, layer: int, draft_tokens: int) -> Handoff:
        """Prefill a document and return it as a handoff with the hidden states that enter ``layer``."""
        if draft_tokens or not self.generates:
            raise PromptError("keep_hidden=... is for a document without a draft, and a sharer whose weights are here.")
        cache, states = prefill_with_hidden(self, tokens, layer)
        return Handoff.from_cache(self.identity, *plan.tensors(), kv_cache.layers(cache), (layer, states[:, plan.kept]))

    def _read_prompt(self, plan: SharerPrompt, tokens: TokenBatch, cache: Cache, draft_tokens: int) -> Handoff:
        """Prefill what ``cache`` does not hold yet, draft, and return all of it as a handoff."""
        if not draft_tokens:
            cache = self.prefill(tokens, cache=cache)
        else:
            ids, cache = self.draft(tokens, cache, draft_tokens)
            plan = plan.followed_by(ids[len(plan.ids) :])
        return Handoff.from_cache(self.identity, *plan.tensors(), kv_cache.layers(cache))

    def _read_thinking(
        self, plan: SharerPrompt, tokens: TokenBatch, cache: Cache, steps: int, realign: Realignment, draft_tokens: int
    ) -> Handoff:
        """Prefill, think, draft, and return all of it as a handoff."""
        plan = plan.with_thoughts(steps)
        self._check_thinking(plan.batch())
        cache = self.prefill(tokens, tokens.length - 1, cache)
        with prompt_length(self.model, None if switch_length(self.model) is None else tokens.length + steps):
            first, cache = thinking.think(self.model, tokens.to(self.device), cache, steps, realign)
        if draft_tokens:
            plan = plan.followed_by([first])
            if draft_tokens > 1 and first not in self.ends:
                ids, cache = self.draft(plan.batch(), cache, draft_tokens - 1)
                plan = plan.followed_by(ids[len(plan.ids) :])
            else:
                cache = self.prefill(plan.batch(), cache=cache)
        return Handoff.from_cache(self.identity, *plan.tensors(), kv_cache.layers(cache), realign=realign)

    def _check_thinking(self, whole: TokenBatch) -> None:
        """Refuse thoughts for which there is no room.

        Raises:
            ContextLengthError: beyond the context, or beyond a length from which on the model rotates otherwise.
        """
        self.check_tokens(whole)
        switch = switch_length(self.model)
        if switch is not None and whole.length > switch:
            raise ContextLengthError(
                f"{self.name} rotates by the length of a text beyond {switch} tokens, and its prompt with thoughts has "
                f"{whole.length}: entries of each step would be rotated otherwise. Read less, or pass think=0."
            )

    def draft(self, tokens: TokenBatch, cache: Cache, count: int) -> tuple[list[int], Cache]:
        """Generate at most ``count`` tokens greedily after a prompt of one row; return all ids and their cache."""
        cache = self.prefill(tokens, tokens.length - 1, cache)
        how: dict[str, Any] = {"fused": True} if tokens.has_slots else {}  # thoughts can not be made anew of tokens
        drafted = self.generate(tokens, cache, max_new_tokens=count, do_sample=False, **how)[0].tolist()
        ids = [*tokens.ids[0].tolist(), *drafted]
        return ids, self.prefill(left_pad([ids], 0), cache=cache)  # the last drafted token is not in the cache yet
