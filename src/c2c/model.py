"""C2CModel: a receiver, its sharers and their fusers, as one model that answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache

from c2c import identity, kv_cache
from c2c.alignment import Aligner, Prompt, make_aligner
from c2c.alignment.base import merge
from c2c.errors import FuserError, PromptError, SharerLost
from c2c.fusers import Fuser
from c2c.fusion import FusionMode, Source, fuse
from c2c.generation import (
    Chat,
    FirstTokenTimer,
    FusionReport,
    PrefilledPrompt,
    RowCounts,
    StageTimer,
    TextStream,
    unbatch,
)
from c2c.language_model import Receiver
from c2c.messages import Conversation, conversations
from c2c.pretrained import Pretrained
from c2c.private_context import (
    PrivatePrompt,
    align_shared,
    moved_entries,
    place,
    prefill_entries,
    project_all,
    read_handoffs,
)
from c2c.prompting import RenderOptions, collect_notes, with_passage
from c2c.sharer import EntrySelection, Sharer
from c2c.token_ids import TokenIds
from c2c.tokens import TokenBatch, concatenate

CacheEdit = Callable[[Cache], Cache]


class C2CModel(Pretrained, TokenIds, nn.Module):
    """Answer with a receiver from a cache into which its sharers' caches are fused.

    Example:
        >>> model = C2CModel.from_models(receiver="smollm2-135m", sharer="qwen2.5-coder-0.5b")
        >>> print(model.generate("What is a KV cache?", max_new_tokens=32).text)

    Args:
        receiver: the model that answers.
        sharers: the models that share their caches.
        fusers: one per sharer, made for this pair.
        aligner: how tokens of the models correspond; by default what the first fuser was trained with.
        mode: several sharers one after the other (``sequential``) or all on the clean cache (``parallel``).
        allow_mismatch: accept fusers trained with other weights, tokenizers or templates of the same structure.

    Raises:
        MismatchError: a fuser does not fit; lists every difference.
        CacheError: a model whose cache can't be fused.
    """

    def __init__(
        self,
        receiver: Receiver,
        sharers: Sequence[Sharer],
        fusers: Sequence[Fuser],
        *,
        aligner: Aligner | None = None,
        mode: FusionMode = "sequential",
        allow_mismatch: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        if not sharers or len(sharers) != len(fusers):
            raise FuserError(f"got {len(sharers)} sharers and {len(fusers)} fusers; give one fuser per sharer.")
        if mode not in ("sequential", "parallel"):
            raise FuserError(f"unknown fusion mode {mode!r}; expected 'sequential' or 'parallel'.")
        self.receiver, self.sharers, self.mode = receiver, list(sharers), mode
        self.fusers = nn.ModuleList(fusers)
        self.aligner: Aligner = aligner or make_aligner(fusers[0].config.alignment)
        self.allow_mismatch = allow_mismatch
        self.notes = self._check_identities()
        receiver.check_continuation()
        if self.private:
            receiver.check_private_context()

    @property
    def private(self) -> list[int]:
        """Indices of the sharers that hand over private context."""
        return [index for index, fuser in enumerate(self._fusers) if fuser.context == "private"]

    @property
    def trained(self) -> bool:
        """Whether every fuser has been trained; an untrained one leaves the receiver as it is."""
        return all(fuser.trained for fuser in self._fusers)

    # -- answering ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        messages: Any,
        *,
        sharer_messages: Any = None,
        options: RenderOptions | None = None,
        blend: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        """Answer from the fused cache.

        Args:
            messages: a text, a conversation (list of messages), or a list of several of either.
            sharer_messages: what the sharer alone has read, for fusers of private context: messages, or a
                :class:`~c2c.handoff.Handoff` from ``sharer.read``; for one conversation a list of several; for a batch
                a list with one (or a list of several) for each; for several sharers a tuple of these.
            options: how to render the prompt.
            blend: how much of what the fusers add is taken, from 0 (the receiver alone, bit for bit) to 1; private
                context is there or not, 0 or 1.
            **kwargs: whatever the receiver's ``generate`` takes (``max_new_tokens``, ``do_sample``, ``num_beams``,
                ``stop_strings``, ``streamer``, ``logits_processor``, ``num_return_sequences``).

        Returns:
            A :class:`GenerationResult`; a list for several conversations or several return sequences.

        Raises:
            PromptError: empty or too long. AlignmentError: nothing can be fused.
        """
        timer = FirstTokenTimer()
        prompt = self.prefill(messages, sharer_messages=sharer_messages, options=options, blend=blend)
        return unbatch(prompt.generate(timer, **kwargs), messages)

    @torch.no_grad()
    def prefill(
        self,
        messages: Any,
        *,
        sharer_messages: Any = None,
        options: RenderOptions | None = None,
        blend: float = 1.0,
    ) -> PrefilledPrompt:
        """Render, align, prefill and fuse; what :meth:`generate` decodes from. Arguments as there.

        Raises:
            PromptError: private context is missing, or given to fusers that take none; ``blend`` is out of range.
        """
        batch, single = conversations(messages)
        options = options or RenderOptions()
        self.check_context(sharer_messages)
        with collect_notes() as notes:
            try:
                if self.private:
                    prompt = self._prefill_private(batch, single, sharer_messages, options, blend)
                else:
                    prompt = self.fuse_prompts(self.align(batch, options), blend=blend)
            except SharerLost as lost:
                prompt = self.prefill_receiver(self.receiver.encode(batch, options), lost)
        if prompt.report is not None:
            prompt.report.notes += notes
        return prompt

    def stream(self, messages: Any, *, options: RenderOptions | None = None, **kwargs: Any) -> TextStream:
        """Answer one conversation piece by piece: iterate over the text; ``.result`` is there when it ends.

        Closing the stream early stops the generation. Arguments as in :meth:`generate`.
        """
        return TextStream(self.receiver.tokenizer, self.generate, messages, options=options, **kwargs)

    def chat(self, system: str | None = None, **generate_kwargs: Any) -> Chat:
        """Start a conversation of several turns: ``chat.send("...")`` answers and appends to it."""
        return Chat(self.generate, system, **generate_kwargs)

    def forward(self, messages: Any, **kwargs: Any) -> Any:
        """The same as :meth:`generate`."""
        return self.generate(messages, **kwargs)

    # -- fusing ------------------------------------------------------------------------------------------------------

    def align(self, batch: Sequence[Conversation], options: RenderOptions) -> list[Prompt]:
        """Tokenise conversations for all models and align their tokens; one prompt for each conversation."""
        tokenizers = [sharer.tokenizer for sharer in self.sharers]
        prompts = (self.aligner.align(self.receiver.tokenizer, tokenizers, [one], options) for one in batch)
        return [prompt for (prompt,) in prompts]

    @torch.no_grad()
    def fuse_prompts(
        self, prompts: Sequence[Prompt], *, blend: float = 1.0, edit: CacheEdit | None = None
    ) -> PrefilledPrompt:
        """Prefill and fuse aligned prompts; prompts of one row each become one batch.

        Args:
            prompts: from :meth:`align`.
            blend: how much of what the fusers add is taken, from 0 to 1.
            edit: applied to the cache of each sharer before it is fused, such as zeros for a control.

        Raises:
            PromptError: a prompt that a model can't take, or ``blend`` is not from 0 to 1.
            MismatchError: a model was changed, such as by another adapter, and the fusers do not fit it any more.
        """
        if not 0 <= blend <= 1:
            raise PromptError(f"blend is {blend:g}; expected a number from 0 (the receiver alone) to 1 (all is taken).")
        self._check_unchanged()
        report = self._report(prompts, blend)
        parts = [self._fuse(prompt, report, blend, edit) for prompt in self._merge(prompts)]
        return self._join(parts, report)

    def _merge(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Merge prompts to one batch, where all models compute its rows as they compute them alone."""
        merged = merge(prompts)
        apart = any(
            model.separates(tokens)
            for prompt in merged
            for model, tokens in zip([self.receiver, *self.sharers], [prompt.receiver, *prompt.sharers], strict=True)
        )
        return list(prompts) if apart else merged

    def _fuse(
        self, prompt: Prompt, report: FusionReport, blend: float = 1.0, edit: CacheEdit | None = None
    ) -> tuple[TokenBatch, Cache]:
        """Prefill all models on one prompt and fuse; the cache ends before the receiver's last token or earlier."""
        self.receiver.check_prompt(prompt.receiver)
        timer = report.timer or StageTimer(self.receiver.device)
        tokens = prompt.receiver.to(self.receiver.device)
        with timer.stage("sharer_prefill"):
            sources = [self._prefill_sharer(index, prompt, edit) if blend > 0 else None for index in self._indices]
        cache = self.receiver.empty_cache()
        if isinstance(prompt, PrivatePrompt):
            with timer.stage("receiver_prefill"):
                cache = prefill_entries(cache, self.receiver, prompt)
        for chunk in prompt.chunks:
            with timer.stage("receiver_prefill"):
                cache = self.receiver.prefill(tokens, chunk.stop, cache)
            with timer.stage("fuse"):
                fuse(cache, self.receiver, tokens, sources, chunk, self.mode, blend)
        if isinstance(prompt, PrivatePrompt) and not prompt.slots:  # read as the receiver alone reads it, bit for bit
            with timer.stage("receiver_prefill"):
                cache = self.receiver.prefill(tokens, tokens.length - 1, cache)
        return tokens, cache

    def _prefill_sharer(self, index: int, prompt: Prompt, edit: CacheEdit | None) -> Source | None:
        """Prefill one sharer as far as its entries are read, or not at all."""
        needed = [alignment for chunk in prompt.chunks if (alignment := chunk.alignments[index]) is not None]
        if not needed:
            return None
        sharer = self.sharers[index]
        sharer.check_tokens(prompt.sharers[index])
        tokens = prompt.sharers[index].to(sharer.device)
        rows, columns = torch.cat([part.rows for part in needed]), torch.cat([part.sharer for part in needed])
        cache = sharer.share(tokens, EntrySelection(self._fusers[index].config.source_layers, rows, columns))
        return Source(sharer, tokens, edit(cache) if edit else cache, self._fusers[index])

    def _join(self, parts: Sequence[tuple[TokenBatch, Cache]], report: FusionReport) -> PrefilledPrompt:
        """Join prompts that were fused one by one to a left-padded batch."""
        if len(parts) == 1:
            return PrefilledPrompt(self.receiver, *parts[0], report)
        timer = report.timer or StageTimer(self.receiver.device)
        with timer.stage("receiver_prefill"):  # bring all rows to one token before their end
            caches = [self.receiver.prefill(tokens, tokens.length - 1, cache) for tokens, cache in parts]
        return PrefilledPrompt(
            self.receiver, concatenate([tokens for tokens, _ in parts]), kv_cache.stack(caches), report
        )

    def _prefill_private(
        self, batch: list[Conversation], single: bool, given: Any, options: RenderOptions, blend: float
    ) -> PrefilledPrompt:
        """Prefill each conversation by itself, since what is handed over to them differs in length; then join them."""
        if blend not in (0, 1):
            raise PromptError(
                f"blend is {blend:g}; private context adds entries of its own, which are there or not: pass 0 or 1."
            )
        if blend == 0:
            return self.prefill_receiver(self.receiver.encode(batch, options), None)
        self._check_unchanged()
        timer = StageTimer(self.receiver.device)
        pairs = [(self.sharers[index], self._fusers[index]) for index in self.private]
        with timer.stage("sharer_prefill"):
            handoffs = read_handoffs(given, pairs, batch, single, options)
        with timer.stage("fuse"):
            entries = project_all(handoffs, pairs)
        instruction = options.instruction if any(fuser.keeps_tokens for _, fuser in pairs) else ""
        if instruction:
            batch = [with_passage(conversation, options=options) for conversation in batch]
        prompts = [
            place(align_shared(self, conversation, options), self.receiver, conversation, options, row, instruction)
            for conversation, row in zip(batch, entries, strict=True)
        ]
        report = self._report(prompts, timer=timer)
        report.notes += moved_entries(prompts)
        fused = self._join([self._fuse(prompt, report) for prompt in prompts], report)
        fused.slots = tuple(prompt.slots for prompt in prompts)
        return fused

    def prefill_receiver(self, tokens: TokenBatch, lost: SharerLost | None) -> PrefilledPrompt:
        """Prefill the receiver alone: nothing is to be fused, or a sharer was lost whose policy allows that."""
        self.receiver.check_prompt(tokens)
        reason = "blend is 0" if lost is None else "a sharer was lost"
        report = FusionReport(timer=StageTimer(self.receiver.device), notes=list(self.notes), trained=self.trained)
        if lost is not None:
            report.lost = lost
            report.notes.append(f"receiver only: {lost}")
        for count in tokens.mask.sum(-1).tolist():
            report.add(RowCounts(prompt_tokens=count, skipped_tokens={reason: count}))
        report.skipped_layers = self._skipped(reason)
        tokens = tokens.to(self.receiver.device)
        with report.timer.stage("receiver_prefill"):  # type: ignore[union-attr]
            cache = self.receiver.prefill(tokens, tokens.length - 1)
        return PrefilledPrompt(self.receiver, tokens, cache, report)

    # -- checks and reports ------------------------------------------------------------------------------------------

    @property
    def _fusers(self) -> list[Fuser]:
        return list(self.fusers)  # type: ignore[arg-type]

    @property
    def _indices(self) -> range:
        return range(len(self.sharers))

    def check_context(self, sharer_messages: Any) -> None:
        """Check that private context is given exactly where the fusers take it.

        Raises:
            PromptError: it is missing, or none is taken.
        """
        if self.private and sharer_messages is None:
            raise PromptError(
                "this fuser hands over what the sharer alone has read: pass sharer_messages=..., messages or a handoff "
                "from sharer.read(...)."
            )
        if sharer_messages is not None and not self.private:
            families = ", ".join(fuser.family for fuser in self._fusers)
            raise PromptError(
                f"sharer_messages were given, but {families} fuses a prompt that both models read. Use a 'memory' "
                "fuser for private context."
            )

    def _check_unchanged(self) -> None:
        """Compare the models again where one is not what it was: an adapter was switched, weights were written to."""
        if self._checked != [weights_of(model) for model in (self.receiver, *self.sharers)]:
            self.notes = self._check_identities()

    def _check_identities(self) -> list[str]:
        """Compare all models with those that the fusers were made for; the differences that were accepted."""
        now = [model.identity for model in (self.receiver, *self.sharers)]
        pairs: list[tuple[str, Any, Any]] = []
        for index, (sharer, fuser) in enumerate(zip(self.sharers, self._fusers, strict=True)):
            name = "sharer" if len(self.sharers) == 1 else f"sharer {index + 1}"
            for role, given in (("sharer", now[1 + index]), ("receiver", now[0])):
                pairs.append((name if role == "sharer" else role, fuser.expected_identity(role, given), given))
            fuser.check_models(now[0], now[1 + index])
            if fuser.needs_rotary:
                self.receiver.check_rotary()
                sharer.check_rotary()
        accepted = identity.check(pairs, self.allow_mismatch)
        self._checked = [weights_of(model) for model in (self.receiver, *self.sharers)]
        return accepted

    def _report(self, prompts: Sequence[Prompt], blend: float = 1.0, timer: StageTimer | None = None) -> FusionReport:
        report = FusionReport(
            timer=timer or StageTimer(self.receiver.device), notes=list(self.notes), trained=self.trained
        )
        if blend != 1:
            report.notes.append(f"blend {blend:g}: that share of what the fusers add was taken")
        for prompt in prompts:
            report.add(self._count(prompt, blend))
        numbers = self.receiver.layer_numbers
        fused = {numbers[layer] for fuser in self._fusers for layer in fuser.config.fused_layers}
        report.fused_layers = sorted(fused)
        report.skipped_layers = self._skipped("not in the layer map", fused)
        if any(prompt.chunks for prompt in prompts):
            report.gate_values = [fuser.gates() for fuser in self._fusers]
        elif not self.private:
            report.notes.append("nothing was fused: the last section of a prompt never is")
        return report

    def _skipped(self, reason: str, fused: Collection[int] = ()) -> dict[int, str]:
        """Return the receiver's layers that are not fused, by its own numbers, with the reason."""
        skipped = {number: reason for number in self.receiver.layer_numbers if number not in fused}
        return dict(sorted((skipped | self.receiver.left_out).items()))

    def _count(self, prompt: Prompt, blend: float) -> RowCounts:
        """Count tokens, entries of private context, and bytes of the sharers' entries that the fusers read."""
        slots = prompt.slots if isinstance(prompt, PrivatePrompt) else 0
        read = sum(entries.sharer_bytes for entries in prompt.entries) if isinstance(prompt, PrivatePrompt) else 0
        for index, (sharer, fuser) in enumerate(zip(self.sharers, self._fusers, strict=True)):
            alignments = [chunk.alignments[index] for chunk in prompt.chunks]
            pairs = sum(len(alignment) for alignment in alignments if alignment is not None)
            if pairs and blend > 0:
                read += pairs * len(fuser.config.source_layers) * 2 * sharer.geometry.width * sharer.dtype.itemsize
        return RowCounts(
            int(prompt.receiver.mask.sum()) - slots, prompt.fused_tokens, dict(prompt.skipped), slots, read
        )


def weights_of(model: Any) -> tuple[Any, ...]:
    """Return what tells a model's weights from others; a template that a caller sets afterwards is meant."""
    now = model.identity  # read from the weights
    return now.weights, now.values, now.variant
