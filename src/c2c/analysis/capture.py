"""Capture cache entries at aligned positions, before and after fusion: of many items, or of one prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from c2c import kv_cache
from c2c.alignment import Alignment
from c2c.analysis.config import AnalysisConfig, AnalysisError
from c2c.analysis.results import provenance
from c2c.data.config import DataSource
from c2c.data.sources import load_rows
from c2c.fusers import Fuser
from c2c.fusers.base import fuser_hash, training_facts
from c2c.fusion import AlignedIndex, Source, aligned_entries
from c2c.language_model import LanguageModel
from c2c.messages import conversations
from c2c.model import C2CModel
from c2c.prefill import continued_logits
from c2c.prompting import RenderOptions
from c2c.rope import Rotary
from c2c.tokens import TokenBatch
from c2c.training.examples import build_examples
from c2c.training.prefill_store import PrefillStore
from c2c.training.shared_context import SharedBatch, SharedContextObjective
from c2c.utils import OnProgress

Side = Literal["sharer", "receiver", "fused"]
SIDES: tuple[Side, ...] = get_args(Side)
KINDS = ("keys", "values")

_UNLIMITED = 10**9


@dataclass(frozen=True)
class LayerCapture:
    """Aligned entries of one fused receiver layer; row ``i`` of all sides belongs together.

    Attributes:
        source: sharer layer that ``layer`` reads.
        entries: by side and kind ``[pairs, kv_heads * head_dim]``, float32 on the CPU. Kinds: ``keys`` (as they lie in
            the cache), ``keys_unrotated`` (without their rotary embedding) and ``values``.
        unique: True where a sharer entry is read for the first time, ``[pairs]``; several positions may read one.
    """

    layer: int
    source: int
    entries: dict[Side, dict[str, Tensor]]
    unique: Tensor


@torch.no_grad()
def capture_layers(
    receiver: LanguageModel, tokens: TokenBatch, source: Source, alignment: Alignment, clean: Cache, fused: Cache
) -> Iterator[LayerCapture]:
    """Yield the aligned entries of each fused layer; ``clean`` and ``fused`` are the receiver's caches."""
    theirs, ours = aligned_entries(clean, receiver, tokens, source, alignment)
    _, merged = aligned_entries(fused, receiver, tokens, source, alignment)
    our_rotary = _rotary(receiver, tokens, AlignedIndex(alignment, "receiver"), source.fuser.device)
    their_rotary = _rotary(source.sharer, source.tokens, AlignedIndex(alignment, "sharer"), source.fuser.device)
    read = torch.stack([alignment.rows, alignment.sharer]).cpu().numpy()
    unique = torch.zeros(len(alignment), dtype=torch.bool)
    unique[np.unique(read, axis=1, return_index=True)[1]] = True
    config = source.fuser.config
    for index, (layer, source_layer) in enumerate(zip(config.fused_layers, config.source_layers, strict=True)):
        sides = zip(SIDES, (theirs, ours, merged), (their_rotary[source_layer], *[our_rotary[layer]] * 2), strict=True)
        yield LayerCapture(
            layer, source_layer, {side: _flatten(*part.layer(index), rotary) for side, part, rotary in sides}, unique
        )


def _rotary(
    model: LanguageModel, tokens: TokenBatch, aligned: AlignedIndex, device: torch.device
) -> Sequence[Rotary | None]:
    """Return each layer's rotary table at aligned positions; None for a model without rotary embedding."""
    return model.rotary(aligned.gather_positions(tokens.positions).to(device)) or [None] * model.geometry.layers


def _flatten(keys: Tensor, values: Tensor, rotary: Rotary | None) -> dict[str, Tensor]:
    keys, values = keys.float(), values.float()
    found = {"keys": keys, "keys_unrotated": keys if rotary is None else rotary.undo(keys), "values": values}
    return {kind: x.transpose(1, 2).flatten(2).flatten(0, 1).cpu() for kind, x in found.items()}


@dataclass(frozen=True)
class PromptCapture:
    """One prompt as a pair reads it.

    Attributes:
        names: of the receiver and the sharer.
        receiver_tokens: text of each receiver token, template included; ``sharer_tokens`` likewise.
        pairs: receiver token and sharer token that it reads, in order.
        layers: aligned entries of every fused layer; row ``i`` belongs to ``pairs[i]``.
    """

    fuser: Fuser
    names: tuple[str, str]
    receiver_tokens: list[str]
    sharer_tokens: list[str]
    pairs: list[tuple[int, int]]
    layers: list[LayerCapture]


@torch.no_grad()
def capture_prompt(model: C2CModel, messages: Any, options: RenderOptions | None = None) -> PromptCapture:
    """Prefill one prompt with both models, fuse, and capture the aligned entries.

    Raises:
        AnalysisError: several sharers or prompts, a fuser of private context, or a prompt that is fused in steps.
        PromptError: a prompt that one of the models can't read.
    """
    fuser = only_fuser(model, "this model")
    prompts = model.align(conversations(messages)[0], options or RenderOptions())
    alignments = [chunk.alignments[0] for prompt in prompts for chunk in prompt.chunks]
    if len(prompts) != 1 or len(alignments) != 1 or (alignment := alignments[0]) is None:
        raise AnalysisError(
            f"expected one prompt that is fused in one step, got {len(prompts)} with {len(alignments)} steps. Give a "
            "single user message, or use a fuser aligned by spans."
        )
    shared: list[Cache] = []

    def keep(cache: Cache) -> Cache:
        shared.append(cache)
        return cache

    fused = model.fuse_prompts(prompts, edit=keep)
    receiver, sharer = model.receiver, model.sharers[0]
    source = Source(sharer, prompts[0].sharers[0].to(sharer.device), shared[0], fuser)
    clean = receiver.prefill(fused.tokens, kv_cache.length(fused.cache))
    return PromptCapture(
        fuser,
        (receiver.name, sharer.name),
        [str(receiver.tokenizer.decode([token])) for token in fused.tokens.ids[0].tolist()],
        [str(sharer.tokenizer.decode([token])) for token in source.tokens.ids[0].tolist()],
        list(zip(alignment.receiver.tolist(), alignment.sharer.tolist(), strict=True)),
        list(capture_layers(receiver, fused.tokens, source, alignment, clean, fused.cache)),
    )


def only_fuser(model: C2CModel, name: str) -> Fuser:
    """Return the single fuser of a pair; raise AnalysisError for several sharers, or a fuser of private context."""
    if len(model.sharers) != 1:
        raise AnalysisError(
            f"{name} has {len(model.sharers)} sharers; one is analysed at a time: give one of its fusers."
        )
    return check_shared(model.fusers[0], name)  # type: ignore[arg-type]


def check_shared(fuser: Fuser, name: str) -> Fuser:
    """Return a fuser of shared context; raise AnalysisError for one of private context."""
    if fuser.context != "shared":
        raise AnalysisError(
            f"{name} is for {fuser.context} context (family {fuser.family!r}): it adds entries and merges none, so "
            "nothing can be compared before and after. Use a fuser of shared context, such as 'bottleneck'."
        )
    return fuser


class Experiment:
    """Load a fuser with its models, and the items that it is analysed on.

    The sharer's weights are given back where all its prefills are stored, except with ``needs_sharer``.

    Attributes:
        examples: the items as both models' tokens, at least two.
        dropped: how many items the pair can't read, by reason.

    Raises:
        AnalysisError: no data file, several sharers, a fuser of private context, or fewer than two items left.
        C2CError: a model or fuser that can't be loaded.
    """

    def __init__(
        self, config: AnalysisConfig, progress: OnProgress | None = None, *, needs_sharer: bool = False
    ) -> None:
        items = data_source(config.data, config.form, config.limit)
        models = {name: getattr(config, name) for name in ("receiver", "sharer", "dtype", "device_map")}
        self.config, self._progress = config, progress
        self.model = C2CModel.from_pretrained(config.fuser, **models)
        self.fuser = only_fuser(self.model, config.fuser)
        receiver, sharer = self.model.receiver, self.model.sharers[0]
        rows, _ = load_rows([items], Path(), config.seed)
        longest = receiver.context_length or _UNLIMITED
        self.examples, self.dropped = build_examples(self.model, rows, longest, _UNLIMITED)
        check_items(len(self.examples), config.data, self.dropped)
        folder = Path(config.store_dir).expanduser() if config.store_dir is not None else None
        budget = int(config.store_budget_gb * 5e8) if folder is not None else 0
        needed = ((receiver, range(receiver.geometry.layers)), (sharer, self.fuser.config.source_layers))
        ours, theirs = (PrefillStore(model, layers, folder=folder, budget=budget, batch=4) for model, layers in needed)
        self._objective = SharedContextObjective(self.model, ours, theirs).eval()
        stored = folder is not None and all(example.sharer_ids in theirs for example in self.examples)
        if stored and not needs_sharer:
            sharer.release()

    def batches(self, stage: str) -> Iterator[SharedBatch]:
        """Yield the items with their prefills, at least two at a time: deranged needs another item's cache."""
        total = len(self.examples)
        starts = list(range(0, total, self.config.batch_size))
        if total - starts[-1] == 1:
            starts.pop()
        for start, stop in zip(starts, [*starts[1:], total], strict=True):
            yield self._objective.collate(self.examples[start:stop])
            if self._progress is not None:
                self._progress(stage, stop, total)

    @torch.no_grad()
    def fuse(self, batch: SharedBatch, message: Any = "matched", **changes: Any) -> DynamicCache:
        """Return the receiver's cache of all prompt tokens but the last, fused with a message of the sharer.

        Messages: ``matched``, ``deranged`` (another item's), ``zero``, ``none``. ``changes`` are fields of the batch,
        such as ``sharer_cache``, that are replaced; ``batch`` stays as it is.
        """
        return self._objective.fused(replace(batch, **changes), message)

    def captures(self, stage: str, layers: Sequence[int] | None = None) -> Iterator[LayerCapture]:
        """Yield the captures of each batch, all fused layers of one batch after the other; ``layers`` selects some."""
        receiver, sharer = self.model.receiver, self.model.sharers[0]
        for batch in self.batches(stage):
            source = Source(sharer, batch.sharer, batch.sharer_cache, self.fuser)
            caches = batch.receiver_cache, self.fuse(batch)
            for capture in capture_layers(receiver, batch.receiver, source, batch.matched, *caches):
                if layers is None or capture.layer in layers:
                    yield capture

    def score(self, variants: Callable[[SharedBatch], Iterable[tuple[str, Cache]]]) -> dict[str, list[float]]:
        """Answer all items from each cache that ``variants`` yields for a batch: 1 for a right answer, else 0."""
        scores: dict[str, list[float]] = {}
        for batch in self.batches("answering"):
            for name, cache in variants(batch):
                scores.setdefault(name, []).extend(self.answer(batch, cache))
        return scores

    @torch.no_grad()
    def answer(self, batch: SharedBatch, cache: Cache) -> list[float]:
        """Return 1 for each item whose right option has the largest logit where the answer names it, else 0.

        ``cache`` is of all prompt tokens but the last, and stays as it is.
        """
        read = batch.responses[:, : max(example.decisive for example in batch.examples)]
        own = kv_cache.from_layers(kv_cache.layers(cache))  # decoding replaces its tensors, not those of ``cache``
        logits = continued_logits(self.model.receiver.model, batch.receiver, read.clamp_min(0), read != -100, own)
        return [
            float(int(logits[row, example.decisive, example.choice_ids].argmax()) == example.row.answer)
            for row, example in enumerate(batch.examples)
        ]

    def facts(self, **options: Any) -> dict[str, Any]:
        """Return ``n``, ``dropped`` and ``provenance``, with ``options`` in place of those in the config."""
        config = asdict(self.config)
        own = sorted(config.keys() - {one.name for one in fields(AnalysisConfig)})
        facts = {
            "fuser": fuser_hash(self.config.fuser),
            "training": training_facts(self.fuser),
            "receiver": self.model.receiver.identity.to_dict(),
            "sharer": self.model.sharers[0].identity.to_dict(),
            "options": {name: config.pop(name) for name in own} | options,
        }
        about = provenance(facts, config, [self.config.data])
        return {"n": len(self.examples), "dropped": dict(self.dropped), "provenance": about}


def data_source(path: str, form: str, limit: int | None) -> DataSource:
    """Describe a file of items; raise AnalysisError where there is no such file."""
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise AnalysisError(
            f'no such data file: {path}. Expected JSON lines with "question", "choices" and "answer" (the index of '
            "the right choice)."
        )
    return DataSource(str(file), form=form, limit=limit)


def check_items(count: int, data: str, dropped: Counter[str]) -> None:
    """Raise AnalysisError, with the reasons, where fewer than two items are left."""
    if count < 2:
        reasons = f" (dropped: {dict(dropped)})" if dropped else ""
        raise AnalysisError(f"{data}: {count} items are left to analyse{reasons}; at least 2 are needed.")
