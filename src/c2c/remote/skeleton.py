"""A model without weights: what a client must know of the sharer to number, check and un-rotate its entries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from c2c import rope
from c2c.errors import RemoteError

_LEFT_OUT = ("auto_map", "quantization_config", "transformers_version", "_name_or_path", "dtype", "torch_dtype")
_PROBE = torch.tensor([[1, 100, 1000]])


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """The config of a model's text decoder, as plain data."""
    config = model.config.get_text_config(decoder=True)
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in data.items() if key not in _LEFT_OUT}


def rotary_sums(model: PreTrainedModel) -> list[float] | None:
    """A number per layer that tells whether another side rotates alike; None without rotary embedding."""
    tables = rope.tables(model, _PROBE.to(_rotary_device(model)))
    return None if tables is None else [float(table.cos.double().sum() + table.sin.double().sum()) for table in tables]


def build(config: Mapping[str, Any], dtype: torch.dtype, sums: list[float] | None, url: str) -> PreTrainedModel:
    """The model of this config on the meta device, with a rotary embedding that works.

    Args:
        config: what :func:`config_of` made.
        dtype: type of the weights that are elsewhere.
        sums: what :func:`rotary_sums` made there.
        url: for errors.

    Raises:
        RemoteError: a model that this version of transformers does not know, or rotates otherwise.
    """
    data = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    try:
        made = AutoConfig.for_model(data.pop("model_type"), **data)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(made, trust_remote_code=False, dtype=dtype)
        decoder = model.get_decoder()
        if getattr(decoder, "rotary_emb", None) is not None:
            decoder.rotary_emb = type(decoder.rotary_emb)(made)
        ours = rotary_sums(model)
    except Exception as error:  # whatever a foreign config makes it raise
        raise RemoteError(
            f"the model behind {url} can't be known from its config ({type(error).__name__}: {error}). Models with "
            "code of their own can't be shared from afar; for others bring both sides to the same version of "
            "transformers.",
            "config",
        ) from error
    if not _alike(ours, sums):
        raise RemoteError(
            f"the model behind {url} rotates its keys otherwise than transformers does here. Bring both sides to the "
            "same version of transformers.",
            "config",
        )
    return model


def _alike(ours: list[float] | None, theirs: list[float] | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return len(ours) == len(theirs) and all(abs(a - b) < 1e-2 for a, b in zip(ours, theirs, strict=True))


def _rotary_device(model: PreTrainedModel) -> torch.device:
    embedding = getattr(model.get_decoder(), "rotary_emb", None)
    buffers = list(embedding.buffers()) if embedding is not None else []
    return buffers[0].device if buffers else torch.device("cpu")
