"""What fewer bits cost: accuracy when the sharer's entries cross in 16 or 8 bits, as they do from another machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache

from c2c import kv_cache
from c2c.alignment import Alignment
from c2c.analysis.drawing import done, dots, panels
from c2c.analysis.inputs import Subject
from c2c.analysis.record import check_output, publish
from c2c.analysis.scores import Right, accuracies, difference, right_answers
from c2c.analysis.settings import Settings
from c2c.handoff import Precision
from c2c.kv_cache import KeyValue
from c2c.remote.wire import native, pack, packed_bytes, spread, unpack
from c2c.reporting.canvas import Plot
from c2c.training.step import Batch, FuserTraining
from c2c.utils import OnProgress

NAME = "precision"
STORED: Precision = "bfloat16"  # what a prefill store keeps, so what fusers are trained and evaluated on
FEWER: tuple[Precision, ...] = ("int8", "float8")


def crossed(cache: Cache, alignment: Alignment, precision: Precision) -> DynamicCache:
    """A sharer's cache as it arrives from another machine: aligned columns rounded to a precision, no others.

    Args:
        cache: of the sharer; layers without tokens or heads stay as they are.
        alignment: which of its columns are read, by row.
        precision: on the wire; 8 bits have a scale for each channel of keys and each token of values.
    """
    columns = [alignment.sharer[alignment.rows == row].unique() for row in range(int(alignment.rows.max()) + 1)]
    counts = tuple(len(chosen) for chosen in columns)

    def rounded(keys: torch.Tensor, values: torch.Tensor) -> KeyValue:
        _, heads, _, width = keys.shape
        if not heads:
            return keys, values
        packed = pack((keys, values), columns, precision)
        return spread(unpack(packed, kv_cache.KVGeometry(1, heads, width), counts, precision), columns, keys)

    return kv_cache.from_layers(rounded(*layer) for layer in kv_cache.layers(cache))


def measure_precision(
    settings: Settings, progress: OnProgress | None = None, *, unrounded: bool = False
) -> dict[str, Any]:
    """Accuracy and bytes by the precision in which the sharer's entries cross.

    Stored prefills are in bfloat16, which is the first row. With ``unrounded`` the sharer reads every prompt again, and
    the first row is of its entries in its own type.

    Args:
        settings: what to measure on.
        progress: called with (stage, items done, items).
        unrounded: measure the entries as the sharer makes them, too.

    Returns:
        ``precisions``: a list of ``precision``, ``accuracy`` (percent) and ``ci95``, ``bytes`` (mean per item, of the
        aligned columns of the layers that are read, scales included), ``cost`` (this minus the first row, in ``points``
        with ``ci95``) and ``differ`` (percent of items that are right in one of both only); ``receiver`` and
        ``deranged``; ``G`` and ``P``: of the first row.

    Raises:
        AnalysisError: see :class:`~c2c.analysis.inputs.Subject`.
    """
    check_output(settings.output_dir)
    subject = Subject.open(settings, read_again=unrounded)
    own = cast(Precision, native(subject.model.sharers[0].dtype)) if unrounded else STORED
    names = tuple(dict.fromkeys((own, STORED, *FEWER)))
    right: dict[str, Right] = {}
    for batch in subject.batches("answering", progress):
        for name, answers in _answers(subject, batch, names, unrounded).items():
            right.setdefault(name, []).extend(answers)
    scores, seed = accuracies(right, settings.seed), settings.seed
    numbers: dict[str, Any] = {
        "precisions": [
            {"precision": name, "bytes": _bytes(subject, name)}
            | scores[name]
            | {
                "cost": difference(right[name], right[own], seed),
                "differ": 100 * sum(a != b for a, b in zip(right[name], right[own], strict=True)) / len(right[own]),
            }
            for name in names
        ],
        "receiver": scores["receiver"],
        "deranged": scores["deranged"],
        "G": difference(right[own], right["receiver"], seed),
        "P": difference(right[own], right["deranged"], seed),
    } | subject.facts(unrounded=unrounded)
    return publish(NAME, numbers, lambda: _draw(numbers), settings.output_dir)


@torch.no_grad()
def _answers(subject: Subject, batch: Batch, names: tuple[Precision, ...], unrounded: bool) -> dict[str, Right]:
    training = subject.training
    if unrounded:
        cache = subject.model.sharers[0].prefill(batch.sharer)
        batch = replace(batch, sharer_cache=kv_cache.from_layers(kv_cache.layers(cache)))
    answers = {
        "receiver": right_answers(training, batch, batch.receiver_cache),
        "deranged": right_answers(training, batch, training.fused(batch, "deranged")),
    }
    for name in names:
        answers[name] = right_answers(training, batch, _fused(training, batch, name))
    return answers


def _fused(training: FuserTraining, batch: Batch, precision: Precision) -> DynamicCache:
    arrived = crossed(batch.sharer_cache, batch.matched, precision)
    return training.fused(replace(batch, sharer_cache=arrived), "matched")


def _bytes(subject: Subject, precision: Precision) -> float:
    geometry, layers = subject.model.sharers[0].geometry, len(set(subject.fuser.config.source_layers))
    sizes = [
        packed_bytes(geometry, layers, len(example.alignment.sharer.unique()), precision)
        for example in subject.examples
    ]
    return sum(sizes) / len(sizes)


def _draw(numbers: Mapping[str, Any]) -> Plot:
    rows = {
        f"{one['precision']}, {one['bytes'] / 1e3:,.0f} kB": {key: one[key] for key in ("accuracy", "ci95")}
        for one in numbers["precisions"]
    }
    rows |= {"deranged": numbers["deranged"], "receiver alone": numbers["receiver"]}
    figure, (axes,) = panels(["Accuracy by what crosses"], [26.0 * len(rows)], left=136, right=44)
    dots(axes, rows, "matched")
    caption = f"{numbers['n']} questions, dots with 95 % intervals; kilobytes of the sharer's entries per question."
    return done(NAME, "Fewer bits", caption, figure)
