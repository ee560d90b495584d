"""Settings of the analyses, from which ``c2c analyze`` takes its options. Imports no torch."""

# ruff: noqa: RUF009 - option() returns a dataclass field
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from c2c.config import ConfigError, check_values, option
from c2c.errors import C2CError

Method = Literal["pca", "tsne"]


class AnalysisError(C2CError, ValueError):
    """An analysis that can't be made of what was given."""


@dataclass(frozen=True, kw_only=True)
class ItemsConfig:
    """Settings of every analysis of items; impossible values raise AnalysisError."""

    data: str = field(metadata={"help": "JSONL file of items: question, choices, answer (index of the right choice)."})
    limit: int | None = option(200, "At most this many items, drawn with the seed.", min=2)
    seed: int = option(0, "Seed of the draw and of the bootstrap.", min=0)
    form: str = option("letter", "Prompt form of the items: letter, published or sentence.")
    output_dir: str | None = option(None, "Folder for the numbers (JSON) and the plot (SVG).")
    dtype: str | None = option(None, "Dtype of the models' weights.")
    device_map: str | None = option(None, "Device or device map of the models.")

    def __post_init__(self) -> None:
        try:
            check_values(self)
        except ConfigError as error:
            raise AnalysisError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig(ItemsConfig):
    """Settings of an analysis of one fuser."""

    fuser: str = field(metadata={"help": "Folder or hub id of the fuser."})
    batch_size: int = option(8, "Items per batch; at least 2, because deranged needs another item's cache.", min=2)
    store_dir: str | None = option(None, "Prefill store to read and fill; without it every prefill is computed.")
    store_budget_gb: float = option(20.0, "Size of the prefill store, half of it for each model.", min=0)
    receiver: str | None = option(None, "Receiver in place of the recorded one.")
    sharer: str | None = option(None, "Sharer in place of the recorded one.")


@dataclass(frozen=True, kw_only=True)
class CacheMapConfig(AnalysisConfig):
    """Settings of the cache map; layers that are no numbers raise AnalysisError."""

    layers: str | None = option(None, "Receiver layers, with commas (14,29); else the middle and the last fused one.")
    method: Method = option("pca", "Projection of the plot.")
    points: int = option(400, "At most this many positions in the plot.", min=3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and not all(part.strip().isdecimal() for part in self.layers.split(",")):
            raise AnalysisError(f"layers is {self.layers!r}; expected layer numbers with commas, for instance 14,29.")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig(AnalysisConfig):
    """Settings of the precision analysis."""

    unrounded: bool = option(
        False, "Measure entries in the sharer's own dtype too; it prefills every prompt again.", flag="--unrounded"
    )


@dataclass(frozen=True, kw_only=True)
class EnrichmentConfig(ItemsConfig):
    """Settings of the cache-enrichment oracle, which needs one model and no fuser."""

    model: str = field(metadata={"help": "Alias, hub id, folder or GGUF file of the model."})
    shots_data: str = field(metadata={"help": "JSONL file of the exemplars; questions of --data are left out."})
    shots: int = option(5, "Exemplars, drawn with the seed, the same for all items.", min=0)


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Settings of the comparison of sharers of different sizes; ``parameters`` are counts by the sharer's name."""

    results: Sequence[str] = field(
        metadata={"help": "result.json files of c2c eval, or folders with them: one receiver, same items."}
    )
    parameters: Mapping[str, float] = field(default_factory=dict, metadata={"cli": False})
    output_dir: str | None = option(None, "Folder for the numbers (JSON) and the plot (SVG).")
