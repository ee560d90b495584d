"""One base model in memory under several LoRA adapters: module trees of their own around the same weights.

Adapters are not switched on and off. Each has its own tree, so that a sharer reads under one adapter while a receiver
answers under another, in any thread, and a model's identity is that of its own adapter.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from c2c.checkpoint import add_adapter
from c2c.errors import ModelLoadError

_bases: WeakKeyDictionary[PreTrainedModel, PreTrainedModel] = WeakKeyDictionary()


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the modules of a model around the same tensors: megabytes, whatever its size.

    What is loaded into the copy, moved or freed leaves the model alone; values written in place are seen by both.

    Raises:
        ModelLoadError: weights lie on a disk or on the host between uses, as for a model larger than its device.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ModelLoadError(
            f"the weights of {model.config._name_or_path} are not all in memory, so they can't be shared between "
            "adapters. Load the model without offloading (device_map='cuda' or 'cpu')."
        )
    shared: dict[int, Any] = {id(buffer): buffer for buffer in _stored_buffers(model)}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    return copy.deepcopy(model, shared)


def _stored_buffers(model: nn.Module) -> list[Any]:
    """Return the buffers of a checkpoint; others are small tables, which some models write to in a forward pass."""
    return [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model without the adapter that :func:`with_adapter` gave it.

    Raises:
        ModelLoadError: it has one that was put into its own modules.
    """
    base = _bases.get(model, model)
    if getattr(base, "_hf_peft_config_loaded", False) or any(hasattr(module, "lora_A") for module in base.modules()):
        raise ModelLoadError(
            f"{base.config._name_or_path} has an adapter in its own modules already. Give its base model, and the "
            "adapter's folder as adapter=...."
        )
    return base


def with_adapter(model: PreTrainedModel, adapter: str | Path | None) -> PreTrainedModel:
    """Return the base of ``model`` under an adapter, or under none, around the same weights.

    Args:
        model: a base model, or what this function returned.
        adapter: folder of a PEFT adapter; None for the base alone.

    Raises:
        ModelLoadError: no such adapter, one that does not fit, or ``peft`` is missing.
    """
    base = base_of(model)
    if adapter is not None and not (Path(adapter).expanduser() / "adapter_config.json").is_file():
        raise ModelLoadError(f"no adapter in {adapter}: expected a folder with adapter_config.json, as PEFT writes it.")
    made = share_weights(base)
    if adapter is not None:
        add_adapter(made, str(Path(adapter).expanduser()), str(adapter))
    _bases[made] = base
    return made
