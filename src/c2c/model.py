"""C2CModel: a receiver, its sharers and their fusers, as one model that answers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache

from c2c import identity, kv_cache
from c2c.alignment import ALIGNERS, Aligner, Alignment, Chunk, Prompt, SpanAligner
from c2c.alignment.slots import check_sections, plan_sections, slot_positions
from c2c.errors import AlignmentError, FuserError, PromptError, SharerLost
from c2c.fusers import Fuser, family
from c2c.fusers.base import load_fuser, resolve
from c2c.fusion import FusionMode, Source, fuse
from c2c.generation import Chat, FusionReport, Stopwatch, TextStream
from c2c.language_model import FirstTokenClock, Receiver, Sharer, Wanted
from c2c.layer_map import layer_map as make_layer_map
from c2c.messages import Conversation, conversations
from c2c.private_context import Memory, Placed, first_user_column, handoffs_of, lay_down, place, project
from c2c.prompting import RenderOptions
from c2c.published import import_published, published_names, read_names
from c2c.tokens import TokenBatch
from c2c.utils import read_json_object, save_atomically, write_json

_MANIFEST = "c2c.json"


@dataclass
class FusedPrompt:
    """A prompt whose cache is fused and ready to decode from.

    Attributes:
        tokens: the receiver's tokens, left-padded.
        cache: the fused cache; it does not cover the last token.
        report: what was fused.
        slots: per row, how many columns of ``tokens`` are private context and no tokens; empty without any.
    """

    tokens: TokenBatch
    cache: Cache
    report: FusionReport
    slots: tuple[int, ...] = ()


@dataclass
class FusedIds:
    """What :meth:`C2CModel.fuse_ids` returns.

    Attributes:
        keys: one tensor per receiver layer, ``[batch, kv_heads, tokens, head_dim]``, after the rotary embedding.
        values: the same shapes.
        last_logits: after the last token, ``[batch, vocab]``.
        report: what was fused.
    """

    keys: list[Tensor]
    values: list[Tensor]
    last_logits: Tensor
    report: FusionReport


class C2CModel(nn.Module):
    """A receiver that answers from a cache into which its sharers' caches were fused.

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
        super().__init__()
        if not sharers or len(sharers) != len(fusers):
            raise FuserError(f"got {len(sharers)} sharers and {len(fusers)} fusers; give one fuser per sharer.")
        if mode not in ("sequential", "parallel"):
            raise FuserError(f"unknown fusion mode {mode!r}; expected 'sequential' or 'parallel'.")
        self.receiver, self.sharers, self.mode = receiver, list(sharers), mode
        self.fusers = nn.ModuleList(fusers)
        self.aligner: Aligner = aligner or _aligner(fusers[0].config.alignment)
        self.notes = self._check(allow_mismatch)

    @property
    def private(self) -> list[int]:
        """Indices of the sharers that hand over private context."""
        return [index for index, fuser in enumerate(self._fusers) if fuser.context == "private"]

    # -- construction ------------------------------------------------------------------------------------------------

    @classmethod
    def from_models(
        cls,
        receiver: Any,
        sharer: Any,
        *,
        fuser: str = "bottleneck",
        layer_map: str | Sequence[int | None] = "depth",
        aligner: Aligner | None = None,
        mode: FusionMode = "sequential",
        fuser_options: dict[str, Any] | None = None,
        **load_kwargs: Any,
    ) -> Self:
        """A new pair with an untrained fuser.

        Args:
            receiver: alias, hub id, folder, GGUF file, loaded model, or :class:`Receiver`.
            sharer: the same, the URL of ``c2c share`` or a :class:`~c2c.remote.RemoteSharer`; a list for several.
            fuser: fuser family.
            layer_map: ``depth``, ``terminal``, or one sharer layer (or None) per receiver layer.
            aligner: by default :class:`SpanAligner`.
            mode: how several sharers are combined.
            fuser_options: passed to the family's config, for instance ``{"rank": 64}``.
            **load_kwargs: ``dtype``, ``sharer_dtype`` (by default the same), ``device_map`` and others, see
                :func:`c2c.loading.load`.
        """
        ours, theirs = _load_models(receiver, sharer, load_kwargs)
        aligner = aligner or SpanAligner()
        fusers = []
        for model in theirs:
            layers = make_layer_map(layer_map, ours.geometry.layers, model.geometry.layers)
            new = family(fuser).from_geometry(model.geometry, ours.geometry, layers, **(fuser_options or {}))
            new.config.sharer, new.config.receiver = model.identity.to_dict(), ours.identity.to_dict()
            new.config.alignment = aligner.to_dict()
            fusers.append(_place(new, ours.device))
        return cls(ours, theirs, fusers, aligner=aligner, mode=mode)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Sequence[str | Path],
        *,
        receiver: Any = None,
        sharer: Any = None,
        mode: FusionMode | None = None,
        aligner: Aligner | None = None,
        allow_mismatch: bool = False,
        fuser_dtype: Any = torch.float32,
        **load_kwargs: Any,
    ) -> Self:
        """Load a fuser (or several) with the models that it names.

        Args:
            source: folder or hub id of a fuser, of a model saved by :meth:`save_pretrained`, or a list of fusers.
            receiver: in place of the recorded receiver: alias, id, folder, GGUF file or loaded model.
            sharer: in place of the recorded sharer: the same, the URL of ``c2c share`` or a
                :class:`~c2c.remote.RemoteSharer`; a list for several.
            mode: how several sharers are combined.
            aligner: in place of the recorded one.
            allow_mismatch: accept other weights, tokenizers or templates of the same structure.
            fuser_dtype: type of the fuser's weights.
            **load_kwargs: ``dtype``, ``sharer_dtype`` (by default the same), ``device_map`` and others, see
                :func:`c2c.loading.load`.
        """
        folders, manifest = _fuser_folders(source)
        fusers = [load_fuser(folder, dtype=fuser_dtype) for folder in folders]
        receiver = receiver if receiver is not None else _recorded(fusers[0], "receiver")
        sharer = sharer if sharer is not None else [_recorded(fuser, "sharer") for fuser in fusers]
        ours, theirs = _load_models(receiver, sharer, load_kwargs)
        chosen = mode or manifest.get("mode", "sequential")
        if aligner is None and "aligner" in manifest:
            aligner = _aligner(manifest["aligner"])
        fusers = [_place(fuser, ours.device) for fuser in fusers]
        return cls(ours, theirs, fusers, aligner=aligner, mode=chosen, allow_mismatch=allow_mismatch)

    @classmethod
    def from_published(
        cls,
        folder: str | Path | Sequence[str | Path],
        *,
        receiver: Any = None,
        sharer: Any = None,
        mode: FusionMode | None = None,
        aligner: Aligner | None = None,
        dtype: Any = None,
        **load_kwargs: Any,
    ) -> Self:
        """Load published checkpoints (``projector_*.pt``) as they are.

        Args:
            folder: a checkpoint folder, or a list of them with one sharer each.
            receiver: alias, id, folder or loaded model; by default the ``base_model`` of the checkpoint.
            sharer: the same for ``teacher_model``; a list for several.
            mode: how several sharers are combined; by default what the checkpoint says, else ``sequential``.
            aligner: by default what the checkpoint was trained with.
            dtype: type of the models and the fuser.
            **load_kwargs: see :func:`c2c.loading.load`.
        """
        folders = [Path(f) for f in ([folder] if isinstance(folder, str | Path) else folder)]
        names = [read_names(f) for f in folders]
        receiver = receiver if receiver is not None else names[0].receiver
        sharer = sharer if sharer is not None else [name.sharer for name in names]
        if receiver is None or sharer is None or sharer == [None]:
            raise FuserError(f"{folders[0]} does not name its models; pass receiver=... and sharer=....")
        ours, theirs = _load_models(receiver, sharer, load_kwargs | {"dtype": dtype})
        if len(theirs) != len(folders):
            raise FuserError(
                f"got {len(folders)} checkpoints and {len(theirs)} sharers; give one sharer per checkpoint."
            )
        fusers = [
            _place(
                import_published(f, receiver=ours.geometry, sharer=model.geometry, dtype=dtype or ours.dtype),
                ours.device,
            )
            for f, model in zip(folders, theirs, strict=True)
        ]
        for fuser, model in zip(fusers, theirs, strict=True):
            fuser.config.sharer, fuser.config.receiver = model.identity.to_dict(), ours.identity.to_dict()
        chosen: Any = mode or names[0].mode
        return cls(ours, theirs, fusers, aligner=aligner, mode=chosen)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the fusers; the models are named, not copied. A single fuser lies in the folder itself."""
        names = [""] if len(self.fusers) == 1 else [f"fuser_{i + 1}" for i in range(len(self.fusers))]
        manifest = {"fusers": names, "mode": self.mode, "aligner": self.aligner.to_dict()}

        def write(temporary: str) -> None:
            for name, fuser in zip(names, self._fusers, strict=True):
                fuser.save_pretrained(Path(temporary) / name)
            write_json(Path(temporary) / _MANIFEST, manifest)

        save_atomically(Path(folder), write)

    # -- answering ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
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
                :class:`~c2c.handoff.Handoff` from ``sharer.read``; a list with one for each conversation; for several
                such sharers a tuple with one of these for each.
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
        clock = FirstTokenClock()
        fused = self.prepare(messages, sharer_messages=sharer_messages, options=options, blend=blend)
        return self.decode(fused, messages, clock, **kwargs)

    def decode(self, fused: FusedPrompt, messages: Any, clock: FirstTokenClock, **kwargs: Any) -> Any:
        """Decode from a prepared prompt; its cache is used up."""
        began = time.perf_counter()
        ids = self.receiver.generate(fused.tokens, fused.cache, clock=clock, **kwargs)
        results = self.receiver.results(fused.tokens, ids, clock, messages, fused.report, fused.slots)
        ended = time.perf_counter()
        if fused.report.stopwatch is not None:
            first = clock.first or ended
            fused.report.stopwatch.add("first_token", first - began)
            fused.report.stopwatch.add("decode", ended - first)
        return results

    @torch.no_grad()
    def prepare(
        self,
        messages: Any,
        *,
        sharer_messages: Any = None,
        options: RenderOptions | None = None,
        blend: float = 1.0,
    ) -> FusedPrompt:
        """Render, align, prefill and fuse; what :meth:`generate` decodes from. Arguments as there.

        Raises:
            PromptError: private context is missing, or given to fusers that know none; an impossible ``blend``.
        """
        batch, _ = conversations(messages)
        options = options or RenderOptions()
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
        try:
            if self.private:
                return self._prepare_private(batch, sharer_messages, options, blend)
            prompts = self.aligner.align(self.receiver.tokenizer, [s.tokenizer for s in self.sharers], batch, options)
            return self.fuse_prompts(prompts, blend=blend)
        except SharerLost as lost:
            return self._alone(self.receiver.encode(batch, options), lost)

    def _prepare_private(
        self, batch: list[Conversation], given: Any, options: RenderOptions, blend: float
    ) -> FusedPrompt:
        """Each conversation by itself, since what is handed over to them differs in length; then one batch."""
        if blend not in (0, 1):
            raise PromptError(
                f"blend is {blend:g}; private context adds entries of its own, which are there or not: pass 0 or 1."
            )
        if blend == 0:  # the receiver alone, and no one reads for it
            whole = [replace(self._own_prompt(conversation, options), chunks=()) for conversation in batch]
            report = self._report(whole, Stopwatch(self.receiver.device), blend)
            parts = [self._fuse_prompt(prompt, report, Placed(prompt, 0, [])) for prompt in whole]
            return self._join_parts(parts, report)
        stopwatch = Stopwatch(self.receiver.device)
        with stopwatch.stage("sharer_prefill"):
            readers = [self.sharers[i].for_fuser(self._fusers[i]) for i in self.private]
            handed = handoffs_of(given, readers, len(batch), options)
        projected: dict[tuple[int, int], Memory] = {}  # a handoff that many rows share is projected once
        with stopwatch.stage("fuse"):
            for row in handed:
                for index, handoff in zip(self.private, row, strict=True):
                    if (index, id(handoff)) not in projected:
                        fuser = self._fusers[index]
                        made = handoff.projected(fuser)
                        projected[index, id(handoff)] = (
                            project(handoff, self.sharers[index], fuser)
                            if made is None
                            else Memory(made, handoff.nbytes)
                        )
        placed = [
            place(
                self._own_prompt(conversation, options),
                first_user_column(self.receiver.tokenizer, conversation, options),
                [projected[index, id(handoff)] for index, handoff in zip(self.private, row, strict=True)],
            )
            for conversation, row in zip(batch, handed, strict=True)
        ]
        report = self._report([part.prompt for part in placed], stopwatch)
        slots = tuple(sum(memory.slots for memory in part.memories) for part in placed)
        report.prompt_tokens -= sum(slots)
        report.memory_slots += sum(slots)
        report.sharer_bytes += sum(memory.read for memory in projected.values())
        fused = self._join_parts([self._fuse_prompt(part.prompt, report, part) for part in placed], report)
        return replace(fused, slots=slots)

    def _own_prompt(self, conversation: Conversation, options: RenderOptions) -> Prompt:
        """One conversation as the receiver and those sharers read it that share it."""
        shared = [index for index in range(len(self.sharers)) if index not in self.private]
        if not shared:
            tokens = self.receiver.encode([conversation], options)
            return Prompt(tokens, (tokens,) * len(self.sharers), ())
        theirs = [self.sharers[index].tokenizer for index in shared]
        prompt = self.aligner.align(self.receiver.tokenizer, theirs, [conversation], options)[0]
        spread: list[TokenBatch] = [prompt.receiver] * len(self.sharers)
        for index, tokens in zip(shared, prompt.sharers, strict=True):
            spread[index] = tokens
        chunks = []
        for chunk in prompt.chunks:
            alignments: list[Alignment | None] = [None] * len(self.sharers)
            for index, alignment in zip(shared, chunk.alignments, strict=True):
                alignments[index] = alignment
            chunks.append(Chunk(chunk.stop, tuple(alignments)))
        return Prompt(prompt.receiver, tuple(spread), tuple(chunks), prompt.skipped)

    def stream(self, messages: Any, *, options: RenderOptions | None = None, **kwargs: Any) -> TextStream:
        """Answer one conversation piece by piece: iterate over the text; ``.result`` is there when it ends.

        Closing the stream early stops the generation. Arguments as in :meth:`generate`.
        """
        return TextStream(self.receiver.tokenizer, self.generate, messages, options=options, **kwargs)

    def chat(self, system: str | None = None, **generate_kwargs: Any) -> Chat:
        """Start a conversation: ``chat.send("...")`` answers and remembers."""
        return Chat(self, system, **generate_kwargs)

    def forward(self, messages: Any, **kwargs: Any) -> Any:
        """The same as :meth:`generate`."""
        return self.generate(messages, **kwargs)

    # -- token ids ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_ids(
        self,
        receiver_ids: Any,
        sharer_ids: Any,
        *,
        fuse_mask: Any,
        receiver_mask: Any = None,
        sharer_mask: Any = None,
        sections: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Answer from token ids that are aligned one to one, as the published code does.

        Args:
            receiver_ids: ``[batch, tokens]``.
            sharer_ids: ``[batch, tokens]``, or one per sharer.
            fuse_mask: ``[batch, tokens]`` or ``[tokens]``, the receiver positions to fuse; True fuses all sharers, an
                integer is a bit mask (1 the first sharer, 2 the second, 3 both). Its runs are the published sections:
                later ones are read on top of fused earlier ones, and the last is never fused.
            receiver_mask: False on padding, ``[batch, tokens]``; kept while decoding.
            sharer_mask: the same for the sharer, or one per sharer.
            sections: lengths of the sections, where two fused ones stand side by side.
            **kwargs: passed to the receiver's ``generate``.

        Returns:
            The new ids, ``[batch, new]``.

        Raises:
            PromptError: shapes that do not agree, or right padding.
        """
        fused = self._fuse_ids(receiver_ids, sharer_ids, fuse_mask, receiver_mask, sharer_mask, sections)
        return self.receiver.generate(fused.tokens, fused.cache, **kwargs)

    @torch.no_grad()
    def fuse_ids(
        self,
        receiver_ids: Any,
        sharer_ids: Any,
        *,
        fuse_mask: Any,
        receiver_mask: Any = None,
        sharer_mask: Any = None,
        sections: Sequence[int] | None = None,
    ) -> FusedIds:
        """The fused cache of the whole prompt and the logits after it; arguments as in :meth:`generate_ids`."""
        fused = self._fuse_ids(receiver_ids, sharer_ids, fuse_mask, receiver_mask, sharer_mask, sections)
        logits = self.receiver.next_logits(fused.tokens, fused.cache)
        keys, values = zip(*kv_cache.layers(fused.cache), strict=True)
        return FusedIds(list(keys), list(values), logits, fused.report)

    # -- fusing ------------------------------------------------------------------------------------------------------

    def fuse_prompts(self, prompts: Sequence[Prompt], *, blend: float = 1.0) -> FusedPrompt:
        """Prefill and fuse; several prompts (rows with plans of their own) become one batch.

        Args:
            prompts: from an aligner.
            blend: how much of what the fusers add is taken, from 0 to 1.

        Raises:
            PromptError: a prompt that a model can't take, or ``blend`` is not from 0 to 1.
        """
        if not 0 <= blend <= 1:
            raise PromptError(f"blend is {blend:g}; expected a number from 0 (the receiver alone) to 1 (all is taken).")
        stopwatch = Stopwatch(self.receiver.device)
        report = self._report(prompts, stopwatch, blend)
        return self._join_parts([self._fuse_prompt(prompt, report, blend=blend) for prompt in prompts], report)

    def _join_parts(self, parts: Sequence[tuple[TokenBatch, Cache]], report: FusionReport) -> FusedPrompt:
        """One batch of prompts that were fused by themselves."""
        if len(parts) == 1:
            return FusedPrompt(*parts[0], report)
        watch = report.stopwatch or Stopwatch(self.receiver.device)
        with watch.stage("receiver_prefill"):  # bring all rows to one token before their end
            caches = [self.receiver.prefill(tokens, tokens.length - 1, cache) for tokens, cache in parts]
        return FusedPrompt(_join([tokens for tokens, _ in parts]), kv_cache.stack(caches), report)

    def _fuse_prompt(
        self, prompt: Prompt, report: FusionReport, placed: Placed | None = None, blend: float = 1.0
    ) -> tuple[TokenBatch, Cache]:
        self.receiver.check_prompt(prompt.receiver)
        watch = report.stopwatch or Stopwatch(self.receiver.device)
        tokens = prompt.receiver.to(self.receiver.device)
        with watch.stage("sharer_prefill"):
            sources = [self._source(index, prompt) if blend > 0 else None for index in range(len(self.sharers))]
        cache: Cache = kv_cache.empty_cache()
        if placed is not None and placed.memories:
            with watch.stage("receiver_prefill"):
                lay_down(cache, self.receiver, placed)
        for chunk in prompt.chunks:
            with watch.stage("receiver_prefill"):
                self.receiver.prefill(tokens, chunk.stop, cache)
            with watch.stage("fuse"):
                report.sharer_bytes += fuse(cache, self.receiver, tokens, sources, chunk, self.mode, blend)
        if placed is not None:
            with watch.stage("receiver_prefill"):
                self.receiver.prefill(tokens, tokens.length - 1, cache)
        return tokens, cache

    def _source(self, index: int, prompt: Prompt) -> Source | None:
        """Prefill one sharer as far as it is read, or not at all."""
        needed = [alignment for chunk in prompt.chunks if (alignment := chunk.alignments[index]) is not None]
        if not needed:
            return None
        sharer = self.sharers[index]
        sharer.check_tokens(prompt.sharers[index])
        tokens = prompt.sharers[index].to(sharer.device)
        rows, columns = torch.cat([part.rows for part in needed]), torch.cat([part.sharer for part in needed])
        wanted = Wanted(self._fusers[index].config.source_layers, rows, columns)
        return Source(sharer, tokens, sharer.share(tokens, wanted), self._fusers[index])

    def _alone(self, tokens: TokenBatch, lost: SharerLost) -> FusedPrompt:
        """The receiver's own prompt and cache, where a sharer was lost whose policy is that it answers alone."""
        self.receiver.check_prompt(tokens)
        watch, why = Stopwatch(self.receiver.device), "a sharer was lost"
        tokens = tokens.to(self.receiver.device)
        with watch.stage("receiver_prefill"):
            cache = self.receiver.prefill(tokens, tokens.length - 1)
        report = FusionReport(stopwatch=watch, notes=[*self.notes, f"receiver only: {lost}"], trained=self.trained)
        report.prompt_tokens = int(tokens.mask.sum())
        report.skipped_tokens = {why: report.prompt_tokens}
        report.skipped_layers = dict.fromkeys(range(self.receiver.geometry.layers), why)
        return FusedPrompt(tokens, cache, report)

    def _fuse_ids(
        self,
        receiver_ids: Any,
        sharer_ids: Any,
        fuse_mask: Any,
        receiver_mask: Any,
        sharer_mask: Any,
        sections: Any,
    ) -> FusedPrompt:
        ids = _ids(receiver_ids, "receiver_ids")
        others = [_ids(entry, "sharer_ids") for entry in _per_sharer(sharer_ids, len(self.sharers))]
        mask = _mask(receiver_mask, ids, "receiver_mask")
        other_masks = [
            _mask(entry, other, "sharer_mask")
            for entry, other in zip(_per_sharer(sharer_mask, len(self.sharers)), others, strict=True)
        ]
        selection = self._selection(fuse_mask, ids)
        for other in others:
            if other.shape != ids.shape:
                raise AlignmentError(
                    f"unaligned prompt: receiver_ids are {tuple(ids.shape)}, sharer_ids {tuple(other.shape)}. Ids "
                    "must be aligned one to one; for text use generate(messages), which aligns."
                )
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, values in enumerate(selection.tolist()):
            groups.setdefault(tuple(values), []).append(row)
        if sections is not None:
            check_sections(selection, sections)
        positions = slot_positions(mask, other_masks)
        tokens = TokenBatch(ids, mask, positions, bool((~mask).any()), natural=False)
        sharers = [
            TokenBatch(other, m, positions, bool((~m).any())) for other, m in zip(others, other_masks, strict=True)
        ]
        prompts = []
        for rows in groups.values():
            chunks, skipped = plan_sections(selection[rows[0]], mask[rows], len(self.sharers), sections)
            prompts.append(Prompt(tokens.select(rows), tuple(s.select(rows) for s in sharers), chunks, skipped))
        if bool(selection.any()) and not any(prompt.chunks for prompt in prompts):
            warnings.warn(
                "fuse_mask selects positions of the last section only, which is never fused: the answer is the "
                "receiver's alone. Leave at least the last token out of the mask.",
                stacklevel=3,
            )
        try:
            fused = self.fuse_prompts(prompts)
        except SharerLost as lost:
            return self._alone(tokens, lost)
        if len(prompts) > 1:  # rows were grouped by their sections: back to the caller's order
            order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
            fused = FusedPrompt(
                fused.tokens.select(order.tolist()), kv_cache.select_rows(fused.cache, order), fused.report
            )
        return fused

    def _selection(self, fuse_mask: Any, ids: Tensor) -> Tensor:
        """The fuse mask as bit masks of sharers, ``[batch, tokens]``."""
        mask: Tensor = torch.as_tensor(fuse_mask).cpu()
        if mask.dim() == 1:
            mask = mask.expand(ids.shape[0], -1)
        if mask.shape != ids.shape:
            raise PromptError(f"fuse_mask is {tuple(mask.shape)}, expected {tuple(ids.shape)} like receiver_ids.")
        everyone = 2 ** len(self.sharers) - 1
        if mask.dtype == torch.bool:
            chosen: Tensor = mask.long() * everyone
            return chosen
        bits = mask.long().clamp_min(0)
        if int(bits.max()) > everyone:
            raise PromptError(
                f"fuse_mask selects sharers by bit mask {int(bits.max())}; the largest here is {everyone}."
            )
        return bits

    @property
    def trained(self) -> bool:
        """Whether every fuser has been trained; an untrained one leaves the receiver as it is."""
        return all(fuser.trained for fuser in self._fusers)

    @property
    def _fusers(self) -> list[Fuser]:
        return list(self.fusers)  # type: ignore[arg-type]

    def _check(self, allow_mismatch: bool) -> list[str]:
        pairs: list[tuple[str, Any, Any]] = []
        for index, (sharer, fuser) in enumerate(zip(self.sharers, self._fusers, strict=True)):
            name = "sharer" if len(self.sharers) == 1 else f"sharer {index + 1}"
            pairs.append((name, _expected(fuser, "sharer", sharer), sharer.identity))
            pairs.append(("receiver", _expected(fuser, "receiver", self.receiver), self.receiver.identity))
            if fuser.needs_rotary:
                self.receiver.check_rotary()
                sharer.check_rotary()
        return identity.check(pairs, allow_mismatch)

    def _report(self, prompts: Sequence[Prompt], stopwatch: Stopwatch, blend: float = 1.0) -> FusionReport:
        report = FusionReport(stopwatch=stopwatch, notes=list(self.notes))
        if blend != 1:
            report.notes.append(f"blend {blend:g}: that share of what the fusers add was taken")
        report.trained = self.trained
        for prompt in prompts:
            report.prompt_tokens += int(prompt.receiver.mask.sum())
            report.fused_tokens += prompt.fused_tokens
            for reason, count in prompt.skipped.items():
                report.skipped_tokens[reason] = report.skipped_tokens.get(reason, 0) + count
        fused = {layer for fuser in self._fusers for layer in fuser.config.fused_layers}
        report.fused_layers = sorted(fused)
        report.skipped_layers = {
            layer: "not in the layer map" for layer in range(self.receiver.geometry.layers) if layer not in fused
        }
        if any(prompt.chunks for prompt in prompts):
            report.gate_values = [fuser.gates() for fuser in self._fusers]
        elif not self.private:
            report.notes.append("nothing was fused: the last section of a prompt never is")
        return report


def _place(fuser: Fuser, device: torch.device) -> Fuser:
    nn.Module.to(fuser, device)
    fuser.eval()
    return fuser


def _expected(fuser: Fuser, role: str, model: Any) -> identity.ModelIdentity:
    """What a fuser was made for: its recorded identity, or at least its cache geometry."""
    recorded: identity.ModelIdentity | None = fuser.config.identity(role)
    if recorded is not None:
        return recorded
    geometry = kv_cache.KVGeometry(**getattr(fuser.config, f"{role}_kv"))
    return identity.ModelIdentity(
        "unrecorded", None, model.identity.architecture, geometry.to_dict(), None, None, None, None
    )


def _aligner(config: dict[str, Any] | None) -> Aligner:
    options = dict(config or {"name": "spans"})
    name = options.pop("name", None)
    if name not in ALIGNERS:
        raise FuserError(f"unknown token alignment {name!r}. Known: {', '.join(ALIGNERS)}.")
    made: Aligner = ALIGNERS[name](**options)
    return made


def _load_models(receiver: Any, sharer: Any, load_kwargs: dict[str, Any]) -> tuple[Receiver, list[Sharer]]:
    if "tokenizer" in load_kwargs:
        raise PromptError(
            "tokenizer=... would go to both models; pass Receiver.from_pretrained(source, tokenizer=...) and "
            "Sharer.from_pretrained(source, tokenizer=...) as receiver and sharer."
        )
    ours_kwargs = {name: value for name, value in load_kwargs.items() if name != "sharer_dtype"}
    their_kwargs = ours_kwargs | {"dtype": load_kwargs.get("sharer_dtype") or load_kwargs.get("dtype")}
    ours = receiver if isinstance(receiver, Receiver) else Receiver.from_pretrained(receiver, **ours_kwargs)
    several = list(sharer) if isinstance(sharer, list | tuple) else [sharer]
    return ours, [s if isinstance(s, Sharer) else _load_sharer(s, their_kwargs) for s in several]


def _load_sharer(source: Any, load_kwargs: dict[str, Any]) -> Sharer:
    """A sharer here, or at a URL on another machine."""
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        from c2c.remote import RemoteSharer  # brings an HTTP client along

        return RemoteSharer(source)
    return Sharer.from_pretrained(source, **load_kwargs)


def _fuser_folders(source: str | Path | Sequence[str | Path]) -> tuple[list[str | Path], dict[str, Any]]:
    if not isinstance(source, str | Path):
        return list(source), {}
    folder = resolve(source)
    path = folder / _MANIFEST
    manifest: dict[str, Any] = read_json_object(path, FuserError) if path.exists() else {"fusers": [""]}
    return [folder / name for name in manifest["fusers"]], manifest


def _recorded(fuser: Fuser, role: str) -> str:
    recorded: identity.ModelIdentity | None = fuser.config.identity(role)
    if recorded is None and role in (names := published_names(fuser.config.training)):
        return names[role]
    if recorded is None:
        raise FuserError(f"this fuser does not say which {role} it was made for; pass {role}=....")
    return recorded.name


def _join(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Left-pad batches to one width and stack their rows; positions are kept."""
    width = max(batch.length for batch in batches)

    def widen(x: Tensor, batch: TokenBatch) -> Tensor:
        return torch.nn.functional.pad(x, (width - batch.length, 0))

    padded = any(batch.padded or batch.length < width for batch in batches)
    return TokenBatch(
        torch.cat([widen(batch.ids, batch) for batch in batches]),
        torch.cat([widen(batch.mask, batch) for batch in batches]),
        torch.cat([widen(batch.positions, batch) for batch in batches]),
        padded,
        natural=all(batch.natural for batch in batches),
    )


def _ids(value: Any, name: str) -> Tensor:
    ids = torch.as_tensor(value).cpu()
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise PromptError(
            f"{name} has shape {tuple(ids.shape)} and type {ids.dtype}; expected integers [batch, tokens]."
        )
    return ids.long()


def _mask(value: Any, ids: Tensor, name: str) -> Tensor:
    if value is None:
        return torch.ones_like(ids, dtype=torch.bool)
    mask = torch.as_tensor(value).cpu().bool()
    mask = mask.unsqueeze(0) if mask.dim() == 1 else mask
    if mask.shape != ids.shape:
        raise PromptError(f"{name} is {tuple(mask.shape)}, expected {tuple(ids.shape)} like the ids.")
    return mask


def _depth(value: Any) -> int:
    """How deep lists are nested: 2 for ids of a batch, 3 for those of several sharers."""
    return 1 + _depth(value[0]) if isinstance(value, list | tuple) and value else 0


def _per_sharer(value: Any, count: int) -> list[Any]:
    """One value per sharer; a single tensor is meant for all of them."""
    if isinstance(value, list | tuple) and value and (isinstance(value[0], Tensor) or _depth(value) == 3):
        if len(value) != count:
            raise PromptError(f"got {len(value)} tensors for {count} sharers; give one for each, or one for all.")
        return list(value)
    return [value] * count
