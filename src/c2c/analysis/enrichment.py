"""The cache-enrichment oracle: does a better cache of the same length help one model, before any fuser is trained?

Cache-to-Cache (ICLR 2026, arXiv:2510.03215) compares three prompts. Direct: the question. Few-shot: exemplars, then
the question. Oracle: exemplars and question are prefilled, then the exemplars' entries are dropped, so that the cache
has the length of the question's, and its entries have attended to the exemplars. The paper puts exemplars into one
text; here each is a turn of the user and one of the assistant, in the model's template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import Cache, DynamicCache

from c2c import kv_cache
from c2c.analysis.config import AnalysisError, EnrichmentConfig
from c2c.analysis.experiment import analysis, check_items, difference, load_items, provenance
from c2c.data.formats import Row
from c2c.data.prompts import choice_tokens
from c2c.data.sources import questions
from c2c.errors import CacheError
from c2c.evaluation.statistics import summarise
from c2c.language_model import LanguageModel
from c2c.messages import Conversation
from c2c.prompting import RenderOptions
from c2c.tokens import TokenBatch
from c2c.utils import OnProgress

SYSTEMS = ("direct", "few_shot", "oracle")


@analysis("enrichment")
def measure_enrichment(config: EnrichmentConfig, progress: OnProgress | None = None) -> dict[str, Any]:
    """Measure the accuracy of one model asked directly, with exemplars, and from the enriched cache.

    Returns:
        ``systems``: ``direct``, ``few_shot`` and ``oracle``, each with ``accuracy`` (percent) and ``ci95``;
        ``oracle_gain`` and ``few_shot_gain`` over direct in ``points`` with ``ci95``; ``tokens``: mean prompt lengths
        of direct (and oracle) and few-shot; ``shots``, ``n``, ``dropped``.

    Raises:
        AnalysisError: missing data, too few exemplars, options that share their first token, or a template that
            renders the question differently after other turns.
        CacheError: the model's keys can't be moved to other positions.
    """
    rows = load_items(config.data, config.form, config.limit, config.seed)
    used = questions([Path(config.data).expanduser()])
    shots = load_items(config.shots_data, config.form, config.shots, config.seed, used)
    if len(shots) < config.shots:
        raise AnalysisError(
            f"{config.shots_data} has {len(shots)} questions that are not in {config.data}, and {config.shots} "
            "exemplars are wanted: give another file (the train or dev split), or fewer --shots."
        )
    model = LanguageModel.from_pretrained(config.model, dtype=config.dtype, device_map=config.device_map)
    if config.shots:
        model.check_rotary()
    answers: list[tuple[float, ...]] = []
    lengths: list[tuple[int, int]] = []
    dropped: Counter[str] = Counter()
    for index, row in enumerate(rows):
        direct, few_shot, head = encode_prompts(model, row, shots)
        if model.context_length is not None and few_shot.length > model.context_length:
            dropped["prompt too long"] += 1
        else:
            answers.append(_answer(model, row, direct, few_shot, head))
            lengths.append((direct.length, few_shot.length))
        if progress is not None:
            progress("answering", index + 1, len(rows))
    check_items(len(answers), config.data, dropped)
    scores = dict(zip(SYSTEMS, zip(*answers, strict=True), strict=True))
    return {
        "n": len(answers),
        "shots": config.shots,
        "systems": summarise(scores, config.seed)["systems"],
        **{f"{name}_gain": difference(scores[name], scores["direct"], config.seed) for name in SYSTEMS[1:]},
        "tokens": {name: round(fmean(x), 1) for name, x in zip(SYSTEMS, zip(*lengths, strict=True), strict=False)},
        "dropped": dict(dropped),
        "provenance": provenance({"model": model.identity.to_dict()}, asdict(config), [config.data, config.shots_data]),
    }


def encode_prompts(model: LanguageModel, row: Row, shots: Sequence[Row]) -> tuple[TokenBatch, TokenBatch, int]:
    """Encode an item without and with exemplars before its last message, each ``[1, tokens]``.

    The question is what both prompts end with, token by token; what precedes it in the direct prompt (a system message,
    the template's opening) must be what the other begins with.

    Returns:
        The prompt without and with exemplars, and the columns before the exemplars.

    Raises:
        AnalysisError: a template that renders the question differently after other turns.
        PromptError: a template that refuses the turns.
    """
    turns: Conversation = []
    for shot in shots:
        turns += [shot.messages[-1], {"role": "assistant", "content": shot.answer_prefix + shot.response}]
    options = RenderOptions(answer_prefix=row.answer_prefix + row.lead)
    direct = model.encode(row.messages, options)
    few_shot = model.encode([*row.messages[:-1], *turns, row.messages[-1]], options)
    ours, theirs = direct.ids[0].tolist(), few_shot.ids[0].tolist()
    shared = 0
    while shared < len(ours) and ours[-1 - shared] == theirs[-1 - shared]:
        shared += 1
    head = len(ours) - shared
    if shared == 0 or ours[:head] != theirs[:head]:
        raise AnalysisError(
            f"the chat template of {model.name} renders the question differently after other turns, so that the "
            "exemplars' entries can't be found. Use a model with another template."
        )
    return direct, few_shot, head


@torch.no_grad()
def drop_columns(model: LanguageModel, cache: Cache, start: int, count: int) -> DynamicCache:
    """Drop ``count`` columns of one row's cache from ``start``, and move the keys behind them to the free positions.

    Each key behind the gap loses the rotary embedding of its position in the long prompt and gets that of its position
    in the short one. Nothing else of the entries changes; in particular they have attended to what is dropped.

    Raises:
        CacheError: the gap is not inside the cache.
    """
    tokens, stop = kv_cache.length(cache), start + count
    if not 0 <= start <= stop <= tokens:
        raise CacheError(f"can't drop columns {start} to {stop} of a cache of {tokens} tokens.")
    if count == 0:
        return kv_cache.view(cache)
    before = torch.arange(stop, tokens, device=model.device).unsqueeze(0)
    old, new = model.rotary(before), model.rotary(before - count)
    layers = []
    for layer, (keys, values) in enumerate(kv_cache.layers(cache)):
        tail = keys[:, :, stop:]
        if old is not None and new is not None:
            pair, device = (old[layer], new[layer]), keys.device
            there, here = (replace(x, cos=x.cos.to(device), sin=x.sin.to(device)) for x in pair)
            tail = here.apply(there.undo(tail.float())).to(keys.dtype)
        kept = torch.cat([values[:, :, :start], values[:, :, stop:]], dim=2)
        layers.append((torch.cat([keys[:, :, :start], tail], dim=2), kept))
    return kv_cache.from_layers(layers)


def _answer(model: LanguageModel, row: Row, direct: TokenBatch, few_shot: TokenBatch, head: int) -> tuple[float, ...]:
    """Return 1 for a right answer, else 0, of each of SYSTEMS."""
    at, choices = choice_tokens(model.tokenizer, "", row.choices)
    if at > 0:
        raise AnalysisError(
            f"the options {row.choices} share their first token in the vocabulary of {model.name}, so that its next "
            "token does not decide between them."
        )
    full = model.prefill(few_shot, few_shot.length - 1)
    enriched = drop_columns(model, full, head, few_shot.length - direct.length)
    caches = ((direct, model.prefill(direct, direct.length - 1)), (few_shot, full), (direct, enriched))
    logits = (model.next_logits(tokens, cache)[0, choices] for tokens, cache in caches)
    return tuple(float(int(found.argmax()) == row.answer) for found in logits)
