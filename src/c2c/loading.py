"""Load a model and its tokenizer by alias of ``c2c pull``, hub id, local folder, or GGUF file."""

from __future__ import annotations

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


def load(
    source: str | Path | PreTrainedModel,
    *,
    tokenizer: Any = None,
    dtype: Dtype = None,
    device_map: Any = None,
    revision: str | None = None,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, Any, str]:
    """Load a causal language model and its tokenizer.

    Args:
        source: alias (``smollm2-135m``), hub id, local folder, path of a ``.gguf`` file, ``repo/id/file.gguf``, or a
            model that is already loaded.
        tokenizer: tokenizer object, or where to load it from; by default from ``source``.
        dtype: weights' type; by default float32 on a CPU (bfloat16 is slow on most), else the checkpoint's own.
        device_map: as in ``from_pretrained``, for instance ``"cuda"`` or ``"auto"``.
        revision: commit, branch or tag of a hub id.
        **model_kwargs: passed on to ``from_pretrained``, for instance ``attn_implementation``.

    Returns:
        The model, its tokenizer (None where the source has none), and the name that it was loaded by.

    Raises:
        ModelLoadError: the source does not exist, or can't be read; an alias that was not pulled yet.
        PromptError: the tokenizer is a slow one, without character offsets.
    """
    if isinstance(source, PreTrainedModel):
        model, name = source, str(source.config._name_or_path or type(source).__name__)
    else:
        name = str(source)
        check_dtype(dtype)
        _check_device(device_map)
        folder, gguf = _locate(name)
        if dtype is None:
            on_cpu = device_map in (None, "cpu") or (device_map == "auto" and not torch.cuda.is_available())
            dtype = torch.float32 if on_cpu else "auto"
        kwargs = {"device_map": device_map, "revision": revision} | model_kwargs
        if gguf is not None:
            kwargs = {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)} | kwargs
        given = {key: value for key, value in kwargs.items() if value is not None}
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadError(
                f"could not load model {name!r}: {error}\nExpected an alias ({', '.join(ALIASES)}), a hub id, a folder "
                f"with config.json and weights, or a .gguf file.{did_you_mean(name, ALIASES)}"
            ) from error
        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
        beside = gguf or not Path(folder).is_dir() or any((Path(folder) / name).exists() for name in names)
        if tokenizer is None and beside:  # token ids can be fused without one
            tokenizer = _load_tokenizer(folder, gguf, revision)
    if isinstance(tokenizer, str | Path):
        tokenizer = _load_tokenizer(str(tokenizer))
    if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
        raise PromptError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets, which token alignment needs. "
            "Load the fast one (AutoTokenizer.from_pretrained with a tokenizer.json), or convert it with "
            "transformers' convert_slow_tokenizer."
        )
    return model, tokenizer, name


def gguf_to_safetensors(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file, unpacked to bfloat16, with its tokenizer to a folder.

    Raises:
        ModelLoadError: transformers can't read the GGUF.
        OSError: the folder can't be written, or the disk is full.
    """
    try:
        model, tokenizer, _ = load(gguf, dtype=torch.bfloat16)
    except Exception as error:  # the reader of a GGUF raises whatever its parts raise
        raise ModelLoadError(
            f"transformers {transformers.__version__} could not read {gguf.name}: {error}. Run `c2c doctor` to "
            "check the installed versions."
        ) from error
    setattr(model, "hf_quantizer", None)  # noqa: B010  save_pretrained refuses a GGUF, and the weights are none any more
    vars(model.config).pop("quantization_config", None)
    save_atomically(folder, lambda temporary: (model.save_pretrained(temporary), tokenizer.save_pretrained(temporary)))


def _locate(name: str) -> tuple[str, str | None]:
    """Return the folder or hub id, and the GGUF file inside it if one is named."""
    path = Path(name).expanduser()
    if name in ALIASES and not path.exists():
        return str(local_path(name)), None
    if name.endswith(".gguf"):
        if path.exists():
            return str(path.parent), path.name
        if name.count("/") < 2:
            raise ModelLoadError(f"no such file: {name}. Expected the path of a GGUF file.")
        repo, file = name.rsplit("/", 1)
        return repo, file
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            raise ModelLoadError(
                f"{name} holds no model: config.json is missing. Expected a folder with it and weights."
            )
        if str(read_json_object(config, ModelLoadError).get("model_type", "")).startswith("c2c_fuser_"):
            raise ModelLoadError(
                f"{name} is a fuser, expected a model: give it as --fuser, or to C2CModel.from_pretrained; it names "
                "its models itself."
            )
        return str(path), None
    if name.startswith((".", "/", "~")) or path.is_file():
        found = f"{name} is a file" if path.is_file() else f"no such folder: {name}"
        raise ModelLoadError(f"{found}. Expected a folder with config.json and weights, or a .gguf file.")
    return name, None


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
    try:
        torch.empty(0, device=device_map)
    except (RuntimeError, AssertionError) as error:
        found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        found += ["mps"] * torch.backends.mps.is_available()
        raise ModelLoadError(
            f"no such device: {device_map!r} is not on this machine. Here are: {', '.join(found)}; or give "
            f"{', '.join(_SPREAD)}."
        ) from error


def _load_tokenizer(source: str, gguf: str | None = None, revision: str | None = None) -> Any:
    given = {key: value for key, value in {"gguf_file": gguf, "revision": revision}.items() if value is not None}
    try:
        return AutoTokenizer.from_pretrained(source, **given)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"could not load a tokenizer from {source}: {error}") from error
