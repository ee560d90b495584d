"""How an answer is decoded, in vLLM's words."""

from __future__ import annotations

from typing import Any

from c2c.integrations.vllm.errors import UnsupportedError
from c2c.language_model import LanguageModel
from c2c.serving.batch import ends_of
from c2c.serving.sampling import Sampler, Sampling, Scored

# settings of a model that change its greedy answers, with the value that changes nothing
_UNKNOWN: dict[str, Any] = {
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": None,
    "guidance_scale": None,
    "watermarking_config": None,
}


def check_own_settings(model: LanguageModel) -> None:
    """Refuse a model whose own decoding settings vLLM would not follow.

    Raises:
        UnsupportedError: there are such.
    """
    config = model.model.generation_config
    set_ = {name: getattr(config, name, None) for name in _UNKNOWN}
    bad = {name: value for name, value in set_.items() if value is not None and value != _UNKNOWN[name]}
    if bad:
        raise UnsupportedError(
            f"{model.name} sets {', '.join(f'{name}={value}' for name, value in bad.items())} in its "
            "generation_config, which has no equal in this integration. Use c2c serve without --engine vllm."
        )


def vllm_settings(model: LanguageModel, sampling: Sampling, limit: int, choice: int = 0) -> dict[str, Any]:
    """Fields of ``SamplingParams``.

    Args:
        model: who answers; its repetition penalty holds, as it does in ``generate``.
        sampling: what the request asks for. Stop texts are left to the writer, which sees every token.
        limit: new tokens at most.
        choice: which answer of its request it is.
    """
    return {
        "max_tokens": limit,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": None if sampling.seed is None else (sampling.seed + choice) % 2**63,
        "logprobs": sampling.logprobs,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": getattr(model.model.generation_config, "repetition_penalty", None) or 1.0,
        "stop_token_ids": ends_of(model),
    }


class ToldSampler(Sampler):
    """Chooses nothing: tells a writer what vLLM said about the token that it chose.

    Attributes:
        scored: of the next token.
    """

    scored: Scored | None = None

    def took(self, token: int) -> Scored | None:
        """How likely it was, if that was asked for."""
        scored, count = self.scored, self.sampling.logprobs
        if scored is None or count is None:
            return None
        return Scored(scored.chosen, scored.top[:count])
