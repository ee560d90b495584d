"""Metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from c2c.serving.engine import SharerState, Way
from c2c.serving.trace import Trace

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts what a server does, in a registry of its own.

    Args:
        gauges: what is read when it is asked for, by name and description.
        sharers: whether each sharer can be asked.
    """

    def __init__(
        self, gauges: dict[tuple[str, str], Callable[[], float]], sharers: Callable[[], Sequence[SharerState]]
    ) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter(
            "c2c_requests", "Requests below /v1 that have ended.", ("way", "status"), registry=registry
        )
        self._seconds = Histogram(
            "c2c_request_seconds", "Seconds of answered requests.", ("way",), buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "c2c_time_to_first_token_seconds",
            "Seconds from acceptance to the first token, waiting included.",
            ("way",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._prompt = Counter(
            "c2c_prompt_tokens", "Tokens that answering models have read.", ("way",), registry=registry
        )
        self._generated = Counter("c2c_generated_tokens", "Tokens of answers.", ("way",), registry=registry)
        self._crossed = Counter(
            "c2c_crossed_bytes", "Bytes from sharer to receiver: cache entries, or text.", ("way",), registry=registry
        )
        self._rows = Histogram("c2c_batch_answers", "Answers per batch.", ("way",), buckets=_ROWS, registry=registry)
        self._fallbacks = Counter(
            "c2c_fallbacks",
            "Prompts that the receiver answered alone because a sharer was lost.",
            ("way",),
            registry=registry,
        )
        up = Gauge(
            "c2c_sharer_up",
            "1 if the last request to this sharer was answered, or it is in this process.",
            ("sharer",),
            registry=registry,
        )
        for index in range(len(sharers())):
            up.labels(str(index)).set_function(partial(_up, sharers, index))
        for (name, text), read in gauges.items():
            Gauge(name, text, registry=registry).set_function(read)

    def batch(self, way: Way, rows: int) -> None:
        """A batch begins."""
        self._rows.labels(way.value).observe(rows)

    def request(self, trace: Trace) -> None:
        """A request has ended."""
        way = trace.way or "none"
        self._requests.labels(way, str(trace.status)).inc()
        if not trace.done:
            return
        self._seconds.labels(way).observe(trace.seconds)
        if trace.first_token is not None:
            self._first.labels(way).observe(trace.first_token)
        for one in trace.done:
            self._prompt.labels(way).inc(one.prompt_tokens)
            self._generated.labels(way).inc(one.completion_tokens)
            self._crossed.labels(way).inc(one.crossed)
            self._fallbacks.labels(way).inc(one.fallback is not None)

    def text(self) -> bytes:
        """All of them in the text format of Prometheus."""
        return generate_latest(self._registry)


def _up(sharers: Callable[[], Sequence[SharerState]], index: int) -> float:
    return float(sharers()[index].lost is None)
