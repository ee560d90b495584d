"""Soft targets: what the sharer itself would answer to multiple-choice questions, as a target beside the right answer.

A weak sharer is often wrong, and the right answers alone then teach a fuser little about what crosses: its own leaning
is a function of its cache. Small models lean towards some letters whatever is asked; so log-probabilities of the
options are centred over all questions with as many options (the correction of Zhao et al., 2021, arXiv:2102.09690,
with the training questions as reference), and brought to unit spread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache

from c2c import kv
from c2c.files import write_text
from c2c.progress import OnProgress
from c2c.prompting import RenderOptions
from c2c.tokens import left_pad
from c2c.training.config import ConfigError
from c2c.training.examples import Example, choice_tokens
from c2c.training.objective import Objective
from c2c.training.store import stack

_SAVE_EVERY = 100  # prompts


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
    notes = _Notes(training)
    scores: dict[int, Tensor] = {}
    for done, index in enumerate(asked, 1):
        scores[index] = notes.scores(examples[index])
        if progress is not None:
            progress("sharer's answers", done, len(asked))
    notes.save()
    beliefs: dict[int, tuple[float, ...]] = {}
    for options in {len(score) for score in scores.values()}:
        group = [index for index in asked if len(scores[index]) == options]
        table = torch.stack([scores[index] for index in group])
        centred = table - table.mean(0)
        spread = centred.std().clamp_min(1e-6) if len(group) > 1 else 1.0
        for index, row in zip(group, (centred / spread / temperature).softmax(-1).tolist(), strict=True):
            beliefs[index] = tuple(row)
    return [replace(example, beliefs=beliefs.get(index)) for index, example in enumerate(examples)]


class _Notes:
    """Log-probabilities of options, computed once per prompt and kept beside the sharer's prefills."""

    def __init__(self, training: Objective) -> None:
        self.store, self.sharer = training.sharer_store, training.model.sharers[0]
        self.path = None if self.store.folder is None else Path(self.store.folder) / "answers.json"
        read = self.path is not None and self.path.exists()
        self._known: dict[str, list[float]] = json.loads(self.path.read_text()) if read and self.path else {}
        self._new = 0

    def scores(self, example: Example) -> Tensor:
        """Log-probability of each option among the options, by the sharer alone, ``[options]``."""
        row = example.row
        tokens = self.sharer.encode([row.messages], RenderOptions(answer_prefix=row.answer_prefix + row.lead))
        ids = tokens.ids[0].tolist()
        name = hashlib.sha256(json.dumps([self.store.key(ids), row.choices]).encode()).hexdigest()
        if name not in self._known:
            self._known[name] = self._compute(ids, row.choices)
            self._new += 1
            if self._new % _SAVE_EVERY == 0:
                self.save()
        return torch.tensor(self._known[name])

    def save(self) -> None:
        """Write what is known."""
        if self.path is not None and self._new:
            write_text(self.path, json.dumps(self._known))

    @torch.no_grad()
    def _compute(self, ids: list[int], choices: Sequence[str]) -> list[float]:
        at, options = choice_tokens(self.sharer.tokenizer, "", choices)
        if at > 0:
            raise ConfigError(
                f"soft_targets: the sharer {self.sharer.name} spells the options {list(choices)} with a common first "
                "token, so that its next token does not tell what it believes."
            )
        tokens = left_pad([ids], 0)
        whole = self.store.kept == list(range(self.sharer.geometry.layers))
        if whole and ids in self.store:
            [entry] = self.store.get([ids])
            cache: Cache = stack(
                [entry.first(len(ids) - 1)], len(self.store.kept), self.sharer.dtype, self.sharer.device
            )
        else:
            cache = self.sharer.prefill(tokens, len(ids) - 1, kv.empty_cache())
        logits = self.sharer.next_logits(tokens, cache)[0, options]
        return [round(float(value), 5) for value in logits.float().log_softmax(-1)]
