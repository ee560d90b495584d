"""What the sharer generates for examples before training, kept beside its prefills: drafts and soft targets.

A sharer that reads the question too drafts an answer, and hands over its cache of that as well: the counterpart of
``draft_tokens`` at inference.

Soft targets are the sharer's own answers to multiple choice, beside the right ones. A weak sharer is often wrong, and
the right answers alone then teach a fuser little about what is in its cache, while its own answer is a function of
that cache. Small models prefer some letters whatever the question; so log-probabilities of the options are centred
over all questions with as many options (the correction of Zhao et al., 2021, arXiv:2102.09690, with the training
questions as reference), and scaled to unit deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from transformers import Cache

from c2c.config import ConfigError
from c2c.data.prompts import choice_tokens
from c2c.handoff import SharerPrompt
from c2c.prompting import RenderOptions
from c2c.sharer import Sharer
from c2c.tokens import TokenBatch, left_pad, natural_positions
from c2c.training.examples import Example
from c2c.training.prefill_store import PrefillStore, PromptRecords, stack
from c2c.utils import OnProgress


def with_drafts(
    examples: Sequence[Example], sharer: Sharer, store: PrefillStore, progress: OnProgress | None = None
) -> list[Example]:
    """Append drafts to what the sharer hands over, in the examples of private context whose rows have a ``draft``."""
    drafted = {index: example for index, example in enumerate(examples) if example.row.draft}
    prompts = [example.sharer_ids for example in drafted.values()]
    limits = [example.row.draft for example in drafted.values()]
    found = PromptRecords(store, "drafts").get(
        prompts,
        limits,
        lambda part: generate_drafts([prompts[i] for i in part], [limits[i] for i in part], sharer, store),
        None if progress is None else partial(progress, "sharer's drafts"),
    )
    result = list(examples)
    for (index, example), draft in zip(drafted.items(), found, strict=True):
        handed_over = SharerPrompt(example.sharer_ids, example.kept).followed_by(draft)
        result[index] = replace(example, sharer_ids=handed_over.ids, kept=handed_over.kept)
    return result


@torch.no_grad()
def generate_drafts(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], sharer: Sharer, store: PrefillStore
) -> list[list[int]]:
    """Continue prompts greedily, each by its limit of tokens at most, up to and with the token that ends a turn.

    The cache of prompts and drafts is put into the store.
    """
    tokens = left_pad(prompts, 0)
    cache = sharer.prefill(tokens, tokens.length - 1)
    new = sharer.generate(tokens, cache, max_new_tokens=max(limits), do_sample=False).to(tokens.ids.device)
    mask = torch.cat([tokens.mask, torch.ones_like(new, dtype=torch.bool)], dim=1)
    read = TokenBatch(torch.cat([tokens.ids, new], dim=1), mask, natural_positions(mask), tokens.padded)
    cache = sharer.prefill(read, cache=cache)  # the last token is not in it yet; behind an end stands padding
    drafts = []
    for ids, limit in zip(new.tolist(), limits, strict=True):
        end = next((place for place, token in enumerate(ids) if token in sharer.ends), len(ids))
        drafts.append(ids[: min(end + 1, limit)])
    whole = [[*prompt, *draft] for prompt, draft in zip(prompts, drafts, strict=True)]
    store.put(whole, cache, [tokens.length - len(prompt) for prompt in prompts])
    return drafts


def with_soft_targets(
    examples: Sequence[Example],
    sharer: Sharer,
    store: PrefillStore,
    temperature: float,
    progress: OnProgress | None = None,
) -> list[Example]:
    """Add the sharer's probability of each option to the examples of multiple choice.

    Scores are kept beside the prefills of ``store``. A lower ``temperature`` makes targets sharper.
    """
    chosen = {index: example for index, example in enumerate(examples) if example.choice_ids}
    prompts: list[list[int]] = []
    for example in chosen.values():
        options = RenderOptions(answer_prefix=example.row.answer_prefix + example.row.lead)
        prompts.append(sharer.encode([example.row.messages], options).ids[0].tolist())
    choices = [example.row.choices for example in chosen.values()]
    found = PromptRecords(store, "answers").get(
        prompts,
        choices,
        lambda part: _score(sharer, store, [prompts[i] for i in part], [choices[i] for i in part]),
        None if progress is None else partial(progress, "sharer's answers"),
    )
    scores = dict(zip(chosen, map(torch.tensor, found), strict=True))
    result = list(examples)
    for count in {len(score) for score in found}:
        group = [index for index, score in scores.items() if len(score) == count]
        table = torch.stack([scores[index] for index in group])
        centred = table - table.mean(0)
        deviation = centred.std().clamp_min(1e-6) if len(group) > 1 else 1.0
        for index, row in zip(group, (centred / deviation / temperature).softmax(-1).tolist(), strict=True):
            result[index] = replace(examples[index], soft_target=tuple(row))
    return result


@torch.no_grad()
def _score(
    sharer: Sharer, store: PrefillStore, prompts: list[list[int]], choices: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Score the options of each question: log-probabilities, to five digits."""
    spelled = [choice_tokens(sharer.tokenizer, "", options) for options in choices]
    if any(at > 0 for at, _ in spelled):
        raise ConfigError(
            f"soft_targets: the sharer {sharer.name} spells the options {list(choices[0])} with a common first token, "
            "so that its next token does not tell them apart."
        )
    tokens, layers = left_pad(prompts, 0), sharer.geometry.layers
    if store.kept == list(range(layers)) and all(ids in store for ids in prompts):
        entries = [entry.first(len(ids) - 1) for ids, entry in zip(prompts, store.get(prompts), strict=True)]
        cache: Cache = stack(entries, layers, sharer.dtype, sharer.device)
    else:
        cache = sharer.prefill(tokens, tokens.length - 1)
    logits = sharer.next_logits(tokens, cache)
    rows = [scores[options].float().log_softmax(-1) for scores, (_, options) in zip(logits, spelled, strict=True)]
    return [[round(float(value), 5) for value in row] for row in rows]
