"""All that is needed to repeat an analysis: hashes, identities, settings, versions, command."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from c2c.fusers import Fuser
from c2c.fusers.base import fuser_hash, training_facts
from c2c.utils import command, file_hash, short_path, versions

# Places on a machine: they don't make it another analysis.
_NOT_COMPARED = ("output_dir", "store_dir", "store_budget_gb", "fuser", "model", "data", "shots_data", "device_map")


def provenance(facts: Mapping[str, Any], settings: Any, files: Sequence[str]) -> dict[str, Any]:
    """Facts about an analysis, and under ``key`` a hash of those that decide its numbers.

    Args:
        facts: identities and hashes of what was analysed.
        settings: a dataclass.
        files: data files, each of which is hashed.
    """
    config = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _NOT_COMPARED}
    deciding = {
        **facts,
        "data": {short_path(name): file_hash(Path(name).expanduser()) for name in files},
        "config": config,
    }
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    return deciding | {"key": digest, "command": command(), "versions": versions()}


def fuser_facts(folder: str, fuser: Fuser) -> dict[str, Any]:
    """Hash of a fuser's weights, and what it was trained with, without its lists of data."""
    return {"fuser": fuser_hash(folder), "training": training_facts(fuser)}
