"""Prometheus metrics under vLLM's names, for its dashboards and benchmark tools."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_LABELS = ("model_name", "engine")


class Metrics:
    """Counts of a server.

    Args:
      model: value of the label `model_name`.
      stats: returns the engine's counts when metrics are requested.
    """

    def __init__(self, model: str, stats: Callable[[], Any]) -> None:
        self._labels = (model, "0")
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(self._labels, stats))
        seconds = functools.partial(self._histogram, buckets=_SECONDS)
        self._first = seconds("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._between = seconds("inter_token_latency_seconds", "Between one token of a request and the next.")
        self._per_token = seconds(
            "request_time_per_output_token_seconds", "A request's mean time per token after the first."
        )
        self._whole = seconds("e2e_request_latency_seconds", "From a request's arrival to its last token.")
        self._prompt_size = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._size = self._histogram("request_generation_tokens", "Tokens that a request generated.", _TOKENS)
        self._prompt = self._counter("prompt_tokens", "Tokens of all prompts.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._finished = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self.registry)
        return metric.labels(*self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, _LABELS, registry=self.registry).labels(*self._labels)

    def begin(self, prompt_tokens: int) -> RequestTimer:
        """Starts to measure a request."""
        self._prompt.inc(prompt_tokens)
        self._prompt_size.observe(prompt_tokens)
        return RequestTimer(self)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class RequestTimer:
    """Times of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._begun, self._tokens = metrics, time.perf_counter(), 0
        self._first = self._last = self._begun

    def tokens(self, count: int) -> None:
        """Records `count` tokens that arrived together."""
        if not count:
            return
        now = time.perf_counter()
        if not self._tokens:
            self._first = now
            self._metrics._first.observe(now - self._begun)
        else:
            self._metrics._between.observe(now - self._last)
        self._last = now
        self._tokens += count
        self._metrics._generated.inc(count)

    def end(self, reason: str) -> None:
        """Records the end of the request."""
        metrics = self._metrics
        metrics._whole.observe(time.perf_counter() - self._begun)
        metrics._size.observe(self._tokens)
        if self._tokens > 1:
            metrics._per_token.observe((self._last - self._first) / (self._tokens - 1))
        metrics._finished.labels(*metrics._labels, reason).inc()


class _EngineCollector:
    """The engine's counts as metrics."""

    def __init__(self, labels: tuple[str, str], stats: Callable[[], Any]) -> None:
        self._labels, self._stats = labels, stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, text, value in (
            ("num_requests_running", "Requests that are decoding or in prefill.", stats.running),
            ("num_requests_waiting", "Requests that wait for pages.", stats.waiting),
            ("kv_cache_usage_perc", "Share of the cache's pages in use; 1 is all.", stats.cache_usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        programs = GaugeMetricFamily("dsv3_jax:programs", "Programs that the engine has compiled.", labels=_LABELS)
        programs.add_metric(self._labels, stats.programs)
        yield programs
        if stats.drafts_up_to is not None:
            text = "Number of texts up to which steps verify drafts."
            up_to = GaugeMetricFamily("dsv3_jax:drafts_up_to", text, labels=_LABELS)
            up_to.add_metric(self._labels, stats.drafts_up_to)
            yield up_to
        for name, text, value in (
            ("num_preemptions", "Requests that gave up their pages for others and began again.", stats.preemptions),
            ("prefix_cache_queries", "Tokens of prompts looked for in the cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Tokens of prompts found in the cache.", stats.prefix_hits),
            ("spec_decode_num_drafts", "Verifications of drafted tokens.", stats.drafts),
            ("spec_decode_num_draft_tokens", "Tokens drafted.", stats.draft_tokens),
            ("spec_decode_num_accepted_tokens", "Drafted tokens accepted.", stats.accepted_tokens),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        per_position = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens accepted, by their place in the draft.",
            labels=(*_LABELS, "position"),
        )
        for position, value in enumerate(stats.accepted_per_position):
            per_position.add_metric((*self._labels, str(position)), value)
        yield per_position
