"""The cache-enrichment oracle: does a better cache of the same length help one model, before any fuser is trained?

Cache-to-Cache (ICLR 2026, arXiv:2510.03215) compares three prompts. Direct: the question. Few-shot: exemplars, then
the question. Oracle: exemplars and question are prefilled, and then the exemplars' entries are dropped, so that the
cache has the length of the question's, and its entries have read the exemplars. There: 58.42, 63.39 and 62.34 %.

The paper puts exemplars into one text; here each is a turn of the user and one of the assistant, in the model's
template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from c2c import kv_cache
from c2c.analysis.drawing import done, dots, panels
from c2c.analysis.inputs import check_items
from c2c.analysis.provenance import provenance
from c2c.analysis.record import check_output, publish
from c2c.analysis.scores import accuracies, difference
from c2c.analysis.settings import AnalysisError, check_limit, source
from c2c.data.formats import Row
from c2c.data.prompts import choice_tokens
from c2c.data.sources import load_rows, questions
from c2c.errors import CacheError
from c2c.language_model import LanguageModel
from c2c.messages import Conversation
from c2c.prompting import RenderOptions
from c2c.reporting.canvas import Plot
from c2c.rope import Rotary
from c2c.tokens import TokenBatch
from c2c.utils import OnProgress

NAME = "enrichment"
SYSTEMS = ("direct", "few_shot", "oracle")


@dataclass(frozen=True)
class EnrichmentSettings:
    """One oracle experiment on one model.

    Attributes:
        model: alias, hub id, folder or GGUF file.
        data: JSONL file of multiple-choice items.
        shots_data: JSONL file of the exemplars; questions that are in ``data`` are left out.
        shots: how many exemplars, the same for all items, drawn with the seed.
        limit: at most this many items, drawn with the seed; None for all.
        seed: of both draws and of the intervals.
        form: how questions are put: ``letter``, ``published`` or ``sentence``.
        output_dir: where the numbers and the plot go; None keeps no files.
        dtype: type of the model's weights.
        device_map: where the model goes.
    """

    model: str
    data: str
    shots_data: str
    shots: int = 5
    limit: int | None = 200
    seed: int = 0
    form: str = "letter"
    output_dir: str | None = None
    dtype: str | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        """Refuse impossible numbers.

        Raises:
            AnalysisError: fewer than two items, or a negative number of exemplars.
        """
        check_limit(self.limit)
        if self.shots < 0:
            raise AnalysisError(f"shots is {self.shots}; give 0 or more.")


@dataclass(frozen=True)
class Prompts:
    """An item without and with exemplars, in one model's tokens, each ``[1, tokens]``.

    Attributes:
        direct: the item alone.
        few_shot: exemplars before it.
        head: columns before the exemplars, which both prompts begin with.
    """

    direct: TokenBatch
    few_shot: TokenBatch
    head: int

    @property
    def exemplars(self) -> int:
        """Tokens of the exemplars."""
        return self.few_shot.length - self.direct.length


def measure_enrichment(settings: EnrichmentSettings, progress: OnProgress | None = None) -> dict[str, Any]:
    """Accuracy of one model asked directly, with exemplars, and from the enriched cache of the question's length.

    Args:
        settings: what to measure.
        progress: called with (stage, items done, items).

    Returns:
        ``systems``: ``direct``, ``few_shot`` and ``oracle``, each with ``accuracy`` (percent) and ``ci95``;
        ``oracle_gain`` and ``few_shot_gain`` over direct in ``points`` with ``ci95``; ``tokens``: mean prompt lengths
        of direct (and oracle) and few-shot; ``shots``, ``n``.

    Raises:
        AnalysisError: missing data, too few exemplars, options that share their first token, or a template that sets
            the question differently after other turns.
        CacheError: the model's keys can't be moved to other positions.
        ModelLoadError: no such model.
    """
    check_output(settings.output_dir)
    shots, rows = _rows(settings)
    model = LanguageModel.from_pretrained(settings.model, dtype=settings.dtype, device_map=settings.device_map)
    if settings.shots:
        model.check_rotary()
    right: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    lengths: dict[str, list[int]] = {"direct": [], "few_shot": []}
    dropped: Counter[str] = Counter()
    for index, row in enumerate(rows):
        prompts = read_prompts(model, row, shots)
        if model.context_length is not None and prompts.few_shot.length > model.context_length:
            dropped["prompt too long"] += 1
        else:
            for name, score in zip(SYSTEMS, _answers(model, row, prompts), strict=True):
                right[name].append(score)
            lengths["direct"].append(prompts.direct.length)
            lengths["few_shot"].append(prompts.few_shot.length)
        if progress is not None:
            progress("answering", index + 1, len(rows))
    check_items(len(right["direct"]), settings.data, dropped)
    numbers = {
        "n": len(right["direct"]),
        "shots": settings.shots,
        "systems": accuracies(right, settings.seed),
        "few_shot_gain": difference(right["few_shot"], right["direct"], settings.seed),
        "oracle_gain": difference(right["oracle"], right["direct"], settings.seed),
        "tokens": {name: round(sum(values) / len(values), 1) for name, values in lengths.items()},
        "dropped": dict(dropped),
        "provenance": provenance({"model": model.identity.to_dict()}, settings, [settings.data, settings.shots_data]),
    }
    return publish(NAME, numbers, lambda: _draw(numbers), settings.output_dir)


def read_prompts(model: LanguageModel, row: Row, shots: Sequence[Row]) -> Prompts:
    """An item as the model reads it, without and with exemplars before its last message.

    The question is what both prompts end with, token by token; what precedes it in the direct prompt (a system message,
    the template's opening) must be what the other begins with.

    Raises:
        AnalysisError: a template that sets the question differently after other turns.
        PromptError: a template that refuses the turns.
    """
    turns: Conversation = []
    for shot in shots:
        answer = {"role": "assistant", "content": shot.answer_prefix + shot.response}
        turns += [shot.messages[-1], answer]
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
            f"the chat template of {model.name} sets the question differently after other turns, so that it can't be "
            "told which entries are the exemplars'. Use a model with another template."
        )
    return Prompts(direct, few_shot, head)


@torch.no_grad()
def without_exemplars(model: LanguageModel, cache: Cache, head: int, exemplars: int) -> DynamicCache:
    """A cache without the entries of some columns; keys behind them are moved to the positions that they leave.

    Each key behind the gap loses the rotary embedding of its position in the long prompt and gets that of its position
    in the short one, so that the model reads the question where it would stand without exemplars. Nothing else of the
    entries changes; in particular they have attended to the exemplars. Without exemplars the cache stays as it is.

    Args:
        model: whose cache it is.
        cache: one row, ``tokens`` columns from position 0.
        head: columns before the gap.
        exemplars: columns of the gap.

    Returns:
        A cache of ``tokens - exemplars`` columns.

    Raises:
        CacheError: the gap is not inside the cache.
    """
    tokens = kv_cache.length(cache)
    if not 0 <= head <= head + exemplars <= tokens:
        raise CacheError(f"can't drop columns {head} to {head + exemplars} of a cache of {tokens} tokens.")
    if exemplars == 0:
        return kv_cache.from_layers(kv_cache.layers(cache))
    before = torch.arange(head + exemplars, tokens, device=model.device).unsqueeze(0)
    old, new = model.rotary(before), model.rotary(before - exemplars)

    def shorter(layer: int, keys: Tensor, values: Tensor) -> kv_cache.KeyValue:
        tail = keys[:, :, head + exemplars :]
        if old is not None and new is not None:
            tail = _moved(tail, old[layer], new[layer])
        kept = torch.cat([values[:, :, :head], values[:, :, head + exemplars :]], dim=2)
        return torch.cat([keys[:, :, :head], tail], dim=2), kept

    return kv_cache.from_layers(shorter(layer, *pair) for layer, pair in enumerate(kv_cache.layers(cache)))


def _moved(keys: Tensor, old: Rotary, new: Rotary) -> Tensor:
    """Keys with another rotation in place of their own, turned in float32."""
    there = Rotary(old.cos.to(keys.device), old.sin.to(keys.device))
    here = Rotary(new.cos.to(keys.device), new.sin.to(keys.device))
    return here.apply(there.undo(keys.float())).to(keys.dtype)


def _answers(model: LanguageModel, row: Row, prompts: Prompts) -> tuple[float, float, float]:
    """1 or 0 for direct, few-shot and oracle."""
    at, choices = choice_tokens(model.tokenizer, "", row.choices)
    if at > 0:
        raise AnalysisError(
            f"{model.name} spells the options {row.choices} with a common first token, so that its next token does not "
            "tell which it chooses."
        )
    direct, few_shot = prompts.direct, prompts.few_shot
    own = model.prefill(direct, direct.length - 1)
    full = model.prefill(few_shot, few_shot.length - 1)
    enriched = without_exemplars(model, full, prompts.head, prompts.exemplars)
    chosen = [
        int(model.next_logits(tokens, cache)[0, choices].argmax())
        for tokens, cache in ((direct, own), (few_shot, full), (direct, enriched))
    ]
    first, second, third = (float(choice == row.answer) for choice in chosen)
    return first, second, third


def _rows(settings: EnrichmentSettings) -> tuple[list[Row], list[Row]]:
    """Exemplars and items."""
    items = source(settings.data, settings.form, settings.limit)
    given = source(settings.shots_data, settings.form, settings.shots)
    rows, _ = load_rows([items], Path(), settings.seed)
    shots, _ = load_rows([given], Path(), settings.seed, questions([Path(items.name)]))
    if len(shots) < settings.shots:
        raise AnalysisError(
            f"{settings.shots_data} has {len(shots)} questions that are not in {settings.data}, and {settings.shots} "
            "exemplars are wanted: give another file (the train or dev split), or fewer --shots."
        )
    return shots, rows


def _draw(numbers: Mapping[str, Any]) -> Plot:
    systems = {name.replace("_", "-"): score for name, score in numbers["systems"].items()}
    figure, (axes,) = panels(["Accuracy of one model"], [90], left=84, right=48)
    dots(axes, systems, "matched")
    caption = (
        f"{numbers['n']} questions, dots with 95 % intervals. Few-shot: {numbers['shots']} exemplars before the "
        f"question ({numbers['tokens']['few_shot']:.0f} tokens). Oracle: the same, then the exemplars' entries are "
        f"dropped, so that the cache is as long as that of direct ({numbers['tokens']['direct']:.0f})."
    )
    return done(NAME, "Cache enrichment", caption, figure)
