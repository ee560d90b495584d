"""What a fused cache is made of, and what of it matters: the measurements of the Cache-to-Cache paper for any fuser."""

from c2c.analysis.enrichment import EnrichmentSettings, measure_enrichment
from c2c.analysis.gates import measure_gates
from c2c.analysis.layers import measure_layers
from c2c.analysis.maps import draw_cache_map
from c2c.analysis.precision import measure_precision
from c2c.analysis.progressive import measure_progressive
from c2c.analysis.rank import effective_rank, measure_ranks
from c2c.analysis.scaling import measure_scaling
from c2c.analysis.settings import AnalysisError, Settings

__all__ = [
    "AnalysisError",
    "EnrichmentSettings",
    "Settings",
    "draw_cache_map",
    "effective_rank",
    "measure_enrichment",
    "measure_gates",
    "measure_layers",
    "measure_precision",
    "measure_progressive",
    "measure_ranks",
    "measure_scaling",
]
