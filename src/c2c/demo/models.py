"""Models of the demo: loaded on demand, one pair at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from c2c.demo.fusers import FuserChoice
from c2c.errors import C2CError, ModelLoadError

if TYPE_CHECKING:
    from c2c.model import C2CModel


class ModelCache:
    """Keep the two models that were used last and every fuser between them; arguments as in ``from_pretrained``."""

    def __init__(self, dtype: Any = None, device_map: Any = None, allow_mismatch: bool = False) -> None:
        self._load_options = {"dtype": dtype, "device_map": device_map}
        self._allow_mismatch = allow_mismatch
        self._lock = Lock()
        self._models: dict[tuple[str, str], Any] = {}
        self._pairs: dict[str, C2CModel] = {}
        self._seconds: dict[str, float] = {}

    @contextmanager
    def use(self, choice: FuserChoice) -> Iterator[C2CModel]:
        """Load a pair where it is not loaded, and hold it; raise C2CError where it can't be, until the next use.

        Others wait: Gradio runs one event at a time, but gives way to the next before a cancelled one has ended.
        """
        with self._lock:
            if choice.source not in self._pairs:
                began = time.perf_counter()
                try:
                    self._pairs[choice.source] = self._load(choice)
                except C2CError:
                    raise
                except Exception as error:  # whatever it is, the page must show it and go on
                    raise ModelLoadError(f"{type(error).__name__}: {error}") from error
                self._seconds[choice.source] = time.perf_counter() - began
            yield self._pairs[choice.source]

    def seconds(self, choice: FuserChoice) -> float | None:
        """Return how long a pair took to load; None where it is not loaded."""
        return self._seconds.get(choice.source)

    def _load(self, choice: FuserChoice) -> C2CModel:
        from c2c.language_model import Receiver, Sharer
        from c2c.model import C2CModel

        kinds = {("receiver", choice.receiver): Receiver, ("sharer", choice.sharer): Sharer}
        if self._models.keys() - kinds:  # two pairs may not fit into memory
            self._models = {key: model for key, model in self._models.items() if key in kinds}
            self._pairs.clear()
            self._seconds.clear()
        for key, kind in kinds.items():
            if key not in self._models:
                self._models[key] = kind.from_pretrained(key[1], **self._load_options)
        models = {role: self._models[role, name] for role, name in kinds}
        return C2CModel.from_pretrained(choice.source, **models, allow_mismatch=self._allow_mismatch)
