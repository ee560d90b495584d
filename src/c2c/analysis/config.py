"""Settings of the analyses: the single source of the options of ``c2c analyze``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from c2c.errors import C2CError

Method = Literal["pca", "tsne"]


class AnalysisError(C2CError, ValueError):
    """An analysis that can't be made of what was given."""


def _option(default: Any, text: str, **metadata: Any) -> Any:
    """Declare a field with its help text, which is also its documentation."""
    return field(default=default, metadata={"help": text} | metadata)


@dataclass(frozen=True, kw_only=True)
class ItemsConfig:
    """Settings of every analysis of items.

    Raises:
        AnalysisError: fewer than two items.
    """

    data: str = field(
        metadata={"help": 'JSONL file of multiple-choice items: "question", "choices", "answer" (index of the right one).'}
    )
    limit: int | None = _option(200, "At most this many items, drawn with the seed.", min=2)
    seed: int = _option(0, "Seed of the draw and of the bootstrap.")
    form: str = _option("letter", "Prompt form of the items: letter, published or sentence.")
    output_dir: str | None = _option(None, "Folder for the numbers (JSON) and the plot (SVG).")
    dtype: str | None = _option(None, "Dtype of the models' weights.")
    device_map: str | None = _option(None, "Device or device map of the models.")

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 2:
            raise AnalysisError(f"limit is {self.limit}; give at least 2 items, or None for all of them.")


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig(ItemsConfig):
    """Settings of an analysis of one fuser.

    Raises:
        AnalysisError: fewer than two items, in all or per batch.
    """

    fuser: str = field(metadata={"help": "Folder or hub id of the fuser."})
    batch_size: int = _option(8, "Items per batch; at least 2, because deranged needs another item's cache.", min=2)
    store_dir: str | None = _option(None, "Prefill store to read and fill; without it every prefill is computed.")
    store_budget_gb: float = _option(20.0, "Size of the prefill store, half of it for each model.", min=0)
    receiver: str | None = _option(None, "Receiver in place of the recorded one.")
    sharer: str | None = _option(None, "Sharer in place of the recorded one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 2:
            raise AnalysisError(f"batch_size is {self.batch_size}; give at least 2: deranged needs another item's cache.")


@dataclass(frozen=True, kw_only=True)
class CacheMapConfig(AnalysisConfig):
    """Settings of the cache map.

    Raises:
        AnalysisError: layers that are no numbers, an unknown method, or fewer than three points.
    """

    layers: str | None = _option(None, "Receiver layers, with commas (14,29); else the middle and the last fused one.")
    method: Method = _option("pca", "Projection of the picture.")
    points: int = _option(400, "At most this many positions in the picture.", min=3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and not all(part.strip().isdecimal() for part in self.layers.split(",")):
            raise AnalysisError(f"layers is {self.layers!r}; expected layer numbers with commas, for instance 14,29.")
        if self.method not in get_args(Method):
            raise AnalysisError(f"unknown method {self.method!r}. Known: {', '.join(get_args(Method))}.")
        if self.points < 3:
            raise AnalysisError(f"points is {self.points}; give at least 3.")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(AnalysisConfig):
    """Settings of the precision analysis."""

    unrounded: bool = _option(False, "Measure entries in the sharer's own dtype too; it prefills every prompt again.")


@dataclass(frozen=True, kw_only=True)
class EnrichmentConfig(ItemsConfig):
    """Settings of the cache-enrichment oracle, which needs one model and no fuser.

    Raises:
        AnalysisError: fewer than two items, or a negative number of exemplars.
    """

    model: str = field(metadata={"help": "Alias, hub id, folder or GGUF file of the model."})
    shots_data: str = field(metadata={"help": "JSONL file of the exemplars; questions that are in --data are left out."})
    shots: int = _option(5, "Exemplars, drawn with the seed, the same for all items.", min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots < 0:
            raise AnalysisError(f"shots is {self.shots}; give 0 or more.")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Settings of the comparison of sharers of different sizes.

    Attributes:
        results: result files of ``c2c eval``, or folders that hold ``result.json`` files.
        parameters: parameter counts by the sharer's name, where they are not known otherwise.
        output_dir: folder for the numbers and the plot.
    """

    results: Sequence[str]
    parameters: Mapping[str, float] | None = None
    output_dir: str | None = None


def check_data(path: str) -> Path:
    """Return the absolute path of a file of items.

    Raises:
        AnalysisError: there is no such file.
    """
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise AnalysisError(
            f'no such data file: {path}. Expected JSON lines with "question", "choices" and "answer" (the index of '
            "the right choice)."
        )
    return file
