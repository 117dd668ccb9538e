"""The cache's Prometheus metrics, on Triton's metrics port."""

import threading
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from semantic_cache.cache import Outcome

# Each of Triton's metrics has one message to the server, which two threads must not fill in at one time: tritonserver
# crashes (2.51).
_UPDATING = threading.Lock()
LATENCY_BUCKETS_S = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]


class Metrics:
    """Counters, latency histograms and gauges. Thread-safe. One update takes 30 us: make it after responding."""

    def __init__(self) -> None:
        self._lookups = _Counter("lookups_total", "Lookups, by what they came to", "source")
        self._misses = _Counter("misses_total", "Misses, by reason", "reason")
        self._refusals = _Counter(
            "verifier_refusals_total", "Candidates that the verifier refused, by reason", "reason"
        )
        self._stores = _Counter("stores_total", "Answers sent to be stored, by what became of them", "result")
        self._shadow = _Counter("shadow_checks_total", "Hits that were decoded anyway, by how they compared", "result")
        self._errors = _Counter("errors_total", "Errors inside the cache, by stage", "stage")
        self._coalesced = _Counter("coalesced_total", "Misses that share an answer being made", "kind")
        self._evictions = _Counter("evictions_total", "Entries evicted, by order", "order")
        self._latency = _Histogram("lookup_seconds", "Time from a lookup's arrival to its outcome")
        self._verifying = _Histogram("verify_seconds", "Time to judge the candidates of one lookup")
        self._entries = _Gauge("entries", "Entries in the store")
        self._bytes = _Gauge("bytes", "Bytes of the entries in the store")
        self._bounds = _Gauge("false_hit_bound", "Upper bound of the share of wrong hits, by partition", "partition")

    def looked_up(self, outcome: Outcome) -> None:
        """Count a lookup and what it came to."""
        self._lookups.increment(outcome.source)
        self._latency.observe((outcome.lookup_ms + outcome.embed_ms) / 1e3)
        if outcome.reason:
            self._misses.increment(outcome.reason)
        for refusal in outcome.refusals:
            self._refusals.increment(refusal)
        if outcome.verify_ms:
            self._verifying.observe(outcome.verify_ms / 1e3)

    def stored(self, result: str) -> None:
        """Count an answer sent to be stored."""
        self._stores.increment(result)

    def failed(self, stage: str) -> None:
        """Count an error."""
        self._errors.increment(stage)

    def coalesced(self) -> None:
        """Count a request that shares an answer being made."""
        self._coalesced.increment("in_flight")

    def checked(self, result: str) -> None:
        """Count a shadow check."""
        self._shadow.increment(result)

    def tidied(self, order: str, evicted: int, entries: int, size: int, bounds: Mapping[bytes, float]) -> None:
        """Set what the store holds, and count what was evicted."""
        if evicted:
            self._evictions.increment(order, evicted)
        self._entries.set(entries)
        self._bytes.set(size)
        for partition, bound in bounds.items():
            self._bounds.set(bound, partition.hex()[:12])


class _Family:
    """A metric family with at most one label, whose metrics appear as their label values do. Keeps them alive."""

    KIND = ""

    def __init__(self, name: str, description: str, label: str = "") -> None:
        family = pb_utils.MetricFamily
        kind = getattr(family, self.KIND)
        self._family = family(name=f"semantic_cache_{name}", description=description, kind=kind)
        self._label = label
        self._metrics: dict[str, Any] = {}

    def _metric(self, value: str, **options: Any) -> Any:
        if value not in self._metrics:
            labels = {self._label: value} if self._label else {}
            self._metrics[value] = self._family.Metric(labels=labels, **options)
        return self._metrics[value]


class _Counter(_Family):
    KIND = "COUNTER"

    def increment(self, value: str, by: int = 1) -> None:
        with _UPDATING:
            self._metric(value).increment(by)


class _Gauge(_Family):
    KIND = "GAUGE"

    def set(self, value: float, label: str = "") -> None:
        with _UPDATING:
            self._metric(label).set(value)


class _Histogram(_Family):
    KIND = "HISTOGRAM"

    def observe(self, seconds: float) -> None:
        with _UPDATING:
            self._metric("", buckets=LATENCY_BUCKETS_S).observe(seconds)
