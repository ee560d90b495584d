"""How one answer is decoded: settings of its own, and a random number generator of its own.

Every row of a batch chooses its own next token, so that requests with different temperatures, seeds and penalties run
together, and a sampled answer is the same whatever it shares a batch with.
"""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

_SEEDS = 2**63


@dataclass(frozen=True)
class Sampling:
    """Decoding settings of a request.

    Attributes:
        max_tokens: new tokens at most; None for the server's default.
        temperature: 0 is greedy.
        top_p: sample from the fewest tokens that have this probability together.
        seed: of the first answer; the next ones take the numbers after it. None draws one.
        stop: texts before which an answer ends.
        logprobs: how many of the likeliest tokens are reported beside each chosen one; None reports nothing.
        presence_penalty: subtracted from the logits of tokens that the answer has already.
        frequency_penalty: the same, times how often.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True)
class Scored:
    """Log-probabilities at one position, before temperature, ``top_p`` and penalties.

    Attributes:
        chosen: of the token that was taken.
        top: the likeliest tokens with theirs, best first.
    """

    chosen: float
    top: list[tuple[int, float]]


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: the settings.
        choice: which answer of its request it is.
    """

    def __init__(self, sampling: Sampling, choice: int = 0) -> None:
        self.sampling = sampling
        self._seed = (secrets.randbits(63) if sampling.seed is None else sampling.seed + choice) % _SEEDS
        self._generator: torch.Generator | None = None
        self._counts: Counter[int] = Counter()
        self._logprobs: Tensor | None = None

    @property
    def passive(self) -> bool:
        """Whether the likeliest token is taken and nothing is reported, which ``generate`` does without us."""
        s = self.sampling
        return s.temperature == 0 and s.logprobs is None and not (s.presence_penalty or s.frequency_penalty)

    def choose(self, scores: Tensor) -> Tensor:
        """The scores of one position, ``[vocab]``, as those whose largest is the chosen token."""
        if self.sampling.logprobs is not None:
            self._logprobs = torch.log_softmax(scores.float(), dim=-1)
        scores = self._penalised(scores)
        return scores if self.sampling.temperature == 0 else self._sampled(scores)

    def took(self, token: int) -> Scored | None:
        """Note which token was taken, and say how likely it was if that is asked for."""
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self._counts[token] += 1
        if self._logprobs is None or self.sampling.logprobs is None:
            return None
        best = torch.topk(self._logprobs, min(self.sampling.logprobs, self._logprobs.numel()))
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Scored(float(self._logprobs[token]), top)

    def _penalised(self, scores: Tensor) -> Tensor:
        if not self._counts:
            return scores
        tokens = torch.tensor(list(self._counts), device=scores.device)
        counts = torch.tensor(list(self._counts.values()), device=scores.device, dtype=scores.dtype)
        penalty = self.sampling.presence_penalty + self.sampling.frequency_penalty * counts
        return scores.index_add(0, tokens, -penalty)

    def _sampled(self, scores: Tensor) -> Tensor:
        probabilities = torch.softmax(scores.float() / self.sampling.temperature, dim=-1)
        if self.sampling.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered * (before < self.sampling.top_p))
        token = torch.multinomial(probabilities, 1, generator=self._random(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(0, token, 0.0)

    def _random(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return self._generator
