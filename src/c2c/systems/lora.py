"""LoRA adapter of the receiver: as many parameters as a fuser, on the same data, without any sharer.

What it gains did not have to cross from another model, so a fuser is worth its sharer only where it gains more. The
method is LoRA (Hu et al. 2021, arXiv:2106.09685), by the ``peft`` library.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from c2c import identity
from c2c.errors import C2CError
from c2c.identity import ModelIdentity
from c2c.language_model import LanguageModel, Receiver
from c2c.model import C2CModel
from c2c.systems.base import System, SystemOptions
from c2c.utils import file_hash, install_command, read_json_object, save_atomically
from c2c.version import __version__

MANIFEST = "c2c_adapter.json"
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_NAME = "default"


class AdapterError(C2CError, ValueError):
    """An adapter that can't be made, read or used, or a missing ``peft`` library."""


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Find the linear layers of a model's decoder, by name: all of attention and MLP, not the language-model head.

    Raises:
        AdapterError: there are none.
    """
    decoder: nn.Module = model.get_decoder()
    found = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    if not found:
        raise AdapterError(f"{type(model).__name__} has no linear layers in its decoder; LoRA needs some.")
    return found


def parameters_per_rank(model: PreTrainedModel) -> int:
    """Count the parameters of one more rank: one row and one column per linear layer."""
    return sum(layer.in_features + layer.out_features for layer in linear_layers(model).values())


def nearest_rank(model: PreTrainedModel, parameters: int) -> int:
    """Choose the rank whose adapter has nearest to so many parameters, at least 1.

    Raises:
        AdapterError: ``parameters`` is not positive.
    """
    if parameters < 1:
        raise AdapterError(f"an adapter of {parameters} parameters was asked for; expected at least one.")
    return max(1, round(parameters / parameters_per_rank(model)))


def new_adapter(receiver: LanguageModel, rank: int) -> Any:
    """Put a new adapter into a receiver, whose own weights stay frozen; it changes no output yet.

    Scaling is 2 (``lora_alpha = 2 * rank``) and there is no dropout, since fusers have none.

    Args:
        receiver: its linear layers are wrapped in place.
        rank: of every linear layer.

    Returns:
        A ``peft.PeftModel``.

    Raises:
        AdapterError: rank is not a whole number from 1 on; ``peft`` is missing.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"the adapter's rank is {rank!r}; expected a whole number from 1 on.")
    peft = _peft()
    _ = receiver.geometry  # read before the layers are wrapped
    names = sorted({name.rpartition(".")[2] for name in linear_layers(receiver.model)})
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")
    return _wrap(receiver.model, config)


def trainable(adapter: Any) -> Iterator[nn.Parameter]:
    """Iterate over the parameters of an adapter, without those of its receiver."""
    return (parameter for parameter in adapter.parameters() if parameter.requires_grad)


def save_adapter(adapter: Any, receiver: LanguageModel, folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Write a folder that ``peft`` reads, with a manifest (``c2c_adapter.json``) that says for whom it is.

    Files are complete or absent, and the manifest has the weights' hash: a kill leaves no half adapter that loads.
    ``facts`` are added to the manifest.
    """
    config = copy.copy(adapter.peft_config[_NAME])
    # not the folder it was loaded from, which is nobody else's business; and sets have no order
    config.base_model_name_or_path, config.inference_mode = receiver.name, True
    config.target_modules = sorted(config.target_modules)
    with adapter.disable_adapter():
        made_for = receiver.identity.to_dict()
    manifest = {
        "c2c_version": __version__,
        "receiver": made_for,
        "rank": config.r,
        "parameters": sum(parameter.numel() for parameter in trainable(adapter)),
        **(facts or {}),
    }

    def write(temporary: str) -> None:
        config.save_pretrained(temporary)
        weights = Path(temporary) / _WEIGHTS
        save_file(_state(adapter), weights, metadata={"format": "pt"})
        text = json.dumps(manifest | {"weights": file_hash(weights)}, indent=2) + "\n"
        (Path(temporary) / MANIFEST).write_text(text, encoding="utf-8")

    save_atomically(folder, write)


def restore_adapter(adapter: Any, folder: Path) -> None:
    """Read the weights that :func:`save_adapter` wrote into an adapter of the same shape.

    Raises:
        AdapterError: missing, broken, or of another shape.
    """
    try:
        stored = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder} holds no whole adapter: {error}") from error
    expected, given = ({name: tensor.shape for name, tensor in part.items()} for part in (_state(adapter), stored))
    if expected != given:
        raise AdapterError(f"{folder / _WEIGHTS} does not fit this receiver and {_CONFIG}: other layers or rank.")
    _peft().set_peft_model_state_dict(adapter, stored, adapter_name=_NAME)


def describe(folder: str | Path) -> dict[str, Any]:
    """Read the manifest of an adapter: receiver, rank, parameters, training and dev scores.

    Raises:
        AdapterError: no adapter, or its weights are not those that the manifest was written with.
    """
    folder = Path(folder).expanduser()
    manifest = read_json_object(folder / MANIFEST, AdapterError)
    if missing := {"receiver", "rank", "parameters", "weights"} - set(manifest):
        raise AdapterError(f"{folder / MANIFEST} lacks {sorted(missing)}.")
    weights = folder / _WEIGHTS
    if not weights.is_file() or file_hash(weights) != manifest["weights"]:
        raise AdapterError(f"{weights} is missing or not what {MANIFEST} was written with. Train or copy it again.")
    return manifest


def load_adapter(
    folder: str | Path,
    receiver: Any = None,
    dtype: Any = None,
    device_map: Any = None,
    allow_mismatch: bool = False,
) -> LanguageModel:
    """Load a receiver with an adapter merged into its weights.

    Args:
        folder: what training wrote.
        receiver: alias, hub id, folder, GGUF file, loaded model or :class:`LanguageModel`, in place of the recorded
            one. A loaded one is copied and stays as it is.
        dtype: of the receiver; merged weights are rounded to it.
        device_map: as in ``from_pretrained``.
        allow_mismatch: accept other weights, tokenizers or templates of the same structure.

    Raises:
        AdapterError: the folder holds no whole adapter; ``peft`` is missing.
        MismatchError: made for another receiver; lists every difference.
        ModelLoadError: the receiver can't be loaded.
    """
    folder = Path(folder).expanduser()
    manifest = describe(folder)
    peft = _peft()
    expected = ModelIdentity.from_dict(manifest["receiver"])
    if receiver is not None and not isinstance(receiver, str | Path):
        given = receiver if isinstance(receiver, LanguageModel) else Receiver(receiver)
        model = copy.deepcopy(given.model)
        ours = Receiver(model if dtype is None else model.to(dtype), given.tokenizer, given.name)
    else:
        ours = Receiver.from_pretrained(receiver or expected.name, dtype=dtype, device_map=device_map)
    identity.check([("receiver", expected, ours.identity)], allow_mismatch, what="adapter")
    config = peft.LoraConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # informative; peft warns where the model now lies elsewhere
    adapter = _wrap(ours.model, config)
    restore_adapter(adapter, folder)
    return Receiver(adapter.merge_and_unload(), ours.tokenizer, f"{ours.name} with adapter")


def _wrap(model: PreTrainedModel, config: Any) -> Any:
    with warnings.catch_warnings():
        # peft asks transformers 5 for it by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return _peft().get_peft_model(model, config)


def _state(adapter: Any) -> dict[str, torch.Tensor]:
    state = _peft().get_peft_model_state_dict(adapter, adapter_name=_NAME, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise AdapterError(f"adapters need the peft library ({error}): {install_command('adapter')}.") from error
    return peft


class Lora(System):
    """Answer with the receiver that carries a LoRA adapter: what training gains without any sharer."""

    name: ClassVar[str] = "adapter"
    title: ClassVar[str] = "receiver with a LoRA adapter"
    reads_context: ClassVar[bool] = False

    def __init__(self, model: C2CModel, options: SystemOptions | None = None) -> None:
        super().__init__(model, options)
        self._adapted = load_adapter(self.options.adapter or "", model.receiver)

    @classmethod
    def unavailable(cls, model: C2CModel, options: SystemOptions) -> str | None:
        """Return why not: an adapter's folder must be named."""
        return None if options.adapter else "no adapter is named; give its folder (adapter=..., --adapter)."

    @property
    def language_model(self) -> LanguageModel:
        """The model that answers."""
        return self._adapted
