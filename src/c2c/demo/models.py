"""Models of the demo: loaded on demand, one pair at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from c2c.demo.fusers import FuserChoice
from c2c.errors import C2CError, ModelLoadError

if TYPE_CHECKING:
    from c2c.model import C2CModel


@dataclass(frozen=True)
class LoadStatus:
    """State of a pair.

    Attributes:
        state: of loading.
        seconds: that loading took.
        error: why it failed.
    """

    state: Literal["waiting", "loading", "ready", "failed"] = "waiting"
    seconds: float = 0.0
    error: str = ""


class ModelCache:
    """Keep the two models that were used last and every fuser between them.

    Args:
        dtype: of the models' weights.
        device_map: as in ``from_pretrained``.
        allow_mismatch: accept models with other weights than a fuser's.
    """

    def __init__(self, dtype: Any = None, device_map: Any = None, allow_mismatch: bool = False) -> None:
        self._load_options = {"dtype": dtype, "device_map": device_map}
        self._allow_mismatch = allow_mismatch
        self._lock = Lock()
        self._models: dict[tuple[str, str], Any] = {}
        self._pairs: dict[str, C2CModel] = {}
        self._status: dict[str, LoadStatus] = {}

    @contextmanager
    def use(self, choice: FuserChoice) -> Iterator[C2CModel]:
        """Load a pair where it is not loaded, and hold it: other users wait.

        Gradio's queue runs one event at a time, but gives way to the next before a cancelled one has ended.

        Raises:
            C2CError: the pair can't be loaded; the next use tries again.
        """
        with self._lock:
            if choice.source not in self._pairs:
                self._load(choice)
            yield self._pairs[choice.source]

    def status(self, choice: FuserChoice) -> LoadStatus:
        """Return the state of a pair."""
        return self._status.get(choice.source, LoadStatus())

    def _load(self, choice: FuserChoice) -> None:
        began = time.perf_counter()
        self._status[choice.source] = LoadStatus("loading")
        try:
            self._pairs[choice.source] = self._load_pair(choice)
        except Exception as error:
            known = isinstance(error, C2CError)
            refusal = error if known else ModelLoadError(f"{type(error).__name__}: {error}")
            self._status[choice.source] = LoadStatus("failed", error=str(refusal))
            raise refusal from (None if known else error)
        self._status[choice.source] = LoadStatus("ready", time.perf_counter() - began)

    def _load_pair(self, choice: FuserChoice) -> C2CModel:
        from c2c.language_model import Receiver, Sharer
        from c2c.model import C2CModel

        ours, theirs = ("receiver", choice.receiver), ("sharer", choice.sharer)
        if set(self._models) - {ours, theirs}:  # two pairs may not fit into memory
            self._models = {key: model for key, model in self._models.items() if key in (ours, theirs)}
            self._pairs.clear()
            self._status = {choice.source: LoadStatus("loading")}
        for (role, name), kind in ((ours, Receiver), (theirs, Sharer)):
            if (role, name) not in self._models:
                self._models[role, name] = kind.from_pretrained(name, **self._load_options)
        return C2CModel.from_pretrained(
            choice.source,
            receiver=self._models[ours],
            sharer=self._models[theirs],
            allow_mismatch=self._allow_mismatch,
        )
