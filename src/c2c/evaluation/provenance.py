"""All that is needed to repeat an evaluation: hashes, identities, versions, command."""

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

# Places on a machine, and what may be added later: they don't make it another evaluation.
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
    """Facts about an evaluation, and under ``key`` a hash of those that decide its answers."""
    facts = {
        "fuser": fuser_hash(config.fuser),
        "receiver": pair.model.receiver.identity.to_dict(),
        "sharer": pair.sharer.identity.to_dict(),
        "data": {short(s): _hash(s, config) for s in (*config.data, *config.dev)},
        "config": {name: value for name, value in config.to_dict().items() if name not in _NOT_COMPARED}
        | {name: [_portable(s) for s in getattr(config, name)] for name in ("data", "dev")},
    }
    return facts | {
        "systems": list(config.systems),
        "fusers": {name: fuser_hash(folder) for name, folder in config.fusers.items()},
        "training": training_facts(pair.model.fusers[0]),
        "key": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        "command": command(),
        "versions": versions(),
    }


def short(source: DataSource) -> str:
    """A file by its folder and name: what tells tasks apart in a table, and not where they lie on this machine."""
    if source.path is not None:
        return short_path(source.name)
    return f"{source.name}/{source.subset}" if source.subset not in (None, "*") else source.name


def _hash(source: DataSource, config: EvalConfig) -> str | None:
    return file_hash(Path(config.data_dir) / source.path) if source.path is not None else None


def _portable(source: DataSource) -> dict[str, Any]:
    return dataclasses.asdict(source) | {"path": short(source)}
