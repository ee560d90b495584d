"""A server as a whole: its engine, limits, counters and handoffs."""

from __future__ import annotations

import time
from typing import Any
from weakref import WeakSet

from c2c.serving.engine import Ask, AskToRead, Engine, Way
from c2c.serving.errors import ApiError, shutting_down
from c2c.serving.handoffs import HandoffStore
from c2c.serving.metrics import Metrics
from c2c.serving.settings import Settings
from c2c.serving.ticket import Ticket


class Service:
    """What all requests share.

    Args:
        engine: answers.
        settings: limits and keys.

    Attributes:
        active: requests below ``/v1`` under way.
        ended: requests below ``/v1`` that have ended, however they did.
        draining: whether new ones are refused, because the server is about to end.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.active = self.ended = 0
        self.draining = False
        self.handoffs = HandoffStore(settings)
        self.metrics = Metrics(
            {
                ("c2c_queue_length", "Requests that wait."): lambda: engine.waiting,
                ("c2c_active_requests", "Requests under way, those that wait included."): lambda: self.active,
                ("c2c_handoffs", "Handoffs kept."): lambda: len(self.handoffs),
                ("c2c_handoff_bytes", "Bytes of all handoffs kept."): lambda: self.handoffs.nbytes,
            },
            lambda: engine.sharers,
        )
        engine.on_batch = self.metrics.batch
        self._tickets: WeakSet[Ticket] = WeakSet()
        self._created = int(time.time())
        ways = engine.description.ways
        name = settings.name
        self._ways = {name if way is Way.C2C else f"{name}/{way.value}": way for way in ways}

    @property
    def state(self) -> str:
        """``ok``, ``draining``, or ``dead`` where the engine can't answer any more."""
        if not self.engine.alive:
            return "dead"
        return "draining" if self.draining else "ok"

    def health(self) -> dict[str, Any]:
        """How the server and its sharers are; no names and no addresses, since everybody may ask."""
        sharers = [
            {"state": "ok"} if one.lost is None else {"state": "lost", "code": one.lost, "since": one.since}
            for one in self.engine.sharers
        ]
        return {"status": self.state, "waiting": self.engine.waiting, "active": self.active, "sharers": sharers}

    def submit(self, ask: Ask | AskToRead) -> Ticket:
        """Hand a request to the engine.

        Raises:
            ApiError: it is not accepted.
        """
        ticket = self.engine.submit(ask)
        self._tickets.add(ticket)
        return ticket

    def give_up(self) -> None:
        """Tell all requests under way that they get no answer (503)."""
        for ticket in list(self._tickets):
            ticket.fail(shutting_down())

    def way(self, model: str) -> Way:
        """Who answers for a model name.

        Raises:
            ApiError: unknown (404).
        """
        if model not in self._ways:
            raise ApiError(
                404,
                f"the model {model!r} does not exist. This server has {', '.join(self._ways)}.",
                code="model_not_found",
                param="model",
            )
        return self._ways[model]

    def models(self) -> list[dict[str, Any]]:
        """All model names, as clients list them."""
        return [self.card(name) for name in self._ways]

    def card(self, name: str) -> dict[str, Any]:
        """One of them.

        Raises:
            ApiError: unknown (404).
        """
        way, what = self.way(name), self.engine.description
        about = {
            "way": way.value,
            "receiver": what.receiver,
            "sharers": list(what.sharers),
            "context": what.context,
            "trained": what.trained,
        }
        return {"id": name, "object": "model", "created": self._created, "owned_by": "c2c", "c2c": about}
