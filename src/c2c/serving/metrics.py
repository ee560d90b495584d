"""Metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from c2c.serving.engine import SharerHealth
from c2c.serving.http_app import RequestRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
# Counters by system, with the fact of a request's record that each adds up.
_COUNTERS = {
    "prompt_tokens": ("c2c_prompt_tokens", "Tokens that answering models have read."),
    "completion_tokens": ("c2c_generated_tokens", "Tokens of answers."),
    "sharer_bytes": ("c2c_sharer_bytes", "Bytes from sharer to receiver: cache entries, or text."),
    "fallbacks": ("c2c_fallbacks", "Prompts that the receiver answered alone because a sharer was lost."),
}


class Metrics:
    """Count what a server does, in a registry of its own.

    Args:
        gauges: functions that read current values, by metric name.
        sharers: reads the health of the sharers.
    """

    def __init__(
        self, gauges: Mapping[str, Callable[[], float]], sharers: Callable[[], Sequence[SharerHealth]]
    ) -> None:
        self._registry = registry = CollectorRegistry()
        by_system = partial(Histogram, labelnames=("system",), registry=registry)
        self._requests = Counter("c2c_requests", "Requests that have ended.", ("system", "status"), registry=registry)
        self._seconds = by_system("c2c_request_seconds", "Seconds of answered requests.", buckets=_SECONDS)
        self._first = by_system(
            "c2c_time_to_first_token_seconds", "Seconds to the first token, waiting included.", buckets=_SECONDS
        )
        self._rows = by_system("c2c_batch_answers", "Answers per batch.", buckets=_ROWS)
        self._counters = {
            fact: Counter(name, text, ("system",), registry=registry) for fact, (name, text) in _COUNTERS.items()
        }
        up = Gauge("c2c_sharer_up", "1 unless the last request to this sharer failed.", ("sharer",), registry=registry)
        for index in range(len(sharers())):
            up.labels(str(index)).set_function(partial(_up, sharers, index))
        for name, read in gauges.items():
            Gauge(name, "Current value.", registry=registry).set_function(read)

    def batch(self, system: str, rows: int) -> None:
        """Count a batch."""
        self._rows.labels(system).observe(rows)

    def request(self, record: RequestRecord) -> None:
        """Count a request that has ended; its facts are those of :func:`c2c.serving.app.record_usage`."""
        facts = record.facts
        system = facts.get("system", "none")
        self._requests.labels(system, str(record.status)).inc()
        if "first_token_seconds" not in facts:
            return
        self._seconds.labels(system).observe(record.seconds)
        self._first.labels(system).observe(facts["first_token_seconds"])
        for fact, counter in self._counters.items():
            counter.labels(system).inc(facts.get(fact, 0))

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


def _up(sharers: Callable[[], Sequence[SharerHealth]], index: int) -> float:
    return float(sharers()[index].lost is None)
