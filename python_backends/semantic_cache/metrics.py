"""The cache's Prometheus metrics, on Triton's metrics port."""

from typing import Any

import triton_python_backend_utils as pb_utils

LATENCY_BUCKETS_S = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]


class Metrics:
    """Counters by label value, a latency histogram and a gauge. One update takes 30 us: make it after responding."""

    def __init__(self) -> None:
        self._lookups = _Counter("lookups_total", "Lookups, by what they came to", "source")
        self._stores = _Counter("stores_total", "Answers sent to be stored, by what became of them", "result")
        self._errors = _Counter("errors_total", "Errors inside the cache, by stage", "stage")
        self._latency_family = _family("HISTOGRAM", "lookup_seconds", "Time from a lookup's arrival to its outcome")
        self._latency = self._latency_family.Metric(labels={}, buckets=LATENCY_BUCKETS_S)
        self._entries_family = _family("GAUGE", "entries", "Entries in the store")
        self._entries = self._entries_family.Metric(labels={})

    def looked_up(self, source: str, seconds: float) -> None:
        """Count a lookup that came to `source` after `seconds`."""
        self._lookups.increment(source)
        self._latency.observe(seconds)

    def stored(self, result: str) -> None:
        """Count an answer sent to be stored."""
        self._stores.increment(result)

    def failed(self, stage: str) -> None:
        """Count an error."""
        self._errors.increment(stage)

    def set_entries(self, count: int) -> None:
        """Set the number of entries in the store."""
        self._entries.set(count)


class _Counter:
    """A counter family with one label, whose metrics appear as their label values do. Keeps the family alive."""

    def __init__(self, name: str, description: str, label: str) -> None:
        self._family = _family("COUNTER", name, description)
        self._label = label
        self._metrics: dict[str, Any] = {}

    def increment(self, value: str) -> None:
        if value not in self._metrics:
            self._metrics[value] = self._family.Metric(labels={self._label: value})
        self._metrics[value].increment(1)


def _family(kind: str, name: str, description: str) -> Any:
    family = pb_utils.MetricFamily
    return family(name=f"semantic_cache_{name}", description=description, kind=getattr(family, kind))
