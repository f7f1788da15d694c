"""What a server has done and what it holds, as Prometheus reads it.

What the runtime counts itself is read when somebody asks; the rest is counted as it happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from coterie.model.stream.memory import peak_bytes
from coterie.run.engine import Runtime

#: Ways in which requests end: rejected for want of room, refused for what they ask.
OUTCOMES = ("done", "failed", "cancelled", "rejected", "refused")

#: Bounds of times in seconds: a token takes from some milliseconds to seconds, a prompt up to minutes.
_TOKEN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_REQUEST = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

#: Counters of the residency -> what they are called, and what they are.
_COUNTERS = {
    "hits": ("coterie_expert_hits", "Experts that were in memory when they were asked for"),
    "misses": ("coterie_expert_misses", "Experts that were not"),
    "evictions": ("coterie_expert_evictions", "Experts that went to make room"),
    "num_bytes": ("coterie_expert_read_bytes", "Bytes of experts that were read"),
    "failures": ("coterie_expert_read_failures", "Reads of experts that failed"),
    "waits": ("coterie_expert_waits", "Times that the computation had to wait for an expert"),
    "wait_seconds": ("coterie_expert_wait_seconds", "Seconds of such waits"),
    "prefetches": ("coterie_prefetches", "Reads that were begun before they were asked for"),
    "prefetches_used": ("coterie_prefetches_used", "Those of them that were asked for"),
    "prefetches_wasted": ("coterie_prefetches_wasted", "Those of them that were not"),
}


class Metrics:
    """The numbers of one server.

    Attributes:
        requests: how many ended, by outcome.
        prompt_tokens: tokens of prompts.
        reused: those of them whose keys and values were there already.
        tokens: tokens that were made.
        first_seconds: times from when a request was admitted to its first token.
        token_seconds: times from a token to the next one.
        request_seconds: times from when a request was admitted to its end.
        waiting: requests that wait.
        running: requests that run.
        context: tokens whose keys and values are in use.
    """

    def __init__(self) -> None:
        """Begin to count."""
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        self.requests = Counter("coterie_requests", "Requests that ended", ["outcome"], **own)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.prompt_tokens = Counter("coterie_prompt_tokens", "Tokens of prompts", **own)
        self.reused = Counter(
            "coterie_prompt_tokens_reused", "Tokens of prompts whose keys and values were there already", **own
        )
        self.tokens = Counter("coterie_generated_tokens", "Tokens that were made", **own)
        self.first_seconds = Histogram(
            "coterie_time_to_first_token_seconds", "From the request to its first token", buckets=_REQUEST, **own
        )
        self.token_seconds = Histogram(
            "coterie_inter_token_seconds", "From a token to the next one", buckets=_TOKEN, **own
        )
        self.request_seconds = Histogram(
            "coterie_request_seconds", "From the request to its end", buckets=_REQUEST, **own
        )
        self.waiting = Gauge("coterie_queue_waiting", "Requests that wait", **own)
        self.queue = Gauge("coterie_queue_limit", "Requests that wait at most", **own)
        self.running = Gauge("coterie_requests_running", "Requests that run", **own)
        self.context = Gauge("coterie_kv_tokens", "Tokens whose keys and values are in use", **own)

    def watch(self, runtime: Runtime) -> None:
        """Let what a runtime counts and holds be among the numbers."""
        self.registry.register(_OfRuntime(runtime))

    def written(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _OfRuntime:
    """What a runtime counts and holds."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def collect(self) -> Iterable[Any]:
        """Yield the numbers of this moment."""
        counters, budget = self._runtime.residency.counters, self._runtime.budget
        for name, (metric, what) in _COUNTERS.items():
            yield CounterMetricFamily(metric, what, value=getattr(counters, name))
        layers = GaugeMetricFamily("coterie_experts_in_memory", "Experts in memory", labels=["layer"])
        for layer, experts in self._runtime.residency.in_memory().items():
            layers.add_metric([str(layer)], len(experts))
        yield layers
        if self._runtime.speculation is not None:
            drafted = self._runtime.speculation.drafted
            yield CounterMetricFamily("coterie_draft_guesses", "Guesses that were checked", value=drafted.guesses)
            yield CounterMetricFamily("coterie_draft_right", "Those of them that were right", value=drafted.right)
        parts = GaugeMetricFamily("coterie_memory_plan_bytes", "What the budget is planned for", labels=["part"])
        slots = budget.num_slots * budget.slot
        for part, size in {
            "resident": budget.resident, "experts": slots, "kv": budget.cache, "buffers": budget.buffers,
            "program": budget.fixed - budget.resident - budget.cache - budget.buffers,
        }.items():  # fmt: skip
            parts.add_metric([part], size)
        yield parts
        yield GaugeMetricFamily("coterie_memory_budget_bytes", "Memory that the process may take", value=budget.limit)
        size = psutil.Process().memory_info().rss
        yield GaugeMetricFamily("coterie_memory_used_bytes", "Memory that the process takes", value=size)
        yield GaugeMetricFamily("coterie_memory_peak_bytes", "Memory that it took at most", value=peak_bytes())
        context = self._runtime.context
        yield GaugeMetricFamily("coterie_kv_tokens_limit", "Tokens of a sequence at most", value=context)
