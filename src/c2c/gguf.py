"""What transformers leaves out of a GGUF file: the scaling of its rotary embedding, and biases."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from c2c.errors import ModelLoadError

_LLAMA3_LENGTHS = (8192, 4096, 16384, 32768, 65536, 131072)  # original context lengths; the file does not hold it
_YARN = {"attn_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor"}
_KNOWN = {"type", "factor", "original_context_length", "finetuned", *_YARN}


class GGUFHeader:
    """The metadata of a GGUF file.

    Raises:
        ModelLoadError: cut off.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.name = path.name
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ModelLoadError(f"{path} is cut off or damaged: {error}. Download it again.") from error
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}
        self._architecture = str(self._reader.fields["general.architecture"].contents())

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key of the architecture, such as ``rope.scaling.type``."""
        entry = self._reader.fields.get(f"{self._architecture}.{key}")
        return default if entry is None else entry.contents()

    def scaling_keys(self) -> set[str]:
        """Return the names of all keys of the rotary scaling."""
        prefix = f"{self._architecture}.rope.scaling."
        return {name.removeprefix(prefix) for name in self._reader.fields if name.startswith(prefix)}

    def factors(self, name: str) -> list[float] | None:
        """Return the factors of the rotary frequencies in a tensor, None where there is none."""
        tensor = self.tensors.get(f"{name}.weight")
        return None if tensor is None else [float(value) for value in tensor.data.reshape(-1)]


def carry_rope(header: GGUFHeader, config: Any) -> None:
    """Write the rotary scaling of a GGUF file into a config that transformers made of it.

    Raises:
        ModelLoadError: a scaling that transformers can't express.
    """
    text = config.get_text_config(decoder=True)
    scaling = _scaling(header, text)
    if not scaling:
        return
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict):
        raise ModelLoadError(f"{header.name} scales its rotary embedding, which {text.model_type} has no settings for.")
    if "full_attention" in rope:  # layers with a window are never scaled
        rope["full_attention"] = rope["full_attention"] | scaling
    else:
        text.rope_parameters = rope | scaling
    if "original_max_position_embeddings" in scaling and hasattr(text, "original_max_position_embeddings"):
        text.original_max_position_embeddings = scaling["original_max_position_embeddings"]


def check_biases(header: GGUFHeader, model: torch.nn.Module) -> None:
    """Refuse a file with biases in its attention that the model has no place for.

    Raises:
        ModelLoadError: they would be dropped.
    """
    pattern = re.compile(r"attn_(q|k|v|qkv|output)\.bias$")
    stored = sum(math.prod(map(int, tensor.shape)) for name, tensor in header.tensors.items() if pattern.search(name))
    used = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and re.search(r"\.(self_attn|attn|attention|self_attention)\.", name)
    )
    if stored > used:
        raise ModelLoadError(
            f"{header.name} has biases in its attention that {type(model).__name__} of transformers would drop. "
            "Load the model's safetensors."
        )


def _scaling(header: GGUFHeader, config: Any) -> dict[str, Any]:
    """Return the scaling as ``rope_parameters`` has it; empty for none."""
    factor = float(header.get("rope.scaling.factor") or header.get("rope.scale_linear") or 1.0)
    kind = header.get("rope.scaling.type") or ("linear" if factor != 1.0 else "none")
    unknown = header.scaling_keys() - _KNOWN
    original = header.get("rope.scaling.original_context_length")
    lengths = {} if original is None else {"original_max_position_embeddings": int(original)}
    longs, shorts = header.factors("rope_factors_long"), header.factors("rope_factors_short")
    if longs and shorts:
        trained = int(original or header.get("context_length"))
        attention = header.get("rope.scaling.attn_factor")
        scaling: dict[str, Any] = {"rope_type": "longrope", "short_factor": shorts, "long_factor": longs}
        scaling |= {"original_max_position_embeddings": trained, "factor": header.get("context_length") / trained}
        return scaling | ({} if attention is None else {"attention_factor": float(attention)})
    if kind == "none":
        return _llama3(header, config)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or unknown:
        raise ModelLoadError(
            f"{header.name} scales its rotary embedding in a way that is not known here: "
            f"{kind} {', '.join(sorted(unknown))}. Load the model's safetensors."
        )
    scaling = {"rope_type": "yarn", "factor": factor} | lengths
    for key in ("beta_fast", "beta_slow"):
        if (value := header.get(f"rope.scaling.yarn_{key}")) is not None:
            scaling[key] = float(value)
    more = header.get("rope.scaling.attn_factor") or header.get("rope.scaling.yarn_attn_factor") or 1.0
    return scaling if more == 1.0 else scaling | {"attention_factor": float(more) * (0.1 * math.log(factor) + 1.0)}


def _llama3(header: GGUFHeader, config: Any) -> dict[str, Any]:
    """Find the settings that give the factors of a file: those of Llama 3 are kept as a tensor."""
    factors = header.factors("rope_freqs")
    if factors is None or max(factors) == min(factors) == 1.0 or config.model_type.startswith("gemma4"):
        return {}
    plain = ROPE_INIT_FUNCTIONS["linear"]
    for length in _LLAMA3_LENGTHS:
        scaling = {"rope_type": "llama3", "factor": max(factors), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = length
        trial = type(config)(**(config.to_dict() | {"rope_parameters": config.rope_parameters | scaling}))
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](trial, "cpu")
        unscaled = type(config)(
            **(config.to_dict() | {"rope_parameters": config.rope_parameters | {"rope_type": "linear", "factor": 1.0}})
        )
        bare, _ = plain(unscaled, "cpu")
        if len(bare) == len(factors) and torch.allclose(bare / scaled, torch.tensor(factors), rtol=1e-3):
            return scaling
    raise ModelLoadError(
        f"{header.name} has factors for its rotary frequencies that are not those of Llama 3; transformers would leave "
        "them out. Load the model's safetensors."
    )
