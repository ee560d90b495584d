"""Hashes of the weights that a model computes with: adapters that are active count, those that are off do not."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

_SAMPLES = 32  # values of each tensor in the fingerprint
_WATCHED = 4  # values of each tensor that are compared at every reading: writes through ``.data`` leave no other trace
_CHUNK = 1 << 20
_SMALLEST = 2.0**-16  # float16 holds every bfloat16 down to 2**-17; below, a value depends on the type of the weights
_COMPARED = 64  # values that are compared within rounding where one model is float16


class Named(NamedTuple):
    """A tensor with its own name, and the name of the part that it plays."""

    name: str
    part: str
    tensor: Tensor


@dataclass(frozen=True)
class WeightsHash:
    """Hashes of all weights.

    Attributes:
        fingerprint: hash of names, shapes and 32 values of each parameter, in bfloat16; None where weights are not in
            memory.
        values: ``checksum`` (of every value), ``dtype``, and ``sample`` (64 values, for a comparison within rounding).
        variant: active adapters and the quantization, for people; empty if there are none.
    """

    fingerprint: str | None
    values: dict[str, str] | None
    variant: str


class WeightsReader:
    """Hash the weights of one model; at the next call only those that changed since."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, bytes, bytes]] = {}  # name -> (state, checksum, samples)
        self._last: tuple[Any, WeightsHash] | None = None
        self._trace: _Trace | None = None

    def read(self, model: nn.Module) -> WeightsHash:
        """Return the hashes of what ``model`` computes with now: less than a millisecond where nothing changed."""
        if self._trace is not None and self._last is not None and self._trace.holds():
            return self._last[1]
        used, settings = _used(model)
        variant = _variant(model)
        if any(entry.tensor.is_meta for entry in used):
            return WeightsHash(None, None, variant)
        states = _states([entry.tensor for entry in used])
        state = (variant, settings, [(entry.name, entry.part) for entry in used], states)
        if self._last is None or self._last[0] != state:
            for entry, now in zip(used, states, strict=True):
                if entry.name not in self._known or self._known[entry.name][0] != now:
                    self._known[entry.name] = (now, _checksum(entry.tensor), _samples(entry.tensor))
            self._last = (state, self._join(model, used, settings, variant))
        # adapters are switched by attributes of their layers, which leave no trace
        self._trace = None if _adapter_layers(model)[0] else _Trace(model, [entry.tensor for entry in used])
        return self._last[1]

    def _join(self, model: nn.Module, used: list[Named], settings: list[str], variant: str) -> WeightsHash:
        parameters = {name for name, _ in model.named_parameters()}
        fingerprint, checksum = hashlib.sha256(), hashlib.sha256()
        sample = b""
        ordered = sorted((part, tuple(tensor.shape), *self._known[name][1:], name) for name, part, tensor in used)
        for part, shape, sums, samples, name in ordered:
            head = f"{part}{shape}".encode()
            checksum.update(head + sums)
            if name in parameters:
                fingerprint.update(head + samples)
                if len(shape) > 1:  # vectors are often alike in models that differ
                    sample += samples
        for line in settings:
            fingerprint.update(line.encode())
            checksum.update(line.encode())
        step = max(1, len(sample) // 2 // _COMPARED)
        spread = b"".join(sample[2 * index : 2 * index + 2] for index in range(0, len(sample) // 2, step))
        values = {
            "checksum": checksum.hexdigest()[:32],
            "dtype": str(getattr(model, "dtype", None)).removeprefix("torch."),
            "sample": spread[: 2 * _COMPARED].hex(),
        }
        return WeightsHash(fingerprint.hexdigest()[:32], values, variant)


class _Trace:
    """Notice that a model is not what it was: a module or tensor was replaced, or a tensor written to."""

    def __init__(self, model: nn.Module, tensors: list[Tensor]) -> None:
        holders = [holder for m in model.modules() for holder in (m._modules, m._parameters, m._buffers)]
        self._places = [(holder, name, held) for holder in holders for name, held in holder.items()]
        self._tensors = tensors
        groups: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.is_contiguous() and tensor.numel():
                plain = tensor.detach().view(torch.uint8) if tensor.element_size() == 1 else tensor.detach()
                flat = plain.view(-1)
                few = flat[:: max(1, flat.numel() // _WATCHED)][:_WATCHED]
                groups.setdefault((tensor.device, plain.dtype), []).append(few)
        self._watched = list(groups.values())
        self._state = self._read()

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return all(holder.get(name) is held for holder, name, held in self._places) and self._state == self._read()

    def _read(self) -> tuple[list[Any], list[bytes]]:
        """Read where the tensors lie, how often they were written to, and a few values: one copy for each type."""
        few = (torch.cat(views).cpu().view(torch.uint8).numpy().tobytes() for views in self._watched)
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._tensors], list(few)


def same_values(one: dict[str, str], other: dict[str, str]) -> bool:
    """Compare two ``values``: exactly, or within rounding where just one of the models is in float16.

    A float32 checkpoint that is loaded as float16 and then rounded to bfloat16 was rounded twice, and so a value in
    sixteen differs by its last bit.
    """
    if one["checksum"] == other["checksum"]:
        return True
    if one["dtype"] == other["dtype"] or "float16" not in (one["dtype"], other["dtype"]):
        return False
    if len(one["sample"]) != len(other["sample"]):
        return False
    bits = [torch.frombuffer(bytearray.fromhex(part["sample"]), dtype=torch.int16) for part in (one, other)]
    a, b = (_normal(part.view(torch.bfloat16)).view(torch.int16).int() for part in bits)
    return int((a - b).abs().max()) <= 1 and int((a != b).sum()) <= len(a) // 4


def _used(model: nn.Module) -> tuple[list[Named], list[str]]:
    """Return the tensors that take part in the computation now, and the settings of the active adapters."""
    layers, settings = _adapter_layers(model)
    used: list[Named] = []
    for name, tensor in _tensors(model):
        part: str | None = name
        for path in _above(name) if layers else ():
            if part is not None and path in layers:
                part = layers[path](part, f"{path}.")
        if part is not None:
            used += [Named(f"{name}{i or ''}", f"{part}{i or ''}", held) for i, held in enumerate(_inner(tensor))]
    return used, settings


def _above(name: str) -> Iterator[str]:
    """Iterate over the modules that hold a tensor, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over parameters and stored buffers; packed weights of quantized layers are often buffers."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        yield name, _offloaded(modules[path], own) if parameter.is_meta else parameter
    for path, module in modules.items():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _offloaded(module: nn.Module, name: str) -> Tensor:
    """Return a weight that accelerate keeps on the host while it is not used; on disk it stays unknown."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        kept = getattr(getattr(one, "weights_map", None), "dataset", {})
        held = (
            getattr(kept, "state_dict", kept).get(f"{getattr(one.weights_map, 'prefix', '')}{name}") if kept else None
        )
        if held is not None:
            return cast(Tensor, held)
    return module._parameters[name]  # type: ignore[return-value]


def _inner(tensor: Tensor) -> list[Tensor]:
    """Return what a tensor consists of: subclasses and quantized parameters hold several tensors."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _inner(getattr(tensor, name))]
    held = dict(vars(tensor))
    held |= vars(held["quant_state"]) if hasattr(held.get("quant_state"), "__dict__") else {}  # of bitsandbytes
    return [tensor, *(held[name] for name in sorted(held) if isinstance(held[name], Tensor))]


def _states(tensors: list[Tensor]) -> list[Any]:
    """Return for each tensor what changes when it is written to, or replaced: identity, version and a few values."""
    groups: dict[Any, list[int]] = {}
    tensors = [tensor.detach() for tensor in tensors]
    for index, tensor in enumerate(tensors):
        if tensor.is_contiguous() and tensor.numel():
            if tensor.element_size() == 1:
                tensors[index] = tensor = tensor.view(torch.uint8)
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    seen: dict[int, bytes] = {}
    for indices in groups.values():
        flat = [tensors[index].view(-1) for index in indices]
        few = torch.cat([values[:: max(1, len(values) // _WATCHED)][:_WATCHED] for values in flat])
        data = few.cpu().view(torch.uint8).numpy().tobytes()
        size, start = few.element_size(), 0
        for index, values in zip(indices, flat, strict=True):
            stop = start + size * min(_WATCHED, len(values))
            seen[index], start = data[start:stop], stop
    return [
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, seen.get(index))
        for index, tensor in enumerate(tensors)
    ]


def _normal(x: Tensor) -> Tensor:
    """Round to bfloat16, with zeros for what float16 can't hold exactly."""
    return nn.functional.hardshrink(x.to(torch.bfloat16), _SMALLEST)


def _checksum(tensor: Tensor) -> bytes:
    """Sum all values as integers: exact, whatever the order, and so the same on every device."""
    flat = tensor.detach().reshape(-1)
    rounded = tensor.is_floating_point() and tensor.element_size() > 1
    total = torch.zeros(16, dtype=torch.int64, device=flat.device)
    for part in flat.split(_CHUNK):
        if part.dtype == torch.float16:
            part = part.float()  # faster than to bfloat16 at once
        data = (_normal(part) if rounded else part.contiguous()).view(torch.uint8)
        if len(data) % 128 or data.storage_offset() % 8:
            data = nn.functional.pad(data, (0, -len(data) % 128)).clone()
        total += data.view(torch.int64).view(-1, 16).sum(0)  # wraps around
    return total.cpu().numpy().tobytes()


def _samples(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    sample = flat[::step][:_SAMPLES].to(device="cpu", dtype=torch.bfloat16).view(torch.int16)
    return sample.contiguous().numpy().tobytes()


# -- adapters -----------------------------------------------------------------------------------------------------


_Renaming = Callable[[str, str], str | None]


def _adapter_layers(model: nn.Module) -> tuple[dict[str, _Renaming], list[str]]:
    """Find the layers of ``peft``: what each makes of the names of its tensors, and the settings that are active."""
    if "peft" not in sys.modules:  # nobody can have made one
        return {}, []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    layers: dict[str, _Renaming] = {}
    settings: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            copies = (
                [] if module.disable_adapters else [n for n in module.active_adapters if n in module.modules_to_save]
            )
            layers[path] = partial(_part_of_copies, copies[0] if copies else None)
        elif isinstance(module, BaseTunerLayer):
            active = [] if module.disable_adapters or module.merged else sorted(set(module.active_adapters))
            layers[path] = partial(_part_of_layer, frozenset(active))
            if module.disable_adapters and module.merged:
                settings.append(f"{path} is merged and off")  # the next call takes the adapter out of the weights
            settings += [f"{path}.{line}" for name in active for line in _settings(module, name)]
    return layers, settings


def _settings(layer: Any, adapter: str) -> Iterator[str]:
    for name in layer.other_param_names:
        values = getattr(layer, name, None)
        value = values.get(adapter) if isinstance(values, dict) else None
        if isinstance(value, int | float | str | list) and name != "lora_alpha":  # it counts by the scaling alone
            yield f"{name}={value}"


def _part_of_layer(active: frozenset[str], name: str, prefix: str) -> str | None:
    """Return the name of a tensor as if the layer were no adapter's, None if it is not used now."""
    rest = name.removeprefix(prefix)
    if rest.startswith("base_layer."):
        return prefix + rest.removeprefix("base_layer.")
    words = rest.split(".")
    return prefix + ".".join("adapter" if word in active else word for word in words) if active & set(words) else None


def _part_of_copies(active: str | None, name: str, prefix: str) -> str | None:
    """Return the name of a tensor in the copy of a module that is active, None in the others."""
    chosen = prefix + ("original_module." if active is None else f"modules_to_save.{active}.")
    return prefix + name.removeprefix(chosen) if name.startswith(chosen) else None


def _active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters that change what the model computes."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return sorted({name for layer in layers if not layer.disable_adapters for name in layer.active_adapters})


def _variant(model: Any) -> str:
    """Name the active adapters and the quantization of a model."""
    words = [f"adapter {name}" for name in _active_adapters(model)]
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantization is not None:
        facts = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = facts.get("quant_method", "unknown")
        words.append(f"quantized by {getattr(method, 'value', method)}")
    return ", ".join(words)
