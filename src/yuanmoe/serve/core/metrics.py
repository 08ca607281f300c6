"""What Prometheus reads: counters and histograms of the answers, and the engine's own numbers, taken when asked.

A registry of its own, so that several servers fit in one process.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from yuanmoe.config import ModelConfig
from yuanmoe.engine.requests import Request
from yuanmoe.serve.core.routing import routed_layers

if TYPE_CHECKING:
    from yuanmoe.serve.core.worker import EngineWorker

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
NEXT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts what happens to requests: the worker's observer."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self.registry = CollectorRegistry()
        self._first = Histogram(
            "yuanmoe_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=FIRST_TOKEN_S,
            registry=self.registry,
        )
        self._next = Histogram(
            "yuanmoe_time_per_token_seconds",
            "From one token of an answer to its next.",
            buckets=NEXT_TOKEN_S,
            registry=self.registry,
        )
        self._ended = Counter(
            "yuanmoe_sequences",
            "Sequences that ended, by reason: stop, length, cancelled, error.",
            ["reason"],
            registry=self.registry,
        )
        self._accepted = Counter(
            "yuanmoe_requests",
            "Sequences that were begun, by adapter; the model's own have none.",
            ["adapter"],
            registry=self.registry,
        )
        self._responses = Counter("yuanmoe_http_responses", "Responses by status.", ["status"], registry=self.registry)

    def accepted(self, request: Request) -> None:
        self._accepted.labels(request.adapter or "").inc()

    def first_token(self, waited_s: float) -> None:
        self._first.observe(waited_s)

    def next_token(self, gap_s: float) -> None:
        self._next.observe(gap_s)

    def ended(self, reason: str) -> None:
        self._ended.labels(reason).inc()

    def responded(self, status: int) -> None:
        self._responses.labels(str(status)).inc()

    def watch(self, worker: "EngineWorker") -> None:
        """Adds the numbers of an engine."""
        self.registry.register(_EngineNumbers(worker, self._config))

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)


class _EngineNumbers(Collector):
    def __init__(self, worker: "EngineWorker", config: ModelConfig) -> None:
        self._worker = worker
        self._config = config

    def collect(self) -> Iterator[Metric]:
        worker, stats = self._worker, self._worker.stats
        yield _gauge("up", "1 while the engine lives.", float(worker.failure is None))
        yield _gauge("queued_sequences", "Sequences that wait for their first pass.", stats.queued)
        yield _gauge("running_sequences", "Sequences at work.", stats.running)
        pages = _family("cache_pages", "Pages of keys and values by use.", "use")
        pages.add_metric(["used"], stats.used_pages)
        pages.add_metric(["reusable"], stats.reusable_pages)
        pages.add_metric(["empty"], stats.free_pages - stats.reusable_pages)
        yield pages
        yield _counter("steps", "Passes of the model.", stats.steps)
        yield _counter("computed_tokens", "Tokens through the model, prompts included.", stats.computed_tokens)
        yield _counter("generated_tokens", "Tokens of answers.", stats.generated_tokens)
        yield _counter("reused_tokens", "Prompt tokens whose prefix was found computed.", stats.reused_tokens)
        yield _counter("preemptions", "Sequences put back to wait for memory.", stats.preemptions)
        yield _counter("engine_step_seconds", "Time inside the engine's steps.", worker.step_s)
        yield _counter("engine_busy_seconds", "Time with work, that between steps included.", worker.busy_s)
        yield self._visits()

    def _visits(self) -> Metric:
        visits = CounterMetricFamily(
            "yuanmoe_expert_visits", "Tokens that each expert worked on.", labels=["layer", "expert"]
        )
        for place, layer in enumerate(routed_layers(self._config)):
            counts = self._worker.stats.expert_load[place, : self._config.experts_per_layer[layer]].tolist()
            for expert, count in enumerate(counts):
                visits.add_metric([str(layer), str(expert)], count)
        return visits


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"yuanmoe_{name}", text, value=value)


def _family(name: str, text: str, label: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"yuanmoe_{name}", text, labels=[label])


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"yuanmoe_{name}", text, value=value)
