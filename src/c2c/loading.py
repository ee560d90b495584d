"""Load a model and its tokenizer by alias of ``c2c pull``, hub id, folder, adapter or GGUF file, or as an object."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from c2c.adapters import with_adapter
from c2c.checkpoint import (
    check_file,
    check_files,
    find_adapter,
    load_causal,
    multimodal_options,
    text_config,
)
from c2c.errors import C2CError, ModelLoadError, PromptError, did_you_mean
from c2c.gguf import GGUFHeader, carry_rope, check_biases
from c2c.hub_aliases import ALIASES, local_path
from c2c.utils import read_json_object, save_atomically

Dtype = str | torch.dtype | None
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that accelerate works out
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "f16": "float16", "f32": "float32"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "subfolder")


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

    Of a multimodal model its language model is taken, of an adapter of PEFT its base model with the adapter active.

    Args:
        source: alias (``smollm2-135m``), hub id, local folder, path of a ``.gguf`` file, ``repo/id/file.gguf``, or a
            model that is already loaded, which may be wrapped by PEFT, ``torch.compile`` or data parallelism.
        tokenizer: tokenizer object, or where to load it from; by default from ``source``.
        dtype: weights' type; by default float32 on a CPU (bfloat16 is slow on most), else the checkpoint's own.
        device_map: as in ``from_pretrained``, for instance ``"cuda"`` or ``"auto"``.
        revision: commit, branch or tag of a hub id.
        **model_kwargs: passed on to ``from_pretrained``, for instance ``attn_implementation``.

    Returns:
        The model, its tokenizer (None where the source has none), and the name that it was loaded by.

    Raises:
        ModelLoadError: the source does not exist, can't be read, or holds other weights than its model has; an alias
            that was not pulled yet; options that a loaded model can't take.
        PromptError: the tokenizer is a slow one, without character offsets, or has more words than the model.
    """
    dtype, old = parse_dtype(dtype), parse_dtype(model_kwargs.pop("torch_dtype", None))
    if None not in (dtype, old) and dtype != old:
        raise ModelLoadError(f"dtype={dtype} and torch_dtype={old} differ. Give dtype alone.")
    dtype = old if dtype is None else dtype
    options = {"device_map": device_map, "revision": revision} | model_kwargs
    options = {key: value for key, value in options.items() if value is not None}
    if not isinstance(source, str | Path):
        model = unwrap(source)
        _check_loaded_as(model, dtype, options)
        name = str(model.config._name_or_path or type(model).__name__)
    else:
        name = str(source)
        _check_device(device_map)
        folder, gguf = locate(name)
        if dtype is None:
            on_cpu = device_map in (None, "cpu") or (device_map == "auto" and not torch.cuda.is_available())
            dtype = torch.float32 if on_cpu else "auto"
        base = find_adapter(Path(folder), name)
        model, own = _from_source(name, folder, gguf, base, options | {"dtype": dtype})
        if tokenizer is None and own is not None:  # token ids can be fused without one
            tokenizer = _load_tokenizer(own, gguf, revision)
    if isinstance(tokenizer, str | Path):
        tokenizer = _load_tokenizer(str(tokenizer))
    _check_tokenizer(tokenizer, model)
    return model, tokenizer, name


def base_name(source: str | Path) -> str:
    """Return the base model that an adapter's folder names; the name itself for any other source."""
    folder = Path(source).expanduser()
    return find_adapter(folder, str(source)) or str(source)


def unwrap(model: Any) -> PreTrainedModel:
    """Return the language model inside of wrappers: PEFT, ``torch.compile``, data parallelism, DeepSpeed.

    Raises:
        ModelLoadError: no causal language model of transformers, or an adapter that works outside of its layers.
    """
    given = type(model).__name__
    while not isinstance(model, PreTrainedModel):
        inner = _inside(model)
        if inner is None:
            raise ModelLoadError(
                f"a {given} was given as a model. Expected an alias, hub id, folder, .gguf file, or a loaded causal "
                "language model of transformers; of a pipeline, trainer or wrapper give the model inside."
            )
        model = inner
    if not model.can_generate():
        raise ModelLoadError(f"a {type(model).__name__} has no language-model head. Expected a causal language model.")
    if model.config.is_encoder_decoder:
        raise ModelLoadError(f"a {type(model).__name__} is an encoder-decoder. Expected a decoder-only language model.")
    return model


def _inside(model: Any) -> Any:
    """Return what a wrapper holds, None for what is no known wrapper."""
    if not isinstance(model, nn.Module):
        return None
    if "_orig_mod" in model._modules:  # torch.compile
        return model._modules["_orig_mod"]
    if (
        isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        or type(model).__name__ == "DeepSpeedEngine"
    ):
        return model.module
    if "peft" in sys.modules and isinstance(model, (sys.modules["peft"].PeftModel, sys.modules["peft"].PeftMixedModel)):
        for name in model.active_adapters:
            _check_adapter_kind(model.peft_config[name], name)
        return model.get_base_model()
    return None


def _check_adapter_kind(config: Any, name: str) -> None:
    """Refuse adapters of which a part works outside of the model's layers, where its cache would lack it."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if (
        config.is_prompt_learning
        or kind in ("ADAPTION_PROMPT", "XLORA", "POLY")
        or getattr(config, "alora_invocation_tokens", None)
    ):
        raise ModelLoadError(
            f"adapter {name!r} ({kind}) adds to the prompt or depends on it, which a fused cache does not carry. "
            "Expected an adapter inside the layers, such as LoRA."
        )


def _check_loaded_as(model: PreTrainedModel, dtype: Dtype, options: dict[str, Any]) -> None:
    """Refuse options that a loaded model does not have already."""
    has: dict[str, Any] = {
        "device_map": model.device,
        "attn_implementation": model.config._attn_implementation,
        "revision": getattr(model.config, "_commit_hash", None),
    }
    wrong = [key for key, value in options.items() if key not in has or not _alike(value, has[key])]
    if dtype not in (None, "auto", model.dtype):
        wrong.insert(0, "dtype")
    if wrong:
        given = ", ".join(f"{key}={dtype if key == 'dtype' else options[key]!r}" for key in wrong)
        raise ModelLoadError(
            f"{given} can't be applied to a model that is loaded already ({model.dtype} on {model.device}). Give the "
            "name or folder of the model to load it so, or convert it before: model.to(...)."
        )


def _alike(wanted: Any, has: Any) -> bool:
    if isinstance(has, torch.device) and isinstance(wanted, str | torch.device):
        if wanted in _SPREAD:
            return True
        device = torch.device(wanted)
        return device.type == has.type and device.index in (None, has.index)
    return bool(wanted == has)


def _from_source(
    name: str, folder: str, gguf: str | None, base: str | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, str | None]:
    """Load from a folder or hub id; return the model, and where its tokenizer is, None for nowhere."""
    local = Path(folder).is_dir()
    own = folder if gguf or not local or any((Path(folder) / file).exists() for file in _TOKENIZER_FILES) else None
    if base is not None:
        inner, inner_gguf = locate(base)
        model, theirs = _from_source(base, inner, inner_gguf, None, options)
        return with_adapter(model, folder), own or theirs
    try:
        hub = {key: value for key, value in options.items() if key in _HUB_OPTIONS}
        if gguf is not None:
            path = str(Path(folder) / gguf) if local else cached_file(folder, gguf, **hub)
            return _from_gguf(name, Path(str(path)), options), own
        if local:
            check_files(Path(folder))
        if "config" not in options:
            trusted = {"trust_remote_code": True} if options.get("trust_remote_code") else {}
            config = AutoConfig.from_pretrained(folder, **hub, **trusted)
            options = options | multimodal_options(config, text_config(config, name))
        return load_causal(folder, name, options), own
    except C2CError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ModelLoadError(
            f"not enough memory for {name}: {error}. Give a smaller dtype, or device_map='auto'."
        ) from error
    except Exception as error:  # libraries raise whatever their parts raise
        broken = " A file is cut off or damaged: download it again." if isinstance(error, SafetensorError) else ""
        raise ModelLoadError(
            f"could not load model {name!r}: {error}.{broken}\nExpected an alias ({', '.join(ALIASES)}), a hub id, a "
            f"folder with config.json and weights, or a .gguf file.{did_you_mean(name, ALIASES)}"
        ) from error


def _from_gguf(name: str, path: Path, options: dict[str, Any]) -> PreTrainedModel:
    """Load a GGUF file, with what transformers leaves out of it."""
    check_file(path)
    header = GGUFHeader(path)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    text_config(config, name)
    carry_rope(header, config)
    options = {"quantization_config": GgufConfig(dequantize=True), "config": config} | options
    model = load_causal(str(path.parent), name, options | {"gguf_file": path.name})
    check_biases(header, model)
    return model


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


def locate(name: str) -> tuple[str, str | None]:
    """Return the folder or hub id, and the GGUF file inside it if one is named."""
    path = Path(name).expanduser()
    if name in ALIASES and not path.exists():
        return str(local_path(name)), None
    if name.endswith(".gguf") and not path.is_dir():
        if path.exists():
            return str(path.parent), path.name
        if name.count("/") < 2:
            raise ModelLoadError(f"no such file: {name}. Expected the path of a GGUF file.")
        repo, file = name.rsplit("/", 1)
        return repo, file
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            if (path / "adapter_config.json").is_file():
                return str(path), None
            raise ModelLoadError(
                f"{name} holds no model: config.json is missing. Expected a folder with it and weights."
            )
        check_file(config)
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


def parse_dtype(given: Dtype) -> Dtype:
    """Return the type of weights that is meant: ``bf16``, ``half`` and ``torch.float32`` are names as well.

    Returns:
        A type of torch; None and ``auto`` as they are.

    Raises:
        ModelLoadError: no such type, or one that no model computes in.
    """
    if given is None or given == "auto":
        return given
    known = [name for name, value in vars(torch).items() if isinstance(value, torch.dtype) and value.is_floating_point]
    name = str(given).removeprefix("torch.").lower()
    found = getattr(torch, _SHORT.get(name, name), None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype):
        raise ModelLoadError(
            f"unknown type of weights {given!r}.{did_you_mean(name, known)} Expected float32, bfloat16, float16 or "
            "auto."
        )
    if not found.is_floating_point or found.itemsize < 2:
        raise ModelLoadError(
            f"{found} is no type that a model computes in. Expected float32, bfloat16, float16 or auto; for quantized "
            "weights pass quantization_config=...."
        )
    return found


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
        tokenizer = AutoTokenizer.from_pretrained(source, **given)
    except Exception as error:  # the parsers of its files raise what they like
        raise ModelLoadError(f"could not load a tokenizer from {source}: {error}") from error
    if not len(tokenizer):
        raise ModelLoadError(f"the tokenizer in {source} has no words: is tokenizer.json missing? Download it again.")
    return tokenizer


def _check_tokenizer(tokenizer: Any, model: PreTrainedModel) -> None:
    if tokenizer is None:
        return
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets, which token alignment needs. "
            "Load the fast one (AutoTokenizer.from_pretrained with a tokenizer.json), or convert it with "
            "transformers' convert_slow_tokenizer."
        )
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:  # without tokens added later, which text models often have no use for
        raise PromptError(
            f"the tokenizer has {tokenizer.vocab_size} words, the model embeddings for {rows}: it belongs to another "
            "model. Give the model's own tokenizer."
        )
