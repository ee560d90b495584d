"""Sampling: how one answer is decoded, with parameters and a random number generator of its own.

Every row of a batch chooses its own next token, so that requests with different temperatures, seeds and penalties run
together, and a sampled answer is the same whatever it shares a batch with.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SEEDS = 2**63
_GREEDY_BELOW = 1e-5  # a smaller temperature would overflow the logits; the likeliest token is all that is left


@dataclass(frozen=True)
class SamplingParams:
    """Decoding parameters of a request."""

    max_tokens: int | None = None  # new tokens at most; None for the server's default
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # sample from the fewest tokens that have this probability together
    seed: int | None = None  # of the first answer; the next ones take the numbers after it; None draws one
    stop: Sequence[str] = ()  # strings before which an answer ends
    logprobs: int | None = None  # how many of the likeliest tokens are reported beside each one; None reports nothing
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that the answer has already
    frequency_penalty: float = 0.0  # the same, times how often

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < _GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """Whether tokens that the answer has already become less likely."""
        return bool(self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True)
class Scored:
    """Log-probabilities at one position, before temperature, ``top_p`` and penalties."""

    chosen: float  # of the token that was taken
    top: list[tuple[int, float]]  # the likeliest tokens with theirs, best first


class Sampler:
    """Choose the tokens of one answer, the one of this index of its request."""

    def __init__(self, params: SamplingParams, index: int = 0) -> None:
        self.params = params
        self._seed = (secrets.randbits(63) if params.seed is None else params.seed + index) % _SEEDS
        self._generator: torch.Generator | None = None
        self._counts: Counter[int] = Counter()
        self._logprobs: Tensor | None = None
        # plain greedy decoding does, and no log-probability is reported
        self.passive = params.greedy and params.logprobs is None and not params.penalised

    def choose(self, scores: Tensor) -> Tensor:
        """Return scores, ``[vocab]``, whose largest is the chosen token."""
        if self.params.logprobs is not None:
            self._logprobs = torch.log_softmax(scores.float(), dim=-1)
        scores = self._penalise(scores)
        return scores if self.params.greedy else self._sample(scores)

    def record(self, token: int) -> Scored | None:
        """Record the token that was taken; return its log-probability if that is requested."""
        if self.params.penalised:
            self._counts[token] += 1
        if self._logprobs is None or self.params.logprobs is None:
            return None
        best = torch.topk(self._logprobs, min(self.params.logprobs, self._logprobs.numel()))
        return Scored(float(self._logprobs[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))

    def _penalise(self, scores: Tensor) -> Tensor:
        if not self._counts:
            return scores
        tokens = torch.tensor(list(self._counts), device=scores.device)
        counts = torch.tensor(list(self._counts.values()), device=scores.device, dtype=scores.dtype)
        return scores.index_add(0, tokens, -(self.params.presence_penalty + self.params.frequency_penalty * counts))

    def _sample(self, scores: Tensor) -> Tensor:
        probabilities = torch.softmax(scores.float() / self.params.temperature, dim=-1)
        if self.params.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered * (before < self.params.top_p))
        if self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self._seed)
        token = torch.multinomial(probabilities, 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter(0, token, 0.0)
