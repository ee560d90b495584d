"""Cache-to-cache: the receiver's cache with what the sharers' caches say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from c2c.alignment import Prompt
from c2c.alignment.base import merge
from c2c.errors import RemoteError, SharerChanged, SharerLost
from c2c.generation import FusionReport
from c2c.model import C2CModel
from c2c.serving.batch import Prefilled, join
from c2c.serving.engine import Ask
from c2c.serving.failures import log_if_lost, refusing, tell
from c2c.serving.queue import Job
from c2c.serving.raw_text import RawText, as_message
from c2c.serving.reading import Batch, Prompted, ask_of, options_of, with_room

_LOST = "receiver only:"  # what a report's note on a lost sharer begins with
Aligned = tuple[Prompted, Prompt]


class Fused:
    """Reads prompts into fused caches.

    A sharer on another machine may be lost meanwhile. Then its policy holds for each request that it did not answer: an
    error, or the receiver alone with the reason as ``fallback``.

    Args:
        model: receiver, sharers and fusers.
        alone: lets the receiver read prompts by itself.
    """

    def __init__(self, model: C2CModel, alone: Callable[[Sequence[Job]], Batch | None]) -> None:
        self._model, self._alone = model, alone

    # -- prompts that both models read ---------------------------------------------------------------------------------

    def shared(self, jobs: Sequence[Job]) -> Batch | None:
        """Aligned one by one, read and fused together."""
        receiver = self._model.receiver
        aligned: list[Aligned] = []
        for job in jobs:
            with refusing(job):
                prompt = self._aligned(ask_of(job))
                tokens = int(prompt.receiver.mask.sum())
                aligned.append((with_room(job, receiver, prompt.receiver.length, tokens), prompt))
        return _joined(self._fused(aligned)) if aligned else None

    def _fused(self, aligned: Sequence[Aligned]) -> list[Batch]:
        """One batch; or one for each prompt, where the sharer takes some of them only."""
        try:
            return [self._together(aligned)]
        except (RemoteError, SharerChanged) as error:
            if len(aligned) > 1 and isinstance(error, RemoteError) and error.about_request:
                return [batch for one in aligned for batch in self._fused([one])]
            return self._without([prompted.job for prompted, _ in aligned], error)

    def _together(self, aligned: Sequence[Aligned]) -> Batch:
        receiver = self._model.receiver
        fused = self._model.fuse_prompts(merge([prompt for _, prompt in aligned]))
        cache = receiver.prefill(fused.tokens, fused.tokens.length - 1, fused.cache)
        for one, prompt in aligned:
            one.crossed = self._read_bytes(prompt)
            one.report = replace(
                fused.report or FusionReport(),
                prompt_tokens=one.prompt_tokens,
                fused_tokens=prompt.fused_tokens,
                skipped_tokens=dict(prompt.skipped),
                sharer_bytes=one.crossed,
            )
        return Batch(receiver, [one for one, _ in aligned], Prefilled(fused.tokens, cache))

    def _without(self, jobs: Sequence[Job], error: RemoteError | SharerChanged) -> list[Batch]:
        """What becomes of requests that the sharer did not answer, by its policy."""
        log_if_lost(error)
        if not isinstance(error, SharerLost):
            for job in jobs:
                tell(job, error)
            return []
        batch = self._alone(jobs)
        for one in batch.prompted if batch else []:
            one.fallback = f"{_LOST} {error}"
            one.report = unfused(self._model, one.prompt_tokens, "a sharer was lost", one.fallback)
        return [batch] if batch else []

    def _aligned(self, ask: Ask) -> Prompt:
        model, conversation = self._model, ask.prompt
        ours, theirs = model.receiver.tokenizer, [sharer.tokenizer for sharer in model.sharers]
        if isinstance(conversation, str):
            ours, theirs = RawText(ours), [RawText(tokenizer) for tokenizer in theirs]
            conversation = as_message(conversation)
        prompt = model.aligner.align(ours, theirs, [conversation], options_of(ask))[0]
        model.receiver.check_prompt(prompt.receiver)
        for sharer, tokens in zip(model.sharers, prompt.sharers, strict=True):
            sharer.check_tokens(tokens)
        return prompt

    def _read_bytes(self, prompt: Prompt) -> int:
        """Bytes of the sharers' entries that the fusers read for one prompt."""
        total = 0
        for index, (sharer, fuser) in enumerate(zip(self._model.sharers, self._model.fusers, strict=True)):
            layers: Any = fuser.config.source_layers  # type: ignore[union-attr]
            per_pair = 2 * len(layers) * sharer.geometry.width * sharer.dtype.itemsize
            alignments = [chunk.alignments[index] for chunk in prompt.chunks]
            total += per_pair * sum(len(alignment) for alignment in alignments if alignment is not None)
        return total

    # -- private context -----------------------------------------------------------------------------------------------

    def private(self, jobs: Sequence[Job]) -> Batch | None:
        """Each by itself, since what is handed over differs in length; then joined."""
        batches: list[Batch] = []
        for job in jobs:
            if job.ticket.cancelled:  # while the sharers read for those before it
                continue
            with refusing(job):
                batches.append(self._with_private(job))
        return _joined(batches)

    def _with_private(self, job: Job) -> Batch:
        ask, receiver = ask_of(job), self._model.receiver
        fused = self._model.prefill([ask.prompt], sharer_messages=ask.private, options=options_of(ask))
        report = fused.report or FusionReport()
        one = with_room(job, receiver, fused.tokens.length, report.prompt_tokens)
        one.report, one.crossed = report, report.sharer_bytes
        one.fallback = next((note for note in report.notes if note.startswith(_LOST)), None)
        cache = receiver.prefill(fused.tokens, fused.tokens.length - 1, fused.cache)
        return Batch(receiver, [one], Prefilled(fused.tokens, cache))


def unfused(model: C2CModel, prompt_tokens: int, why: str, note: str) -> FusionReport:
    """The report of a prompt that the receiver answers alone although a sharer was to be asked."""
    return FusionReport(
        prompt_tokens=prompt_tokens,
        skipped_tokens={why: prompt_tokens},
        skipped_layers=dict.fromkeys(range(model.receiver.geometry.layers), why),
        trained=model.trained,
        notes=[*model.notes, note],
    )


def _joined(batches: Sequence[Batch]) -> Batch | None:
    """Batches for one model as one."""
    if not batches:
        return None
    prompted = [one for batch in batches for one in batch.prompted]
    return Batch(batches[0].model, prompted, join([batch.prefilled for batch in batches]))
