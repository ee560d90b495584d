"""Sampling parameters of a request as vLLM takes them."""

from __future__ import annotations

from typing import Any

from c2c.integrations.vllm.errors import UnsupportedError
from c2c.language_model import LanguageModel
from c2c.serving.engine import SamplingParams

# parameters of a model that change its greedy answers, with the value that changes nothing
_UNSUPPORTED: dict[str, Any] = {
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


def check_generation_config(model: LanguageModel) -> None:
    """Refuse a model with decoding parameters of its own that vLLM would not follow.

    Raises:
        UnsupportedError: there are such.
    """
    config = model.model.generation_config
    set_ = {name: getattr(config, name, None) for name in _UNSUPPORTED}
    bad = {name: value for name, value in set_.items() if value is not None and value != _UNSUPPORTED[name]}
    if bad:
        raise UnsupportedError(
            f"{model.name} sets {', '.join(f'{name}={value}' for name, value in bad.items())} in its "
            "generation_config, which has no equal in this integration. Use c2c serve without --engine vllm."
        )


def vllm_params(model: LanguageModel, params: SamplingParams, limit: int, index: int = 0) -> dict[str, Any]:
    """Convert sampling parameters to fields of vLLM's ``SamplingParams``.

    Args:
        model: who answers; its repetition penalty holds, as it does in ``generate``.
        params: of the request. Stop strings are left to the output, which sees every token.
        limit: new tokens at most.
        index: which answer of its request it is.
    """
    return {
        "max_tokens": limit,
        "temperature": 0.0 if params.greedy else params.temperature,
        "top_p": params.top_p,
        "seed": None if params.seed is None else (params.seed + index) % 2**63,
        "logprobs": params.logprobs,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": getattr(model.model.generation_config, "repetition_penalty", None) or 1.0,
        "stop_token_ids": model.ends,
    }
