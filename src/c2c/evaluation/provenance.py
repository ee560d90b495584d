"""Provenance of an evaluation: all that is needed to repeat it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from c2c.data.config import DataSource
from c2c.evaluation.config import EvalConfig
from c2c.evaluation.pair import Pair
from c2c.fusers.base import fuser_hash, training_facts
from c2c.utils import command, file_hash, short_path, versions

# Paths of a machine, and what may be added later: they do not make it another evaluation.
_NOT_COMPARED = (
    "output_dir",
    "reuse",
    "store_dir",
    "store_budget_gb",
    "data_dir",
    "fuser",
    "device_map",
    "systems",
    "fusers",
    "adapter",
    "routed",
    "timed",
)


def provenance(config: EvalConfig, pair: Pair) -> dict[str, Any]:
    """Return hashes, identities, versions and command, and under ``key`` a hash of what determines the answers."""
    compared = {name: value for name, value in config.to_dict().items() if name not in _NOT_COMPARED}
    for name in ("data", "dev"):
        compared[name] = [dataclasses.asdict(s) | {"path": source_name(s)} for s in getattr(config, name)]
    facts = {
        "fuser": fuser_hash(config.fuser),
        "receiver": pair.receiver.identity.to_dict(),
        "sharer": pair.sharer.identity.to_dict(),
        "data": {source_name(source): _hash(source, config) for source in (*config.data, *config.dev)},
        "config": compared,
    }
    return facts | {
        "systems": list(config.systems),
        "fusers": {name: fuser_hash(folder) for name, folder in config.fusers.items()},
        "training": training_facts(pair.model.fusers[0]),
        "key": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        "command": command(),
        "versions": versions(),
    }


def source_name(source: DataSource) -> str:
    """Return a file's folder and name, which tell tasks apart without the folders of a machine; or the data set."""
    if source.path is not None:
        return short_path(source.name)
    return f"{source.name}/{source.subset}" if source.subset not in (None, "*") else source.name


def _hash(source: DataSource, config: EvalConfig) -> str | None:
    return file_hash(Path(config.data_dir) / source.path) if source.path is not None else None
