"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

disable_created_metrics()

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter("m6_requests", "Requests, by status.", ["task", "status"], registry=self._registry)
        self._seconds = Histogram(
            "m6_request_seconds", "From a request's head to its answer's end.", ["task"], buckets=SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._rows = Histogram(
            "m6_batch_rows", "Rows that went through the model together; of texts, that joined together.", ["task"],
            buckets=ROWS, registry=self._registry,
        )  # fmt: skip
        self._tokens = Counter("m6_tokens", "Tokens of texts that were written.", registry=self._registry)
        self._clients = Gauge("m6_clients", "Requests that are being read or answered.", registry=self._registry)
        self._waiting = Gauge("m6_queue_rows", "Rows that wait for the model.", registry=self._registry)

    def watch(self, waiting: Callable[[], float], clients: Callable[[], float]) -> None:
        """Where to look up what waits."""
        self._waiting.set_function(waiting)
        self._clients.set_function(clients)

    def request(self, task: str, status: int, seconds: float) -> None:
        self._requests.labels(task, status).inc()
        self._seconds.labels(task).observe(seconds)

    def batch(self, task: str, rows: int) -> None:
        self._rows.labels(task).observe(rows)

    def wrote(self, tokens: int) -> None:
        self._tokens.inc(tokens)

    def text(self) -> bytes:
        return generate_latest(self._registry)
