"""Variants of one model: how near two models' caches are, and whether one can take the other's entries as they are.

A variant has the same structure, tokenizer and rotation, and other weights: a fine-tune, or another LoRA adapter. Both
models read a probe passage. What counts is how far the receiver's next-token distributions move when it answers from
the sharer's entries; errors of keys and values say in which layers they differ, and predict that badly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from c2c import kv_cache
from c2c.errors import CacheError, MismatchError
from c2c.handoff import passage_prompt
from c2c.identity import differences
from c2c.kv_cache import KeyValue
from c2c.language_model import LanguageModel
from c2c.prefill import logits_after
from c2c.prompting import RenderOptions, with_passage
from c2c.recompute import LayerRange, check_layerwise, prefill_with_hidden, recompute_layers
from c2c.tokens import TokenBatch, left_pad

PASSAGE = (
    "The harbour of Tarn was built between 1871 and 1884 by the engineer Ida Moreau, after two storms had destroyed "
    "the old pier. Its breakwater is 640 metres long and was paid for by a tax on herring. Most of the stone came by "
    "barge from the quarries at Holm. In 1912 a lighthouse was added at the northern end; its lamp could be seen from "
    "17 miles away. The harbour closed to cargo in 1969, when the railway to the coast was given up, and reopened in "
    "1990 as a museum, which about forty thousand people visit every year."
)
QUESTIONS = (
    "Who built the harbour?",
    "How was the breakwater paid for?",
    "When did the harbour close to cargo?",
    "Summarise the passage in one sentence.",
)
COPY_LIMIT = 0.05  # nats per token, chosen on dev rows: docs/results/variants.md
_FLOOR = 1e-12


@dataclass(frozen=True)
class Divergence:
    """How far answers from copied entries are from those of a receiver that has read the text.

    Attributes:
        kl: mean Kullback-Leibler divergence of its next-token distributions, in nats per token.
        agreement: share of tokens of its own greedy answers that are still the likeliest, 0 to 1.
    """

    kl: float
    agreement: float


@dataclass(frozen=True)
class LayerDistance:
    """How far the sharer's entries are from the receiver's in one layer.

    Attributes:
        layer: its number.
        keys: error of keys without rotation, relative to how much the receiver's differ between tokens.
        values: the same of values.
        kl: divergence in nats per token where this layer alone is copied.
    """

    layer: int
    keys: float
    values: float
    kl: float


@dataclass(frozen=True)
class VariantReport:
    """What was measured on the probe.

    Attributes:
        copy: where all layers are copied.
        layers: each layer by itself.
        recomputed: where the receiver recomputes layers ``(first, stop)`` and takes the others as they are.
    """

    copy: Divergence
    layers: list[LayerDistance] = field(repr=False)
    recomputed: dict[LayerRange, Divergence] = field(default_factory=dict)

    @property
    def range(self) -> LayerRange | None:
        """The fewest layers to recompute that bring the divergence under the limit; None if none do."""
        enough = [layers for layers, found in self.recomputed.items() if found.kl <= COPY_LIMIT]
        return min(enough, key=lambda layers: (layers[1] - layers[0], layers[0]), default=None)

    @property
    def decision(self) -> str:
        """``copy``, ``recompute`` (layers :attr:`range`) or ``none``: read the text, or train from the copy."""
        if self.copy.kl <= COPY_LIMIT:
            return "copy"
        return "recompute" if self.range is not None else "none"

    @property
    def reason(self) -> str:
        """The decision in words."""
        moved = f"copied entries move its next tokens by {self.copy.kl:.3f} nats ({self.copy.agreement:.0%} stay)"
        if self.decision == "copy":
            return f"{moved}, within {COPY_LIMIT:g}: copy."
        if self.range is not None:
            first, stop = self.range
            found = self.recomputed[self.range]
            return (
                f"{moved}, over {COPY_LIMIT:g}; with layers {first} to {stop - 1} recomputed by {found.kl:.3f} "
                f"({found.agreement:.0%} stay): copy, recompute=({first}, {stop})."
            )
        return f"{moved}, over {COPY_LIMIT:g}, whichever layers are recomputed: hand over text, or train a fuser."

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "copy": asdict(self.copy),
            "recomputed": {f"{first}-{stop}": asdict(found) for (first, stop), found in self.recomputed.items()},
            "layers": [asdict(layer) for layer in self.layers],
            "decision": self.decision,
            "range": self.range,
            "reason": self.reason,
        }

    def table(self) -> list[list[str]]:
        """Return rows of words for people: what is copied, nats per token, share of tokens that stay."""
        count = len(self.layers)
        rows = [["all layers copied", f"{self.copy.kl:.3f}", f"{self.copy.agreement:.0%}"]]
        for (first, stop), found in self.recomputed.items():
            rows.append([f"{first} to {stop - 1} of {count} recomputed", f"{found.kl:.3f}", f"{found.agreement:.0%}"])
        return rows


def check_variant(receiver: LanguageModel, sharer: LanguageModel) -> None:
    """Make sure that two models differ in their weights at most.

    Raises:
        MismatchError: another cache geometry, rotation, architecture or tokenizer; lists every difference.
    """
    hard, soft = differences("sharer", receiver.identity, sharer.identity, "receiver")
    other = hard + [line for line in soft if line.startswith("sharer tokenizer")]
    if other:
        raise MismatchError(other, "They are no variants of one model: hand over text, or train a fuser.", "receiver")


@torch.no_grad()
def compare(
    receiver: LanguageModel,
    sharer: LanguageModel,
    *,
    passage: str = PASSAGE,
    questions: Sequence[str] = QUESTIONS,
    ranges: Sequence[LayerRange] | None = None,
    answer_tokens: int = 16,
) -> VariantReport:
    """Measure on a probe what a receiver loses that takes a variant's entries.

    Args:
        receiver: who answers.
        sharer: who has read.
        passage: what is read.
        questions: what is asked about it; the receiver answers greedily from the text, and these tokens are scored.
        ranges: layers to try to recompute; by default the lower quarter, half and three quarters, where the model's
            layers can be run one by one.
        answer_tokens: per question.

    Raises:
        MismatchError: they are no variants of one model.
    """
    check_variant(receiver, sharer)
    probe = _Probe(receiver, sharer, passage, questions, answer_tokens)
    count = receiver.geometry.layers
    if ranges is None:
        ranges = _default_ranges(receiver)
    recomputed = {layers: probe.divergence(probe.recomputed(layers)) for layers in ranges}
    layers = [
        LayerDistance(index, *probe.errors(index), probe.divergence(probe.mixed({index}), 1).kl)
        for index in range(count)
    ]
    return VariantReport(probe.divergence(probe.theirs), layers, recomputed)


def _default_ranges(receiver: LanguageModel) -> list[LayerRange]:
    count = receiver.geometry.layers
    try:
        check_layerwise(receiver)
    except CacheError:
        return []
    stops = sorted({count * part // 4 for part in (1, 2, 3)} - {0})
    return [(0, stop) for stop in stops]


class _Probe:
    """A passage that both models have read, and answers of the receiver to score its entries with."""

    def __init__(
        self, receiver: LanguageModel, sharer: LanguageModel, passage: str, questions: Sequence[str], tokens: int
    ) -> None:
        self.receiver, self.sharer, options = receiver, sharer, RenderOptions()
        plan = passage_prompt(receiver.tokenizer, passage, "", options)
        self.column, self.ids = plan.kept[0], plan.ids
        self.read = left_pad([plan.ids], 0)
        self.before = receiver.prefill(self.read, self.column)
        self.own = self._document(receiver.prefill(self.read, cache=kv_cache.view(self.before)))
        # in the same two parts, so that equal weights give equal bits
        self.theirs = self._document(sharer.prefill(self.read, cache=sharer.prefill(self.read, self.column)))
        self.answers = [self._answer(passage, question, tokens, options) for question in questions]
        self.expected = [self._logits(self.own, answer) for answer in self.answers]

    def _document(self, cache: Cache) -> list[KeyValue]:
        return [
            (keys[:, :, self.column :].to(self.receiver.device), values[:, :, self.column :].to(self.receiver.device))
            for keys, values in kv_cache.layers(cache)
        ]

    def _answer(self, passage: str, question: str, tokens: int, options: RenderOptions) -> tuple[TokenBatch, int]:
        """Return the prompt with the receiver's answer, and where that begins."""
        asked = with_passage([{"role": "user", "content": question}], passage, options=options)
        prompt = self.receiver.encode(asked, options)
        cache = self.receiver.prefill(prompt, prompt.length - 1)
        new = self.receiver.generate(prompt, cache, max_new_tokens=tokens, do_sample=False)[0].tolist()
        return left_pad([[*prompt.ids[0].tolist(), *new]], 0), prompt.length

    def _logits(self, document: list[KeyValue], answer: tuple[TokenBatch, int]) -> Tensor:
        """Return log probabilities after the last prompt token and each token of the answer but the last."""
        tokens, start = answer[0].to(self.receiver.device), answer[1]
        cache, held = kv_cache.append(kv_cache.view(self.before), document), len(self.ids)
        new, positions = tokens.ids[:, held:-1], tokens.positions[:, held:-1]
        logits = logits_after(self.receiver.model, new, None, positions, cache, keep=tokens.length - start)
        return logits[0].float().log_softmax(-1)

    def divergence(self, document: list[KeyValue], answers: int | None = None) -> Divergence:
        """Compare answers from these entries with those from the receiver's own."""
        divergences, kept = [], []
        for answer, expected in list(zip(self.answers, self.expected, strict=True))[:answers]:
            found = self._logits(document, answer)
            divergences.append((expected.exp() * (expected - found)).sum(-1))
            kept.append(expected.argmax(-1) == found.argmax(-1))
        return Divergence(float(torch.cat(divergences).mean().clamp_min(0)), float(torch.cat(kept).float().mean()))

    def mixed(self, copied: set[int]) -> list[KeyValue]:
        """Return the sharer's entries in some layers and the receiver's own in the others."""
        return [
            theirs if i in copied else own for i, (own, theirs) in enumerate(zip(self.own, self.theirs, strict=True))
        ]

    def recomputed(self, layers: LayerRange) -> list[KeyValue]:
        """Return the sharer's entries with some layers recomputed."""
        made, (first, stop), column, hidden = list(self.theirs), layers, self.column, None
        if first:
            hidden = prefill_with_hidden(self.sharer, self.read, first)[1][:, column:]
        made[first:stop] = recompute_layers(
            self.receiver, self.read, column, self.read.ids[0, column:], layers, self.before, hidden
        )
        return made

    def errors(self, index: int) -> tuple[float, float]:
        """Return the relative errors of keys without rotation and of values in one layer."""
        (keys, values), (their_keys, their_values) = self.own[index], self.theirs[index]
        tables = self.receiver.rotary(self.read.positions[:, self.column :].to(self.receiver.device))
        if tables is not None:
            keys, their_keys = (tables[index].undo(key.float()) for key in (keys, their_keys))
        return _relative(keys, their_keys), _relative(values, their_values)


def _relative(own: Tensor, theirs: Tensor) -> float:
    """Divide an error by how much the entries differ between tokens: large biases are the same in all of them."""
    own, theirs = own.float(), theirs.float()
    spread = (own - own.mean(2, keepdim=True)).norm().clamp_min(_FLOOR)
    return float((theirs - own).norm() / spread)
