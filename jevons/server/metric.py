"""Numbers for Prometheus and for the page's live view, under vLLM's names so that dashboards made for vLLM work.

What happens request by request is counted as it happens; what the engine knows (running, waiting, cache) is read from its snapshot
when somebody asks. Not done: collection over several processes; one process serves.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jevons.cost.usage import UsageRow

if TYPE_CHECKING:
    from jevons.server.ticket import Ticket

FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
WHOLE_REQUEST = (0.1, 0.3, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
WINDOW = 10  # seconds over which rates are taken

# vLLM's name: ours in the engine's snapshot, and what it means
GAUGES = {
    "vllm:num_requests_running": ("running", "Requests in the engine's batch"),
    "vllm:num_requests_waiting": ("waiting", "Requests waiting to be processed"),
}
COUNTERS = {
    "vllm:generation_tokens": ("drawn_tokens", "Tokens generated"),
    "vllm:prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache"),
    "vllm:prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache"),
    "vllm:num_preemptions": ("preemptions", "Requests put back because the cache was full"),
}


class Metrics:
    """Counts of one served model. Belongs to the event loop's thread."""

    def __init__(self, model: str = "") -> None:
        self.model = model
        self.registry = CollectorRegistry()
        self._engine = _EngineCollector(model)
        self._samples: deque[tuple[float, float, float]] = deque(maxlen=WINDOW + 1)  # time, prompt tokens read, tokens drawn so far
        self._day, self.requests_today = "", 0

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry).labels(model)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=self.registry).labels(model)

        self._first = histogram("vllm:time_to_first_token_seconds", "Time to the first token", FIRST_TOKEN)
        self._between = histogram("vllm:inter_token_latency_seconds", "Time between tokens, the mean of each request", BETWEEN_TOKENS)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "Time of whole requests", WHOLE_REQUEST)
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens of finished requests")
        self._cached = counter("vllm:prompt_tokens_cached", "Those of them that were found in the cache")
        self._money = counter("jevons:money", "What finished requests cost, in the price table's currency")
        self._device = counter("jevons:device_seconds", "Device-seconds of finished requests")
        self._success = Counter("vllm:request_success", "Finished requests", ["model_name", "finished_reason"], registry=self.registry)
        self._taken = Counter("jevons:requests", "Requests that were taken", ["model_name", "endpoint"], registry=self.registry)
        self.registry.register(self._engine)

    def started(self, ticket: Ticket) -> None:
        day = time.strftime("%Y-%m-%d", time.gmtime())
        if day != self._day:
            self._day, self.requests_today = day, 0
        self.requests_today += 1
        self._taken.labels(self.model, ticket.endpoint).inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def finished(self, row: UsageRow) -> None:
        self._prompt.inc(row.prompt)
        self._cached.inc(row.cached)
        self._money.inc(row.money or 0.0)
        self._device.inc(row.device_seconds)
        self._whole.observe(row.duration)
        self._success.labels(self.model, row.status).inc()
        if row.ttft is not None and row.completion > 1:
            self._between.observe((row.duration - row.ttft) / (row.completion - 1))

    def sample(self, snapshot: Mapping[str, float]) -> None:
        """To be called once a second, for `rates`."""
        self._samples.append((time.monotonic(), snapshot["prompt_tokens"], snapshot["drawn_tokens"]))

    def rates(self) -> tuple[float, float]:
        """Prompt tokens computed and tokens drawn a second, over the last seconds."""
        if len(self._samples) < 2:
            return 0.0, 0.0
        first, last = self._samples[0], self._samples[-1]
        seconds = last[0] - first[0]
        return (last[1] - first[1]) / seconds, (last[2] - first[2]) / seconds

    def expose(self, snapshot: Mapping[str, float]) -> bytes:
        """The text that Prometheus scrapes."""
        self._engine.snapshot = snapshot
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """The engine's own numbers, as of its last snapshot."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.snapshot: Mapping[str, float] = {}

    def collect(self) -> Iterator[Metric]:
        for name, (key, text) in GAUGES.items():
            yield self._add(GaugeMetricFamily(name, text, labels=["model_name"]), self.snapshot.get(key, 0))
        for name, (key, text) in COUNTERS.items():
            yield self._add(CounterMetricFamily(name, text, labels=["model_name"]), self.snapshot.get(key, 0))
        usage = self.snapshot.get("used_blocks", 0) / max(1, self.snapshot.get("total_blocks", 0))
        for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):  # the second is vLLM's older name
            yield self._add(GaugeMetricFamily(name, "Share of the cache's blocks in use, 0 to 1", labels=["model_name"]), usage)

    def _add(self, family: Metric, value: float) -> Metric:
        family.add_metric([self.model], value)  # type: ignore[attr-defined]
        return family
