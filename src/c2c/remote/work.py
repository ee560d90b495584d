"""What the server's model does for one order, in a thread of its own: layers go out as they are made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from c2c import kv_cache
from c2c.errors import C2CError
from c2c.fusers import Fuser
from c2c.handoff import Handoff
from c2c.kv_cache import KeyValue
from c2c.language_model import Sharer
from c2c.private_context import project
from c2c.remote.order import Order
from c2c.remote.watched_cache import WatchedCache


@dataclass(frozen=True)
class Begin:
    """The work has begun; ``drafted`` was written first."""

    drafted: list[int]


@dataclass(frozen=True)
class Layer:
    """Entries of one layer, and per row the columns of them that go out."""

    kind: str
    index: int
    entries: KeyValue
    columns: tuple[Tensor, ...]


@dataclass(frozen=True)
class End:
    """All is said; with ``error`` because it failed."""

    error: str | None = None
    code: str | None = None


Part = Begin | Layer | End


class Stopped(Exception):
    """Nobody waits for the work any more, or it took too long."""


class Work:
    """One order under way.

    Args:
        sharer: the model.
        fusers: those that can be projected with, by hash.
        order: what is asked.
        put: takes what goes out; called in the thread that runs the work.
        deadline: on the monotonic clock.
    """

    def __init__(
        self,
        sharer: Sharer,
        fusers: Mapping[str, Fuser],
        order: Order,
        put: Callable[[Part], Any],
        deadline: float,
    ) -> None:
        self._sharer, self._fusers, self._order, self._put = sharer, fusers, order, put
        self._deadline, self._stopped = deadline, threading.Event()

    def stop(self) -> None:
        """Give up at the next layer."""
        self._stopped.set()

    def run(self) -> None:
        """Do it, and say how it ended; raises nothing."""
        try:
            self._check()
            with torch.no_grad():
                self._work()
            self._put(End())
        except Stopped:
            self._put(
                End("the time limit of the server was reached. Ask for less, or start it with --timeout.", "timeout")
            )
        except C2CError as error:
            self._put(End(str(error), "refused"))
        except Exception as error:  # such as no memory; the server goes on
            self._put(End(f"the model failed: {type(error).__name__}.", "failed"))

    def _work(self) -> None:
        order = self._order
        if order.fuser is not None:
            self._project(self._fusers[order.fuser])
        elif order.draft_tokens:
            ids, layers = self._drafted()
            self._put(Begin(ids[order.tokens.length :]))
            columns = (self._with_draft(ids),)
            for index in order.layers:
                self._check()
                self._put(Layer("layer", index, layers[index], columns))
        else:
            self._put(Begin([]))
            self._prefill(self._send)

    def _prefill(self, made: Callable[[int, Tensor, Tensor], None]) -> Cache:
        return self._sharer.prefill(self._order.tokens, self._order.stop, WatchedCache(made))

    def _send(self, index: int, keys: Tensor, values: Tensor) -> None:
        self._check()
        if index in self._order.layers:
            self._put(Layer("layer", index, (keys, values), self._order.columns))

    def _drafted(self) -> tuple[list[int], list[KeyValue]]:
        watched = WatchedCache(lambda *_: self._check())
        ids, cache = self._sharer.draft(self._order.tokens, watched, self._order.draft_tokens)
        return ids, kv_cache.layers(cache)

    def _project(self, fuser: Fuser) -> None:
        order = self._order
        if order.draft_tokens:
            ids, layers = self._drafted()
        else:
            ids = order.tokens.ids[0].tolist()
            layers = kv_cache.layers(self._prefill(lambda *_: self._check()))
        handoff = Handoff.from_cache(self._sharer.identity, torch.tensor(ids), self._with_draft(ids), layers)
        entries = project(handoff, self._sharer, fuser).layers
        self._put(Begin(ids[order.tokens.length :]))
        for index, entry in enumerate(entries):
            self._put(Layer("entries", index, entry, (torch.arange(entry[0].shape[2]),)))

    def _with_draft(self, ids: list[int]) -> Tensor:
        return torch.cat([self._order.columns[0], torch.arange(self._order.tokens.length, len(ids))])

    def _check(self) -> None:
        if self._stopped.is_set() or time.monotonic() > self._deadline:
            raise Stopped
