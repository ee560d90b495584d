"""Checkpoints as people have them: multimodal folders, adapters, weights that do not fit, damaged files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from c2c.errors import ModelLoadError
from c2c.utils import install_command, read_json_object

_POINTER = b"version https://git-lfs"
_MAGIC = {b"GGUF": "a GGUF file", b"PK\x03\x04": "a zip archive or pickle of torch", b"\x80": "a pickle"}
_WEIGHTS = (".safetensors", ".bin", ".gguf")

# Text models of multimodal ones that have no class of their own: on text they compute the same as these.
_TEXT_TYPES = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
# Where multimodal checkpoints keep their language model, for checkpoints of all times.
_TEXT_PREFIXES = {
    r"^(model\.)?(language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(model\.)?(language_model|text_model)\.(model\.)?": "model.",
}
# Parts of a checkpoint that a language model can do without: nothing of them is inside its layers.
_HARMLESS = re.compile(r"inv_freq$|rotary_emb|masked_bias$|\.(attn|attention)\.bias$|\.[kv]_scale$")
_ADAPTER = re.compile(r"\.(lora_|base_layer\.|modules_to_save\.|adapter_)")
_OTHER_TASKS = ("Classification", "QuestionAnswering", "MaskedLM", "RewardModel", "MultipleChoice")
_SHOWN = 3


def text_config(config: Any, name: str) -> Any:
    """Return the config of the language model in a multimodal one, or ``config`` itself.

    Raises:
        ModelLoadError: it is no language model that writes token by token, or one that can't be taken out.
    """
    whole = config.get_text_config(decoder=True)
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelLoadError(f"{name} is an encoder-decoder model ({kind}). Expected a decoder-only language model.")
    tasks = [str(task) for task in getattr(config, "architectures", None) or []]
    others = [task for task in tasks if task.endswith(_OTHER_TASKS)]
    if others:
        raise ModelLoadError(f"{name} is a {others[0]}. Expected a causal language model, with a head that writes.")
    if getattr(whole, "use_bidirectional_attention", False) in (True, "all") or _is_encoder(whole):
        raise ModelLoadError(
            f"{name} reads in both directions ({kind}), so its cache can't be continued. Expected a causal language "
            "model."
        )
    if type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    ):
        return config
    wanted = _TEXT_TYPES.get(whole.model_type, whole.model_type)
    if (
        whole is config
        or wanted not in CONFIG_MAPPING
        or CONFIG_MAPPING[wanted] not in AutoModelForCausalLM._model_mapping
    ):
        raise ModelLoadError(
            f"{name} is a {kind}, which transformers does not have as a causal language model. Expected one, or a "
            "multimodal model whose language model is one."
        )
    return whole if wanted == whole.model_type else _converted(whole, CONFIG_MAPPING[wanted])


def _converted(config: Any, kind: type[PreTrainedConfig]) -> Any:
    """Return the config as one of another class; rotary sections for images fall away, since text has one position."""
    known = set(kind().to_dict()) - {"model_type", "transformers_version", "architectures"}
    facts = {name: value for name, value in config.to_dict().items() if name in known}
    rope = facts.get("rope_parameters") or {}
    facts["rope_parameters"] = {key: value for key, value in rope.items() if not key.startswith("mrope")}
    if facts["rope_parameters"].get("type") == "mrope" or facts["rope_parameters"].get("rope_type") == "mrope":
        facts["rope_parameters"] |= {"rope_type": "default", "type": "default"}
    return kind(**facts)


def _is_encoder(config: Any) -> bool:
    """Whether this is a family of encoders, which is causal only where its config says so."""
    return getattr(config, "is_decoder", None) is False and not config.model_type.startswith("gpt_neox")


def multimodal_options(config: Any, text: Any) -> dict[str, Any]:
    """Return the options that load the language model ``text`` from a checkpoint of ``config``."""
    if text is config:
        return {}
    text.tie_word_embeddings = getattr(text, "tie_word_embeddings", False) or (
        "tie_word_embeddings" in config.to_diff_dict() and bool(config.tie_word_embeddings)
    )
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    return {"config": text, "key_mapping": _TEXT_PREFIXES}


def load_causal(source: str, name: str, options: dict[str, Any]) -> PreTrainedModel:
    """Load a model whose every weight comes from the checkpoint.

    Raises:
        ModelLoadError: weights are missing, do not fit, or would be dropped.
    """
    if (Path(source) / "adapter_config.json").is_file():
        return _load_both(Path(source), name, options)
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    model: PreTrainedModel = loaded[0]
    _check_loaded(model, loaded[1], name)
    return model


def _load_both(folder: Path, name: str, options: dict[str, Any]) -> PreTrainedModel:
    """Load a model that shares its folder with an adapter, each by itself: together only the adapter is reported on."""
    with TemporaryDirectory() as without:
        for path in folder.iterdir():
            if path.name != "adapter_config.json":
                (Path(without) / path.name).symlink_to(path.resolve())
        model = load_causal(without, name, options)
    model.config._name_or_path = str(folder)
    add_adapter(model, str(folder), name)
    return model


def add_adapter(model: PreTrainedModel, folder: str, name: str) -> None:
    """Put a stored PEFT adapter into its base model; it is active then.

    Raises:
        ModelLoadError: ``peft`` is missing, or the adapter does not fit the model.
    """
    try:
        loaded: Any = model.load_adapter(folder)
    except ImportError as error:
        raise ModelLoadError(f"{name} is a PEFT adapter ({error}): {install_command('adapter')}.") from error
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ModelLoadError(f"could not load the adapter {name}: {error}") from error
    found = {
        "missing": sorted(loaded.missing_keys),
        "of another shape": sorted(map(str, loaded.mismatched_keys)),
        "not in the model": sorted(loaded.unexpected_keys),
    }
    if any(found.values()):
        raise ModelLoadError(
            f"the adapter {name} does not fit its base {model.config._name_or_path}. "
            f"{''.join(_list(what, keys) for what, keys in found.items())}Give it the base that it was trained on."
        )


def _check_loaded(model: PreTrainedModel, info: dict[str, Any], name: str) -> None:
    """Refuse a model that has random weights, or lacks some of its checkpoint's.

    Towers for images or sound, heads for several tokens and other parts outside of the language model are left out.
    """
    missing, mismatched = sorted(info["missing_keys"]), sorted(str(entry) for entry in info["mismatched_keys"])
    dropped = sorted(key for key in info["unexpected_keys"] if _is_part(key, model))
    if not (missing or mismatched or dropped):
        return
    others = _list("not in the model", dropped or sorted(info["unexpected_keys"]))
    raise ModelLoadError(
        f"the weights of {name} do not fit {type(model).__name__}. {_list('missing', missing)}"
        f"{_list('of another shape', mismatched)}{others}"
        "transformers would start from random weights or leave these out. Names with a prefix come from a wrapper "
        "(DataParallel, torch.compile): save the model inside. Otherwise the config belongs to another model, or the "
        "weights are of a model without a language-model head."
    )


def _is_part(key: str, model: PreTrainedModel) -> bool:
    """Whether a key that was not loaded belongs inside a module that the language model has."""
    if _HARMLESS.search(key):
        return False
    if _ADAPTER.search(key):
        return True
    layers = re.match(r"(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h|blocks)\.(\d+)\.", key)
    config: Any = model.config.get_text_config(decoder=True)
    if layers is None or (getattr(config, "num_kv_shared_layers", None) and ".self_attn." in key):
        return False  # layers that read the cache of another one are stored with keys and values all the same
    extra = getattr(config, "num_nextn_predict_layers", 0) or getattr(config, "mtp_num_hidden_layers", 0) or 0
    return not config.num_hidden_layers <= int(layers[1]) < config.num_hidden_layers + extra


def _list(what: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{what}: {', '.join(keys[:_SHOWN])}{more}. " if keys else ""


# -- files --------------------------------------------------------------------------------------------------------


def find_adapter(folder: Path, name: str) -> str | None:
    """Return the base model that a folder of a PEFT adapter names, None for another folder.

    Raises:
        ModelLoadError: the adapter does not name its base.
    """
    path = folder / "adapter_config.json"
    if not path.is_file() or (folder / "config.json").is_file():
        return None
    base = read_json_object(path, ModelLoadError).get("base_model_name_or_path")
    if not base:
        raise ModelLoadError(f"{name} is a PEFT adapter that does not name its base model. Merge it into the model.")
    return str(base)


def check_files(folder: Path) -> None:
    """Check the files of a local folder for what git-lfs, a browser or a full disk leave in their place.

    Raises:
        ModelLoadError: a pointer, an empty file, or another format than the name says.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in {*_WEIGHTS, ".json", ".model"}:
            check_file(path)
        if path.name.endswith("config.json"):
            read_json_object(path, ModelLoadError)
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        shards = set(read_json_object(index, ModelLoadError).get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            listed = _list("missing", missing)
            raise ModelLoadError(
                f"{folder} lacks {len(missing)} of {len(shards)} files of weights. {listed}Download them."
            )


def check_file(path: Path) -> None:
    """Check one file.

    Raises:
        ModelLoadError: a pointer, an empty file, or another format than the name says.
    """
    with path.open("rb") as file:
        head = file.read(64)
    found = "a git-lfs pointer, not the file itself: run `git lfs pull`" if head.startswith(_POINTER) else None
    found = "empty" if not head else found
    if path.suffix == ".gguf" and found is None and not head.startswith(b"GGUF"):
        found = "no GGUF file"
    if path.suffix == ".safetensors" and found is None:
        size = int.from_bytes(head[:8], "little")
        if head[8:9] != b"{":
            found = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), "no safetensors file")
        elif size > path.stat().st_size:
            found = "cut off"
    if found is not None:
        raise ModelLoadError(f"{path} is {found}. Download it again.")
