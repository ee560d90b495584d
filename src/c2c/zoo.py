"""Where trained fusers are looked for when none is named; without torch, since ``--help`` and pages must not wait."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def fuser_folders() -> list[Path]:
    """Return the folders of fusers in ``$C2C_FUSERS``, in ``zoo/`` here, and in the clone that this is installed from.

    ``$C2C_FUSERS`` names folders of fusers, separated as in ``$PATH``. Each fuser is listed once, sorted by name within
    its place.
    """
    named = [Path(part).expanduser() for part in os.environ.get("C2C_FUSERS", "").split(os.pathsep) if part]
    places = [*named, Path("zoo"), Path(__file__).resolve().parents[2] / "zoo"]
    found = {path.parent.resolve(): path.parent for place in places for path in sorted(place.glob("*/config.json"))}
    return list(found.values())


def trained_kinds(config: dict[str, Any]) -> set[str]:
    """Return the kinds of rows that a fuser was trained on, such as ``multiple_choice``, by its config."""
    settings = (config.get("training") or {}).get("config")
    rows = (settings.get("train") if isinstance(settings, dict) else None) or []
    return {str(row.get("kind")) for row in rows if isinstance(row, dict)}
