"""Soft targets: what the sharer itself would answer to multiple-choice questions, as a target beside the right answer.

A weak sharer is often wrong, and the right answers alone then teach a fuser little about what crosses: its own leaning
is a function of its cache. Small models lean towards some letters whatever is asked; so log-probabilities of the
options are centred over all questions with as many options (the correction of Zhao et al., 2021, arXiv:2102.09690,
with the training questions as reference), and brought to unit spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Cache

from c2c.prompting import RenderOptions
from c2c.tokens import TokenBatch, left_pad
from c2c.training.config import ConfigError
from c2c.training.examples import Example, choice_tokens
from c2c.training.notes import Notes
from c2c.training.objective import Objective
from c2c.training.store import stack
from c2c.utils import OnProgress

_BATCH = 16  # prompts at a time


def with_beliefs(
    examples: Sequence[Example], training: Objective, temperature: float, progress: OnProgress | None = None
) -> list[Example]:
    """The examples, those of multiple choice with the sharer's belief about each option.

    Args:
        examples: the training examples.
        training: the pair with its stores; what the sharer thinks is kept beside its prefills, if these are on disk.
        temperature: below 1 beliefs are sharper.
        progress: called with (stage, done, total).
    """
    asked = [index for index, example in enumerate(examples) if example.choice_ids]
    found = _Beliefs(training).scores([examples[index] for index in asked], progress)
    scores = dict(zip(asked, found, strict=True))
    beliefs: dict[int, tuple[float, ...]] = {}
    for options in {len(score) for score in scores.values()}:
        group = [index for index in asked if len(scores[index]) == options]
        table = torch.stack([scores[index] for index in group])
        centred = table - table.mean(0)
        spread = centred.std().clamp_min(1e-6) if len(group) > 1 else 1.0
        for index, row in zip(group, (centred / spread / temperature).softmax(-1).tolist(), strict=True):
            beliefs[index] = tuple(row)
    return [replace(example, beliefs=beliefs.get(index)) for index, example in enumerate(examples)]


class _Beliefs:
    """Log-probabilities of options, computed once per prompt and kept beside the sharer's prefills."""

    def __init__(self, training: Objective) -> None:
        self.store, self.sharer = training.sharer_store, training.model.sharers[0]
        self.notes = Notes(self.store, "answers")

    def scores(self, examples: Sequence[Example], progress: OnProgress | None = None) -> list[Tensor]:
        """Log-probability of each option among the options, by the sharer alone, ``[options]`` per example."""
        prompts = [self._prompt(example) for example in examples]
        names = [self.notes.name(ids, e.row.choices) for ids, e in zip(prompts, examples, strict=True)]
        missing = [index for index, name in enumerate(names) if name not in self.notes]
        missing.sort(key=lambda index: len(prompts[index]))  # little padding
        for start in range(0, len(missing), _BATCH):
            part = missing[start : start + _BATCH]
            made = self._compute([prompts[i] for i in part], [examples[i].row.choices for i in part])
            self.notes.add({names[index]: scores for index, scores in zip(part, made, strict=True)})
            if progress is not None:
                progress("sharer's answers", start + len(part), len(missing))
        return [torch.tensor(self.notes[name]) for name in names]

    def _prompt(self, example: Example) -> list[int]:
        row = example.row
        options = RenderOptions(answer_prefix=row.answer_prefix + row.lead)
        ids: list[int] = self.sharer.encode([row.messages], options).ids[0].tolist()
        return ids

    @torch.no_grad()
    def _compute(self, prompts: list[list[int]], choices: Sequence[Sequence[str]]) -> list[list[float]]:
        spelled = [choice_tokens(self.sharer.tokenizer, "", options) for options in choices]
        if any(at > 0 for at, _ in spelled):
            raise ConfigError(
                f"soft_targets: the sharer {self.sharer.name} spells the options {list(choices[0])} with a common "
                "first token, so that its next token does not tell what it believes."
            )
        tokens = left_pad(prompts, 0)
        logits = self.sharer.next_logits(tokens, self._cache(prompts, tokens))
        rows = [scores[options].float().log_softmax(-1) for scores, (_, options) in zip(logits, spelled, strict=True)]
        return [[round(float(value), 5) for value in row] for row in rows]

    def _cache(self, prompts: list[list[int]], tokens: TokenBatch) -> Cache:
        """All but the last token of each prompt, from the store where it has all of them with all layers."""
        layers = self.sharer.geometry.layers
        if self.store.kept == list(range(layers)) and all(ids in self.store for ids in prompts):
            kept = self.store.get(prompts)
            entries = [entry.first(len(ids) - 1) for ids, entry in zip(prompts, kept, strict=True)]
            return stack(entries, layers, self.sharer.dtype, self.sharer.device)
        return self.sharer.prefill(tokens, tokens.length - 1)
