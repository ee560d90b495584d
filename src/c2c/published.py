"""Published checkpoints: ``projector_*.pt`` and ``projector_*.json`` to one fuser.

The format is described in ``docs/formats.md``. Weights are read with ``weights_only=True``: nothing in them is run.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from c2c.errors import FuserError
from c2c.fusers.c2c import C2CFuser, C2CFuserConfig
from c2c.kv_cache import KVGeometry
from c2c.loading import parse_dtype
from c2c.utils import read_json_object

_OPTIONS = C2CFuserConfig.__annotations__.keys() - {"gate_temperature"}  # of constructor arguments


def read_names(folder: str | Path) -> dict[str, str]:
    """Read what a checkpoint says of its models: names of ``receiver`` and ``sharer``, and the fusion ``mode``."""
    return published_names({"config": _training_config(_weights_folder(Path(folder)))})


def published_names(training: dict[str, Any] | None) -> dict[str, str]:
    """Return the same of an imported fuser, which keeps its checkpoint's configuration."""
    model = ((training or {}).get("config") or {}).get("model") or {}
    keys = {"receiver": "base_model", "sharer": "teacher_model", "mode": "multi_source_fusion_mode"}
    return {role: model[key] for role, key in keys.items() if model.get(key)}


def import_published(
    folder: str | Path,
    *,
    receiver: KVGeometry | None = None,
    sharer: KVGeometry | None = None,
    dtype: Any = None,
) -> C2CFuser:
    """Import a published checkpoint.

    Args:
        folder: the output folder of the published training script, its ``final`` or ``checkpoint-<step>`` subfolder,
            or any folder with the projector files.
        receiver: the receiver's cache geometry, where known; layer counts are not in the checkpoint.
        sharer: the sharer's cache geometry, where known.
        dtype: type of the fuser's weights; by default as stored.

    Raises:
        FuserError: files are missing, are of another fuser class, or have other shapes than they say.
    """
    weights = _weights_folder(Path(folder).expanduser())
    mapping = _mapping(weights)
    layers = max(max(mapping) + 1, receiver.layers if receiver else 0)
    used = max(source for source, _ in mapping.values()) + 1
    projectors = [mapping[i][1] for i in sorted(mapping)]
    shape = _arguments(weights, projectors)
    states = [_read_state(weights / f"projector_{number}.pt") for number in projectors]
    training = _training_config(weights)
    model = training.get("model", {})
    ours = KVGeometry(receiver.layers if receiver else layers, shape["target_num_heads"], shape["target_dim"])
    theirs = KVGeometry(sharer.layers if sharer else used, shape["source_num_heads"], shape["source_dim"])
    fuser = C2CFuser.from_geometry(
        theirs,
        ours,
        [mapping[i][0] if i in mapping else None for i in range(layers)],
        alignment={
            "name": "published",
            "strategy": model.get("alignment_strategy", "first"),
            "enabled": bool(model.get("is_do_alignment", False)),
        },
        training={"source": "published checkpoint", "config": training},
        gate_temperature=float(states[0].get("gate_temperature", 1.0)),
        **{name: value for name, value in shape.items() if name in _OPTIONS},
    )
    for number, projector, state in zip(projectors, fuser.layers, states, strict=True):
        values = {name: value for name, value in state.items() if name != "gate_temperature"}
        try:
            projector.to(dtype=next(iter(values.values())).dtype).load_state_dict(values)
        except RuntimeError as error:  # lists every difference
            raise FuserError(f"projector_{number}.pt does not fit its json: {error}") from error
    stored = next(value.dtype for name, value in states[0].items() if name.endswith(".weight"))
    asked = None if dtype == "auto" else parse_dtype(dtype)
    fuser.to(dtype=asked or stored)  # type: ignore[call-arg]
    fuser.eval()
    return fuser


def _weights_folder(folder: Path) -> Path:
    def step(path: Path) -> int:
        tail = path.name.rpartition("-")[2]
        return int(tail) if tail.isdigit() else -1

    for candidate in (folder, folder / "final", *sorted(folder.glob("checkpoint-*"), key=step, reverse=True)):
        if list(candidate.glob("projector_*.pt")):
            return candidate
    raise FuserError(
        f"{folder} holds no published checkpoint: expected projector_<i>.pt and projector_<i>.json in it, or in its "
        "'final' or 'checkpoint-<step>' subfolder."
    )


def _mapping(weights: Path) -> dict[int, tuple[int, int]]:
    """Read the map from receiver layer to (sharer layer, projector number)."""
    path = weights / "projector_config.json"
    table = read_json_object(path, FuserError)
    try:
        by_sharer = next(iter(table.values()))
        if len(by_sharer) != 1:
            raise FuserError(f"{path} names {len(by_sharer)} sharers; convert single-sharer checkpoints one by one.")
        layers = next(iter(by_sharer.values()))
        # of several pairs for a layer the published code uses the first
        result = {int(layer): (int(pairs[0][0]), int(pairs[0][1])) for layer, pairs in layers.items() if pairs}
    except (StopIteration, AttributeError, TypeError, IndexError, ValueError) as error:
        raise FuserError(
            f"{path} is not a layer map: expected {{receiver: {{sharer: {{layer: [[sharer layer, projector]]}}}}}}."
        ) from error
    if not result:
        raise FuserError(f"{path} maps no layer.")
    return result


def _arguments(weights: Path, projectors: list[int]) -> dict[str, Any]:
    """Read the constructor arguments that all projectors share."""
    found: dict[str, Any] = {}
    for number in projectors:
        path = weights / f"projector_{number}.json"
        data = read_json_object(path, FuserError)
        if str(data.get("class", "")).lower() != "c2cprojector":
            raise FuserError(f"{path} is a {data.get('class')!r}; only C2CProjector can be imported.")
        arguments = {key: value for key, value in data.get("init_args", {}).items() if key != "dtype"}
        if found and arguments != found:
            raise FuserError(f"{path} has other arguments than the projectors before it; one fuser has one shape.")
        found = arguments
    missing = [key for key in ("source_dim", "target_dim", "source_num_heads", "target_num_heads") if key not in found]
    if missing:
        # The published class has defaults of 1 head; guessing would load the weights into wrong heads.
        raise FuserError(f"projector_*.json in {weights} lacks {', '.join(missing)}.")
    return found


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FuserError(f"{path} is missing, though projector_config.json names it.")
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise FuserError(f"{path} can't be read safely (weights_only): {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FuserError(f"{path} holds no state dict: expected names with tensors, got {type(state).__name__}.")
    return state


def _training_config(weights: Path) -> dict[str, Any]:
    for path in (weights / "config.json", weights.parent / "config.json"):
        if path.exists():
            data: dict[str, Any] = read_json_object(path, FuserError)
            if "model" in data:
                return data
    return {}
