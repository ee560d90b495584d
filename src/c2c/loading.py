"""Load a model and its tokenizer by alias of ``c2c pull``, hub id, local folder, or GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from c2c.errors import ModelLoadError, PromptError, did_you_mean
from c2c.hub_aliases import ALIASES, local_path
from c2c.utils import read_json_object, save_atomically

Dtype = str | torch.dtype | None
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that accelerate works out


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer (None where the source has none) and the name that it was loaded by."""

    model: PreTrainedModel
    tokenizer: Any
    name: str


def load(
    source: str | Path | PreTrainedModel,
    *,
    tokenizer: Any = None,
    dtype: Dtype = None,
    device_map: Any = None,
    revision: str | None = None,
    **model_kwargs: Any,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        source: alias (``smollm2-135m``), hub id, local folder, path of a ``.gguf`` file, ``repo/id/file.gguf``, or a
            model that is already loaded.
        tokenizer: tokenizer object, or where to load it from; by default from ``source``.
        dtype: weights' type; by default float32 on a CPU (bfloat16 is slow on most), else the checkpoint's own.
        device_map: as in ``from_pretrained``, for instance ``"cuda"`` or ``"auto"``.
        revision: commit, branch or tag of a hub id.
        **model_kwargs: passed on to ``from_pretrained``, for instance ``attn_implementation``.

    Raises:
        ModelLoadError: the source does not exist, or can't be read; an alias that was not pulled yet.
        PromptError: the tokenizer is a slow one, without character offsets.
    """
    if isinstance(source, PreTrainedModel):
        found = _load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        return LoadedModel(source, _require_fast(found), str(source.config._name_or_path or type(source).__name__))
    name = str(source)
    check_dtype(dtype)
    _check_device(device_map)
    folder, gguf = _locate(name)
    kwargs = _drop_none(device_map=device_map, revision=revision, **model_kwargs)
    try:
        model = _load_model(folder, gguf, dtype or _default_dtype(device_map), kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(
            f"could not load model {name!r}: {error}\nExpected an alias ({', '.join(ALIASES)}), a hub id, a folder "
            f"with config.json and weights, or a .gguf file.{did_you_mean(name, ALIASES)}"
        ) from error
    if not isinstance(tokenizer, str | Path | None):
        return LoadedModel(model, _require_fast(tokenizer), name)
    found = _load_tokenizer(tokenizer) if tokenizer else _find_tokenizer(folder, gguf, revision)
    return LoadedModel(model, _require_fast(found), name)


def gguf_to_safetensors(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file, unpacked to bfloat16, with its tokenizer to a folder.

    Raises:
        ModelLoadError: transformers can't read the GGUF.
        OSError: the folder can't be written, or the disk is full.
    """
    try:
        loaded = load(gguf, dtype=torch.bfloat16)
    except Exception as error:  # the reader of a GGUF raises whatever its parts raise
        raise ModelLoadError(
            f"transformers {transformers.__version__} could not read {gguf.name}: {error}. Run `c2c doctor` to "
            "check the installed versions."
        ) from error
    model: Any = loaded.model
    model.hf_quantizer = None  # save_pretrained refuses a GGUF, and the weights are none any more
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    def write(temporary: str) -> None:
        model.save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)

    save_atomically(folder, write)


def _locate(name: str) -> tuple[str, str | None]:
    """Return the folder or hub id, and the GGUF file inside it if one is named."""
    if name in ALIASES and not Path(name).exists():
        return str(local_path(name)), None
    if name.endswith(".gguf"):
        path = Path(name)
        if path.exists() or not name.count("/") >= 2:
            if not path.exists():
                raise ModelLoadError(f"no such file: {name}. Expected the path of a GGUF file.")
            return str(path.parent), path.name
        repo, file = name.rsplit("/", 1)
        return repo, file
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path, name)
        return str(path), None
    if name.startswith((".", "/", "~")) or path.is_file():
        found = f"{name} is a file" if path.is_file() else f"no such folder: {name}"
        raise ModelLoadError(f"{found}. Expected a folder with config.json and weights, or a .gguf file.")
    return name, None


def _check_folder(path: Path, name: str) -> None:
    """Refuse what transformers would only call an unknown architecture."""
    config = path / "config.json"
    if not config.is_file():
        raise ModelLoadError(f"{name} holds no model: config.json is missing. Expected a folder with it and weights.")
    if str(read_json_object(config, ModelLoadError).get("model_type", "")).startswith("c2c_fuser_"):
        raise ModelLoadError(
            f"{name} is a fuser, expected a model: give it as --fuser, or to C2CModel.from_pretrained; it names its "
            "models itself."
        )


def check_dtype(dtype: Dtype) -> None:
    """Check the name of a type of weights.

    Raises:
        ModelLoadError: no such type.
    """
    if isinstance(dtype, str) and dtype != "auto":
        known = [name for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
        if dtype.removeprefix("torch.") not in known:
            raise ModelLoadError(
                f"unknown type of weights {dtype!r}.{did_you_mean(dtype, known)} Expected float32, bfloat16, float16 "
                "or auto."
            )


def _check_device(device_map: Any) -> None:
    """Refuse a device that is not there: libraries below fail on it in many ways."""
    if not isinstance(device_map, str) or device_map in _SPREAD:
        return
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    found += ["mps"] * torch.backends.mps.is_available()
    expected = f"Here are: cpu{''.join(', ' + name for name in found)}; or give {', '.join(_SPREAD)}."
    try:
        device = torch.device(device_map)
    except RuntimeError as error:
        raise ModelLoadError(f"no such device: {device_map!r}. {expected}") from error
    index = device.index or 0
    if (device.type == "cuda" and f"cuda:{index}" not in found) or (device.type == "mps" and "mps" not in found):
        raise ModelLoadError(f"device {device_map!r} is not on this machine. {expected}")


def _load_model(folder: str, gguf: str | None, dtype: Dtype, kwargs: dict[str, Any]) -> PreTrainedModel:
    if gguf is not None:
        kwargs = {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)} | kwargs
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)
    return model


def _find_tokenizer(folder: str, gguf: str | None, revision: str | None) -> Any:
    """Return the tokenizer beside a model, or None: token ids can be fused without one."""
    if Path(folder).is_dir() and gguf is None:
        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
        if not any((Path(folder) / name).exists() for name in names):
            return None
    return _load_tokenizer(folder, gguf, revision)


def _load_tokenizer(source: str | Path, gguf: str | None = None, revision: str | None = None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(str(source), **_drop_none(gguf_file=gguf, revision=revision))
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"could not load a tokenizer from {source!s}: {error}") from error


def _require_fast(tokenizer: Any) -> Any:
    if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
        raise PromptError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets, which token alignment needs. "
            "Load the fast one (AutoTokenizer.from_pretrained with a tokenizer.json), or convert it with "
            "transformers' convert_slow_tokenizer."
        )
    return tokenizer


def _default_dtype(device_map: Any) -> Dtype:
    on_cpu = device_map in (None, "cpu") or (device_map == "auto" and not torch.cuda.is_available())
    return torch.float32 if on_cpu else "auto"


def _drop_none(**kwargs: Any) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if value is not None}
