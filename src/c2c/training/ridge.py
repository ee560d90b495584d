"""Fitting the linear fuser: weighted ridge regression per layer, in closed form.

Over all aligned pairs of the prompts, and for every fused layer apart, it minimises ``sum_i w_i |y_i - x_i W - b|^2``
plus the ridge, where ``x`` is the sharer's entry and ``y`` the receiver's (keys without rotation, then values). Only
sums of products are kept, so that memory does not grow with the data. Ridge maps between caches are from Heo et al.
(2026, arXiv:2608.03893), weights by attention from CacheBridge (2026, arXiv:2609.00891); both have the map take the
place of the receiver's prefill, while here it is blended into it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from c2c import kv_cache
from c2c.errors import FuserError
from c2c.fusers.linear import LinearFuser, channels
from c2c.fusion import Picker, Source, aligned_entries
from c2c.model import C2CModel
from c2c.training.examples import Example
from c2c.training.step import Batch, FuserTraining
from c2c.utils import OnProgress

Weighting = Literal["none", "attention"]
BLENDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Batches:
    """Batches of examples, collated one at a time while they are read.

    Attributes:
        training: fetches the caches.
        examples: the examples.
        size: examples per batch.
    """

    training: FuserTraining
    examples: Sequence[Example]
    size: int

    def __len__(self) -> int:
        return math.ceil(len(self.examples) / self.size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.examples), self.size):
            yield self.training.collate(self.examples[start : start + self.size])


@dataclass(frozen=True)
class AffineMap:
    """``y = bias + (x - mean) weight``, in float64.

    Attributes:
        weight: ``[layers, inputs, outputs]``.
        mean: ``[layers, 1, inputs]``.
        bias: ``[layers, 1, outputs]``.
    """

    weight: Tensor
    mean: Tensor
    bias: Tensor


class NormalEquations:
    """Weighted sums of products over all pairs, per layer, in float64: entries are large beside their variation.

    Attributes:
        pairs: pairs seen.
    """

    def __init__(self) -> None:
        self.pairs = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add pairs.

        Args:
            x: ``[layers, pairs, inputs]``.
            y: ``[layers, pairs, outputs]``.
            weight: what each pair counts, ``[layers, pairs]``; 1 by default.
        """
        x, y = _double(x), _double(y)
        w = x.new_ones(x.shape[:2]) if weight is None else _double(weight).to(x.device)
        weighted = (x * w.unsqueeze(-1)).transpose(1, 2)
        total = w.sum(1)[:, None, None]
        new = [total, weighted.sum(2).unsqueeze(1), w.unsqueeze(1) @ y, weighted @ x, weighted @ y]
        self._sums = [old + add for old, add in zip(self._sums, new, strict=True)] if self._sums else new
        self.pairs += x.shape[1]

    def solve(self, ridge: float) -> AffineMap:
        """Solve for the map.

        Args:
            ridge: penalty, relative to each input channel's variance: channels are brought to unit variance first,
                so that keys, which are large in many models, do not leave values without a say.

        Raises:
            FuserError: fewer than two pairs, no weight in some layer, or singular equations.
        """
        if self.pairs < 2:
            raise FuserError(
                f"a linear fuser can't be fitted to {self.pairs} aligned pairs: at least 2 are needed, and a few "
                "thousand to be of use. Give more, or longer, examples."
            )
        total, sum_x, sum_y, xx, xy = self._sums
        if not bool((total > 0).all()):
            layers = (total.flatten() <= 0).nonzero().flatten().tolist()
            raise FuserError(f"all pairs have weight 0 in fused layers {layers}: use weight='none'.")
        mean, bias = sum_x / total, sum_y / total
        covariance = xx / total - mean.transpose(1, 2) @ mean
        cross = xy / total - mean.transpose(1, 2) @ bias
        return AffineMap(self._ridge(covariance, xx / total, cross, ridge), mean, bias)

    def _ridge(self, covariance: Tensor, moment: Tensor, cross: Tensor, ridge: float) -> Tensor:
        """Solve ``(covariance + ridge * variances) W = cross``, by Cholesky, all layers at once."""
        variance = covariance.diagonal(dim1=1, dim2=2)
        constant = variance <= 1e-12 * moment.diagonal(dim1=1, dim2=2)  # what is left of it is rounding
        scale = torch.where(constant, math.inf, variance.clamp_min(0).sqrt()).unsqueeze(-1)
        matrix = covariance / (scale * scale.transpose(1, 2))  # a constant channel is 0 here, and predicts nothing
        matrix.diagonal(dim1=1, dim2=2).add_(ridge + constant)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed.any()):
            raise FuserError(
                f"the normal equations of {int(failed.count_nonzero())} layers are singular with ridge {ridge}: "
                f"{self.pairs} pairs for {matrix.shape[-1]} channels. Raise the ridge (1e-2), or give more examples."
            )
        return torch.cholesky_solve(cross / scale, factor) / scale


@torch.no_grad()
def fit(
    fuser: LinearFuser,
    batches: Iterable[Batch],
    model: C2CModel,
    *,
    ridge: float,
    weight: Weighting = "none",
    progress: OnProgress | None = None,
) -> None:
    """Fit a linear fuser and open it by its config's ``blend``.

    Args:
        fuser: the fuser; its map, blend and record of training are set.
        batches: what to fit to, for instance :class:`Batches`; read once.
        model: the pair that the batches were made for, with one sharer.
        ridge: penalty, see :meth:`NormalEquations.solve`.
        weight: ``none``: every pair counts the same. ``attention``: as much as the receiver attends to it, see
            :func:`attention_received`.
        progress: called with (stage, done, total) after each batch.

    Raises:
        FuserError: an impossible ``ridge`` or ``weight``, fewer than two aligned pairs, or singular equations.
    """
    if not 0 <= ridge < math.inf:
        raise FuserError(f"ridge is {ridge}; expected a number from 0, such as 0.01.")
    if weight not in ("none", "attention"):
        raise FuserError(f"unknown weight {weight!r}; expected 'none' or 'attention'.")
    sums, total = NormalEquations(), operator.length_hint(batches)
    examples = 0
    for done, batch in enumerate(batches, 1):
        x, y = observations(fuser, batch, model)
        sums.add(x, y, _weights(fuser, batch, model) if weight == "attention" else None)
        examples += len(batch.examples)
        if progress is not None:
            progress("fit", done, max(done, total))
    found = sums.solve(ridge)
    fuser.config.ridge = ridge
    fuser.config.training = {"ridge": ridge, "weight": weight, "examples": examples, "pairs": sums.pairs}
    fuser.set_map(found.weight, found.mean, found.bias)


def choose_blend(
    fuser: LinearFuser,
    score: Callable[[LinearFuser], float],
    blends: Sequence[float] = BLENDS,
    progress: OnProgress | None = None,
) -> dict[float, float]:
    """Try blends on a fitted fuser and leave it at the best; of equals, at the smallest.

    Args:
        fuser: the fitted fuser.
        score: scores it on a dev set, higher is better.
        blends: what to try.
        progress: called with (stage, done, total) after each blend.

    Returns:
        The score of each blend.

    Raises:
        FuserError: the fuser is not fitted, or there is no blend to try.
    """
    if not fuser.trained:
        raise FuserError("this linear fuser is not fitted: call c2c.training.ridge.fit before choose_blend.")
    if not blends:
        raise FuserError("no blends to choose from; give some between 0 and 1.")
    scores: dict[float, float] = {}
    for blend in sorted(set(blends)):
        fuser.set_blend(blend)
        scores[blend] = score(fuser)
        if progress is not None:
            progress("blend", len(scores), len(set(blends)))
    fuser.set_blend(max(scores, key=lambda blend: scores[blend]))  # the first of equals
    return scores


def observations(fuser: LinearFuser, batch: Batch, model: C2CModel) -> tuple[Tensor, Tensor]:
    """Aligned entries of a batch.

    Args:
        fuser: says which layers belong together.
        batch: the batch.
        model: the pair that it was made for.

    Returns:
        The sharer's, ``[layers, pairs, inputs]``, and the receiver's, ``[layers, pairs, outputs]``.
    """
    source = Source(model.sharers[0], batch.sharer, batch.sharer_cache, fuser)
    theirs, ours = aligned_entries(batch.receiver_cache, model.receiver, batch.receiver, source, batch.matched)
    return channels(theirs), channels(ours)


@torch.no_grad()
def attention_received(batch: Batch, model: C2CModel) -> list[Tensor]:
    """How much attention each prompt entry gets from the tokens that will read the fused cache.

    These are the last prompt token and the response: the receiver reads the rest of the prompt before it is fused. A
    head with attention ``a`` that reads values with errors ``e`` is off by at most ``sum_i a_i |e_i|^2``, squared. So
    with this weight ridge minimises a bound on the error of the attention output, as far as values go. For keys it is
    a heuristic: those that nobody reads may be wrong.

    Costs one pass of the receiver over last prompt token and responses, with eager attention, since no other returns
    probabilities; the model's own implementation is restored afterwards.

    Args:
        batch: the batch; its caches stay as they are.
        model: the pair that it was made for.

    Returns:
        For every receiver layer ``[batch, tokens]``: attention on the clean cache, mean over readers and heads.

    Raises:
        FuserError: the receiver's eager attention returns no probabilities.
    """
    ids = torch.cat([batch.receiver.ids[:, -1:], batch.responses[:, :-1].clamp_min(0)], dim=1)
    mask = torch.cat([batch.receiver.mask, batch.responses[:, :-1] != -100], dim=1)
    steps = torch.arange(ids.shape[1], device=ids.device)
    decoder: Any = model.receiver.model.get_decoder()
    with _eager_attention(decoder):
        out = decoder(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=batch.receiver.positions[:, -1:] + steps,
            past_key_values=kv_cache.from_layers(kv_cache.layers(batch.receiver_cache)),  # a copy: it grows
            use_cache=True,
            output_attentions=True,
        )
    length = batch.receiver.length - 1
    if not out.attentions or any(layer is None for layer in out.attentions):
        raise FuserError(f"{model.receiver.name} returns no attention probabilities: fit with weight='none'.")
    reads = (batch.responses != -100).unsqueeze(-1)  # who predicts a token of the response
    share = reads / reads.sum(1, keepdim=True)
    return [(layer.float().mean(1) * share).sum(1)[:, :length] for layer in out.attentions]


def _weights(fuser: LinearFuser, batch: Batch, model: C2CModel) -> Tensor:
    """Attention received at aligned positions, ``[layers, pairs]``."""
    picker = Picker(batch.matched, batch.matched.receiver, 0)
    received = attention_received(batch, model)
    return torch.stack([picker.take_positions(received[layer]).flatten() for layer in fuser.config.fused_layers])


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _double(x: Tensor) -> Tensor:
    """In float64; on the host where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()
