"""A tokenizer as texts that cross the wire: no code and no pickle."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from c2c import pull
from c2c.errors import RemoteError
from c2c.pull.aliases import ALIASES

_NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def to_files(tokenizer: Any) -> dict[str, str]:
    """The files of a fast tokenizer by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = [Path(folder) / name for name in _NAMES]
        return {path.name: path.read_text(encoding="utf-8") for path in paths if path.exists()}


def from_files(files: Mapping[str, Any], url: str) -> Any:
    """The tokenizer in these files.

    Raises:
        RemoteError: files of other names, or no tokenizer.
    """
    strange = [name for name, text in files.items() if name not in _NAMES or not isinstance(text, str)]
    if strange:
        raise RemoteError(f"the sharer at {url} sent tokenizer files that are not expected: {strange}.", "malformed")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8", newline="")
        try:
            made = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # whatever a broken file makes it raise
            raise RemoteError(
                f"the tokenizer that the sharer at {url} sent can't be loaded: {error}. Pass tokenizer=... with a "
                "local one.",
                "tokenizer",
            ) from error
    return made


def from_source(source: Any) -> Any:
    """A tokenizer as given, or by alias, hub id or folder.

    Raises:
        RemoteError: there is none.
    """
    if not isinstance(source, str | Path):
        return source
    name = str(source)
    try:
        return AutoTokenizer.from_pretrained(pull.local_path(name) if name in ALIASES else name)
    except (OSError, ValueError, KeyError) as error:
        raise RemoteError(f"tokenizer={name!r} can't be loaded: {error}", "tokenizer") from error
