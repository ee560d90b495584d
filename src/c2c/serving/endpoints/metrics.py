"""``/metrics``: metrics for Prometheus."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from c2c.serving.http_server import RequestRecord

if TYPE_CHECKING:
    from c2c.serving.app import Service
    from c2c.serving.engine import Engine

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
# Counters by system, with the fact of a request's record that each adds up.
_COUNTERS = {
    "prompt_tokens": ("c2c_prompt_tokens", "Tokens that answering models have read."),
    "completion_tokens": ("c2c_generated_tokens", "Tokens of answers."),
    "sharer_bytes": ("c2c_sharer_bytes", "Bytes from sharer to receiver: cache entries, or text."),
    "fallbacks": ("c2c_fallbacks", "Prompts that the receiver answered alone because a sharer was lost."),
}


def router(service: Service) -> APIRouter:
    """Return the route, and count from now on what the service does."""
    made, registry = APIRouter(), CollectorRegistry()
    requests = Counter("c2c_requests", "Requests that have ended.", ("system", "status"), registry=registry)
    by_system = partial(Histogram, labelnames=("system",), registry=registry)
    seconds = by_system("c2c_request_seconds", "Seconds of answered requests.", buckets=_SECONDS)
    first = by_system(
        "c2c_time_to_first_token_seconds", "Seconds to the first token, waiting included.", buckets=_SECONDS
    )
    rows = by_system("c2c_batch_answers", "Answers per batch.", buckets=_ROWS)
    counters = {fact: Counter(name, text, ("system",), registry=registry) for fact, (name, text) in _COUNTERS.items()}
    _add_gauges(service, registry)

    def count_request(record: RequestRecord) -> None:
        facts, system = record.facts, record.facts.get("system", "none")
        requests.labels(system, str(record.status)).inc()
        if "first_token_seconds" in facts:
            seconds.labels(system).observe(record.seconds)
            first.labels(system).observe(facts["first_token_seconds"])
            for fact, counter in counters.items():
                counter.labels(system).inc(facts.get(fact, 0))

    service.state.on_request = count_request
    service.engine.on_batch = lambda system, answers: rows.labels(system).observe(answers)

    @made.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=_CONTENT_TYPE)

    return made


def _add_gauges(service: Service, registry: CollectorRegistry) -> None:
    engine, store = service.engine, service.handoffs
    gauges = {
        "c2c_queue_length": lambda: engine.waiting,
        "c2c_active_requests": lambda: service.state.active,
        "c2c_handoffs": lambda: len(store),
        "c2c_handoff_bytes": lambda: store.nbytes,
    }
    for name, read in gauges.items():
        Gauge(name, "Current value.", registry=registry).set_function(read)
    up = Gauge("c2c_sharer_up", "1 unless the last request to this sharer failed.", ("sharer",), registry=registry)
    for index in range(len(engine.sharers)):
        up.labels(str(index)).set_function(partial(_up, engine, index))


def _up(engine: Engine, index: int) -> float:
    return float(engine.sharers[index]["state"] == "ok")
