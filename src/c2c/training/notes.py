"""Facts about prompts that are slow to find out, kept beside a model's prefills: what it believes, what it writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from c2c.training.store import PrefillStore
from c2c.utils import write_text


class Notes:
    """One file of facts about one model's prompts; in memory where the store has no folder.

    Args:
        store: whose folder holds the file; its key says which model and which tokens a fact is about.
        name: of the file.
    """

    def __init__(self, store: PrefillStore, name: str) -> None:
        self._store = store
        self._path = None if store.folder is None else Path(store.folder) / f"{name}.json"
        self._known: dict[str, Any] = self._read()

    def name(self, ids: Sequence[int], *about: Any) -> str:
        """What a fact about a prompt is found by; ``about`` is what it depends on besides."""
        return hashlib.sha256(json.dumps([self._store.key(ids), *about]).encode()).hexdigest()

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Any:
        return self._known[name]

    def add(self, facts: Mapping[str, Any]) -> None:
        """Keep facts, beside what other processes have written meanwhile."""
        self._known = self._read() | self._known | dict(facts)
        if self._path is not None:
            write_text(self._path, json.dumps(self._known))

    def _read(self) -> dict[str, Any]:
        read: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            read = json.loads(self._path.read_text(encoding="utf-8"))
        return read
