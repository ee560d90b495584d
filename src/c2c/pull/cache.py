"""The folders of pulled models."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from c2c.errors import ModelLoadError
from c2c.pull.aliases import find_alias

SOURCE_FILE = "c2c_source.json"


def cache_dir() -> Path:
    """``$C2C_CACHE``, else the user's cache folder; models lie under ``models/NAME`` in it."""
    chosen = os.environ.get("C2C_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("c2c", appauthor=False)


def model_dir(alias: str) -> Path:
    """Where the converted model of that name lies, or would."""
    return cache_dir() / "models" / alias


def download_dir(alias: str) -> Path:
    """Where the wheels and the GGUF of that name lie for a while."""
    return cache_dir() / "downloads" / alias


def gguf_path(alias: str) -> Path:
    """Where the joined GGUF of that name lies, if it was kept."""
    return download_dir(alias) / f"{alias}.gguf"


def lock_path(alias: str) -> Path:
    """The file that the process holds which pulls the model of that name."""
    return cache_dir() / "downloads" / f"{alias}.lock"


def is_pulled(alias: str) -> bool:
    """Whether the model of that name is in the cache, complete."""
    return (model_dir(alias) / SOURCE_FILE).is_file()


def local_path(alias: str) -> Path:
    """The folder of a pulled model, to be given to ``from_pretrained``.

    Raises:
        ModelLoadError: there is no such alias, or the model was not pulled yet.
    """
    find_alias(alias)
    if not is_pulled(alias):
        raise ModelLoadError(f"{alias} is not in the cache ({cache_dir()}); run: c2c pull {alias}")
    return model_dir(alias)
