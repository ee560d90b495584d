"""Layer maps: which sharer layer each receiver layer reads.

A layer map is a list with one entry per receiver layer, the sharer layer that it reads or None for a layer that is
not fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from c2c.errors import FuserError

LayerMap = list[int | None]


def terminal(receiver_layers: int, sharer_layers: int) -> LayerMap:
    """Map the last layer to the last and so on; the paper's choice (Cache-to-Cache, section 3.3).

    With a shallower sharer the first receiver layers all read its layer 0.
    """
    offset = sharer_layers - receiver_layers
    return [min(max(offset + index, 0), sharer_layers - 1) for index in range(receiver_layers)]


def depth_normalised(receiver_layers: int, sharer_layers: int) -> LayerMap:
    """Map each receiver layer to the sharer layer nearest in relative depth; to the lower one where two are as near.

    Layers lie at ``i / (n - 1)`` in [0, 1]. Called ``k_nearest`` in the published code; ties are decided by the
    rounding of these floats, as there.
    """

    ours, theirs = ([index / max(n - 1, 1) for index in range(n)] for n in (receiver_layers, sharer_layers))
    return [min(range(sharer_layers), key=lambda layer: abs(theirs[layer] - here)) for here in ours]


NAMED: dict[str, Callable[[int, int], LayerMap]] = {
    "terminal": terminal,
    "depth": depth_normalised,
    # the names of the published code
    "last_aligned": terminal,
    "k_nearest": depth_normalised,
}


def layer_map(spec: str | Sequence[int | None], receiver_layers: int, sharer_layers: int) -> LayerMap:
    """Make a layer map from its name (``terminal``, ``depth``) or an explicit list.

    Raises:
        FuserError: unknown name, wrong length, or a sharer layer that does not exist.
    """
    if isinstance(spec, str):
        if spec not in NAMED:
            raise FuserError(f"unknown layer map {spec!r}. Known: {', '.join(NAMED)}, or a list of sharer layers.")
        return NAMED[spec](receiver_layers, sharer_layers)
    result = list(spec)
    if len(result) != receiver_layers:
        raise FuserError(
            f"layer map has {len(result)} entries, the receiver has {receiver_layers} layers: give one entry per "
            "receiver layer, None for a layer that is not fused."
        )
    wrong = [entry for entry in result if entry is not None and not 0 <= entry < sharer_layers]
    if wrong:
        raise FuserError(f"layer map names sharer layers {wrong}; the sharer has layers 0 to {sharer_layers - 1}.")
    if all(entry is None for entry in result):
        raise FuserError("layer map fuses no layer at all: give at least one sharer layer.")
    return result
