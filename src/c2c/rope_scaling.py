"""Rotary scaling that depends on the length of the sequence: dynamic NTK and LongRoPE.

These models choose their frequencies anew in every forward pass, by the largest position in it. A prompt that is read
in parts would be rotated with other frequencies than the same prompt read at once, and one that follows a long prompt
with what that left behind (dynamic NTK only ever grows). Here all parts are rotated as the whole prompt is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_found: WeakKeyDictionary[PreTrainedModel, list[nn.Module]] = WeakKeyDictionary()


def switch_length(model: PreTrainedModel) -> int | None:
    """Return the number of tokens from which on the frequencies change; None where they never do."""
    lengths = [length for module in _rotary_modules(model) for length in _lengths(module)]
    return min(lengths) if lengths else None


@contextmanager
def prompt_length(model: PreTrainedModel, length: int | None) -> Iterator[None]:
    """Rotate as in one forward pass over ``length`` tokens, however few of them are read; None changes nothing."""
    modules = _rotary_modules(model) if length else []
    handles = []
    for module in modules:
        _reset(module)
        handles.append(module.register_forward_pre_hook(_add_last_position(int(length or 0) - 1), with_kwargs=True))
        handles.append(module.register_forward_hook(_drop_last_position))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rotary_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the rotary embeddings whose frequencies depend on the length."""
    if model not in _found:
        _found[model] = [module for module in model.modules() if list(_lengths(module))]
    return _found[model]


def _lengths(module: Any) -> Iterator[int]:
    """Yield the lengths at which a rotary embedding changes; nothing for other modules."""
    kinds = getattr(module, "rope_type", None)
    for name, kind in kinds.items() if isinstance(kinds, dict) else [("", kinds)]:
        if not isinstance(kind, str):
            continue
        if "dynamic" in kind:
            yield int(module.original_max_seq_len)
        elif kind == "longrope":
            parameters = module.config.rope_parameters
            yield int((parameters[name] if name else parameters)["original_max_position_embeddings"])


def _reset(module: Any) -> None:
    """Forget what a longer prompt left behind."""
    start = torch.zeros(1, 1, dtype=torch.long, device=module.inv_freq.device) if hasattr(module, "inv_freq") else None
    kinds = module.rope_type
    if start is not None:
        module(torch.empty(0, device=start.device), start)
    elif isinstance(kinds, dict):
        for name in kinds:
            device = getattr(module, f"{name}_inv_freq").device
            module(torch.empty(0, device=device), torch.zeros(1, 1, dtype=torch.long, device=device), name)


def _add_last_position(last: int) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions: Tensor = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        positions = torch.cat([positions, torch.full_like(positions[..., :1], last)], dim=-1)
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    return hook


def _drop_last_position(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = output
    return cos[..., :-1, :], sin[..., :-1, :]
