"""Loads pairs in the background, one at a time, and tells how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any

from c2c.demo.choice import Choice
from c2c.demo.errors import DemoError
from c2c.errors import C2CError

if TYPE_CHECKING:
    from c2c.model import C2CModel

Load = Callable[[Choice, dict[str, Any]], "C2CModel"]


class Stage(StrEnum):
    """How far a pair is."""

    NOT_LOADED = "not loaded"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class Status:
    """How far a pair is, for the page.

    Attributes:
        stage: what is being done.
        seconds: how long it has taken, so far or in all.
        error: why it failed, in plain words.
    """

    stage: Stage
    seconds: float = 0.0
    error: str = ""


class Loader:
    """Keeps the models of the pair that was asked for last, and every fuser between these two.

    Args:
        load: makes a model of a choice; is given the language models that are there, by role and name, to use and to
            add to.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._changed = Condition()
        self._status: dict[str, Status] = {}
        self._began: dict[str, float] = {}
        self._pairs: dict[str, C2CModel] = {}
        self._parts: dict[str, Any] = {}
        self._busy = False

    def start(self, choice: Choice) -> None:
        """Begin to load in the background, unless it is loaded or under way."""
        with self._changed:
            if self.status(choice).stage in (Stage.LOADING, Stage.READY):
                return
            self._began[choice.source] = time.perf_counter()
            self._status[choice.source] = Status(Stage.LOADING)
        Thread(target=self._run, args=(choice,), daemon=True).start()

    def status(self, choice: Choice) -> Status:
        """How far a pair is."""
        found = self._status.get(choice.source, Status(Stage.NOT_LOADED))
        if found.stage is Stage.LOADING:
            return Status(Stage.LOADING, time.perf_counter() - self._began[choice.source])
        return found

    def get(self, choice: Choice, timeout: float) -> C2CModel | None:
        """The model of a choice that was started; None where it is not there in so many seconds.

        Raises:
            DemoError: it can't be loaded; says why.
        """
        self.pause(choice, timeout)
        status = self.status(choice)
        if status.stage is Stage.FAILED:
            raise DemoError(status.error)
        if status.stage is Stage.NOT_LOADED:  # had to make room for another pair meanwhile
            self.start(choice)
        return self._pairs.get(choice.source)

    def pause(self, choice: Choice, timeout: float) -> None:
        """Wait until a choice is loaded or has failed, at most so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.status(choice).stage is not Stage.LOADING, timeout)

    def _run(self, choice: Choice) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            self._busy = True
            self._make_room(choice)
        error = ""
        try:
            self._pairs[choice.source] = self._load(choice, self._parts)
        except C2CError as refused:
            error = str(refused)
        except Exception as unforeseen:  # whatever it is, the page must say it and go on
            error = f"{type(unforeseen).__name__}: {unforeseen}"
        with self._changed:
            stage = Stage.FAILED if error else Stage.READY
            self._status[choice.source] = Status(stage, time.perf_counter() - self._began[choice.source], error)
            self._busy = False
            self._changed.notify_all()

    def _make_room(self, choice: Choice) -> None:
        """Let go of models that this pair does not use: two pairs at a time may not fit."""
        needed = {f"receiver {choice.receiver}", f"sharer {choice.sharer}"}
        if set(self._parts) - needed:
            self._parts = {key: part for key, part in self._parts.items() if key in needed}
            self._pairs.clear()
            for source, status in list(self._status.items()):
                if status.stage is Stage.READY:
                    del self._status[source]


def loading(**options: Any) -> Load:
    """How pairs are loaded; ``options`` are those of :meth:`c2c.C2CModel.from_pretrained`."""

    def load(choice: Choice, parts: dict[str, Any]) -> C2CModel:
        from c2c.language_model import Receiver, Sharer
        from c2c.model import C2CModel

        kwargs = {name: options[name] for name in ("dtype", "device_map") if name in options}
        for key, kind, name in (
            (f"receiver {choice.receiver}", Receiver, choice.receiver),
            (f"sharer {choice.sharer}", Sharer, choice.sharer),
        ):
            if key not in parts:
                parts[key] = kind.from_pretrained(name, **kwargs)
        return C2CModel.from_pretrained(
            choice.source,
            receiver=parts[f"receiver {choice.receiver}"],
            sharer=parts[f"sharer {choice.sharer}"],
            allow_mismatch=options.get("allow_mismatch", False),
        )

    return load
