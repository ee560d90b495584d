"""What a fused cache is made of, and what of it matters: the measurements of the Cache-to-Cache paper for any fuser.

Functions load on first use, so that the command line reads the settings without importing torch.
"""

from importlib import import_module
from typing import Any

from c2c.analysis.config import (
    AnalysisConfig,
    AnalysisError,
    CacheMapConfig,
    EnrichmentConfig,
    PrecisionConfig,
    ScalingConfig,
)

_MODULES = {
    "capture_prompt": "capture",
    "effective_rank": "measures",
    "measure_cache_map": "measures",
    "measure_effective_rank": "measures",
    "measure_enrichment": "enrichment",
    "measure_gates": "measures",
    "measure_layers": "ablations",
    "measure_precision": "ablations",
    "measure_progressive": "ablations",
    "measure_scaling": "scaling",
}

__all__ = [
    "AnalysisConfig",
    "AnalysisError",
    "CacheMapConfig",
    "EnrichmentConfig",
    "PrecisionConfig",
    "ScalingConfig",
    *_MODULES,
]


def __getattr__(name: str) -> Any:
    """Import the module that holds ``name`` on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'c2c.analysis' has no attribute {name!r}")
    return getattr(import_module(f"c2c.analysis.{_MODULES[name]}"), name)
