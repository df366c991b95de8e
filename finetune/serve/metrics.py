"""Figures for Prometheus: requests, tokens, queue, latency and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from finetune.memory import device_bytes, rss_bytes
from finetune.serve.engine import Engine, Load

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts what a server does.

    Args:
        engines: Returns those whose load is reported.
    """

    def __init__(self, engines: Callable[[], Sequence[Engine]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Loads(engines))
        self.requests = Counter(
            "finetune_requests", "Requests that a model was asked", ["path", "model", "status"], registry=self.registry
        )
        self.errors = Counter("finetune_errors", "Responses with an error", ["status"], registry=self.registry)
        self.prompt_tokens = Counter("finetune_prompt_tokens", "Tokens read", ["model"], registry=self.registry)
        self.completion_tokens = Counter(
            "finetune_completion_tokens", "Tokens generated", ["model"], registry=self.registry
        )
        self.seconds = Histogram(
            "finetune_request_seconds", "Time of a request", ["path"], buckets=SECONDS, registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "finetune_first_token_seconds", "Time to the first token", buckets=SECONDS, registry=self.registry
        )

    def text(self) -> bytes:
        """Returns all figures in Prometheus' text format."""
        return generate_latest(self.registry)


class _Loads:
    """Collects queue and memory at the time of the request."""

    def __init__(self, engines: Callable[[], Sequence[Engine]]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Any]:
        loads: list[Load] = [engine.load() for engine in self._engines()]
        for name, about, value in (
            ("finetune_running", "Answers that are generated", sum(load.running for load in loads)),
            ("finetune_waiting", "Answers that wait", sum(load.waiting for load in loads)),
            ("finetune_cache_bytes", "Key-value caches", sum(load.cache_bytes for load in loads)),
            ("finetune_resident_bytes", "Resident memory of the process", rss_bytes()),
            ("finetune_device_bytes", "Memory reserved on the GPU", device_bytes()),
        ):
            yield GaugeMetricFamily(name, about, value=value)
