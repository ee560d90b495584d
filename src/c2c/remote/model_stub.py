"""A model without weights and its tokenizer, as they cross in a handshake: plain data, no code and no pickle."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from c2c import rope
from c2c.errors import RemoteError
from c2c.hub_aliases import ALIASES, local_path

_LEFT_OUT = ("auto_map", "quantization_config", "transformers_version", "_name_or_path", "dtype", "torch_dtype")
_PROBE = torch.tensor([[1, 100, 1000]])
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return the config of a model's text decoder as plain data."""
    config = model.config.get_text_config(decoder=True)
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in data.items() if key not in _LEFT_OUT}


def rotary_checksums(model: PreTrainedModel) -> list[float] | None:
    """Return a number per layer by which two sides compare their rotary tables; None without rotary embedding."""
    embedding = getattr(model.get_decoder(), "rotary_emb", None)
    buffers = list(embedding.buffers()) if embedding is not None else []
    tables = rope.tables(model, _PROBE.to(buffers[0].device if buffers else "cpu"))
    return None if tables is None else [float(table.cos.double().sum() + table.sin.double().sum()) for table in tables]


def build_model(
    config: Mapping[str, Any], dtype: torch.dtype, checksums: list[float] | None, url: str
) -> PreTrainedModel:
    """Build the model of a config on the meta device, with a rotary embedding that works.

    ``checksums`` are those of :func:`rotary_checksums` where the weights are.

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
        ours = rotary_checksums(model)
        if (ours is None) != (checksums is None) or any(
            not abs(a - b) < 1e-2 for a, b in zip(ours or [], checksums or [], strict=True)
        ):
            raise ValueError("it rotates its keys otherwise than transformers does here")
    except Exception as error:  # whatever a foreign config makes it raise
        raise RemoteError(
            f"the model behind {url} can't be built from its config ({type(error).__name__}: {error}). Models with "
            "code of their own can't be shared from afar; for others bring both sides to the same version of "
            "transformers.",
            "config",
        ) from error
    return model


def tokenizer_files(tokenizer: Any) -> dict[str, str]:
    """Return the files of a fast tokenizer by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = [Path(folder) / name for name in _FILES]
        return {path.name: path.read_text(encoding="utf-8") for path in paths if path.exists()}


def load_tokenizer_files(files: Mapping[str, str], url: str) -> Any:
    """Load the tokenizer in these files.

    Raises:
        RemoteError: files of other names, or no tokenizer.
    """
    if unknown := sorted(set(files) - set(_FILES)):
        raise RemoteError(f"the sharer at {url} sent unexpected tokenizer files: {unknown}.", "malformed")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8", newline="")
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # whatever a broken file makes it raise
            message = f"the tokenizer that the sharer at {url} sent can't be loaded: {error}."
            raise RemoteError(f"{message} Pass tokenizer=... with a local one.", "tokenizer") from error


def load_tokenizer(source: Any) -> Any:
    """Return a tokenizer as given, or load it by alias, hub id or folder.

    Raises:
        RemoteError: there is none.
    """
    if not isinstance(source, str | Path):
        return source
    name = str(source)
    try:
        return AutoTokenizer.from_pretrained(local_path(name) if name in ALIASES else name)
    except (OSError, ValueError, KeyError) as error:
        raise RemoteError(f"tokenizer={name!r} can't be loaded: {error}", "tokenizer") from error
