"""The decoder's Prometheus metrics, on Triton's metrics port."""

import logging
import sqlite3
import threading
from itertools import accumulate
from typing import Any

import triton_python_backend_utils as pb_utils

from speculative_decoding.engine import Engine
from speculative_decoding.engine_statistics import INTER_TOKEN_BUCKETS_S, Statistics
from speculative_decoding.prefix_cache import PrefixCache
from speculative_decoding.reuse_metrics import ReuseMetrics
from speculative_decoding.sequence import FinishReason, Sequence
from speculative_decoding.sessions import Sessions

logger = logging.getLogger(__name__)
SECONDS_BUCKETS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
PUBLISH_INTERVAL_S = 1.0
TOTALS = {
    "prompt_tokens": "Tokens of prompts",
    "output_tokens": "Tokens of answers",
    "drafts": "Drafts that the target verified",
    "draft_tokens": "Tokens drafted",
    "accepted_tokens": "Drafted tokens that the target accepted",
    "rounds": "Steps of decoding",
    "plain_rounds": "Steps of decoding without any draft",
}


class Metrics:
    """Publishes the engine's statistics every PUBLISH_INTERVAL_S seconds; requests are counted as they end.

    Thread-safe: each of Triton's metrics has one message to the server, and tritonserver (2.51) crashes when two
    threads fill it in at one time.
    """

    def __init__(
        self,
        model: str,
        engine: Engine,
        bytes_per_token: int,
        rows_are_independent: bool,
        kv_cache: PrefixCache | None,
        sessions: Sessions,
    ) -> None:
        self._model = model
        self._updating = threading.Lock()
        self._engine = engine
        self._bytes_per_token = bytes_per_token
        self._families: list[Any] = []  # a metric dies with its family
        self._totals = {name: self._metric("COUNTER", f"{name}_total", text) for name, text in TOTALS.items()}
        self._lengths = _Labelled(self, "COUNTER", "drafts_by_length_total", "Drafts, by tokens drafted", "length")
        self._accepted = _Labelled(
            self, "COUNTER", "accepted_tokens_by_position_total", "Accepted tokens, by place in their draft", "position"
        )
        # A histogram in the form that Prometheus reads, counted here: one call a second instead of one a token.
        self._inter_token = _Labelled(
            self, "COUNTER", "inter_token_latency_seconds_bucket", "Time between a sequence's responses, seconds", "le"
        )
        self._inter_token_sum = self._metric("COUNTER", "inter_token_latency_seconds_sum", "Their sum, seconds")
        self._inter_token_count = self._metric("COUNTER", "inter_token_latency_seconds_count", "How many there were")
        self._first_token = self._metric(
            "HISTOGRAM", "time_to_first_token_seconds", "Arrival to first token", buckets=SECONDS_BUCKETS
        )
        self._finished = _Labelled(self, "COUNTER", "requests_total", "Answers, by how they ended", "reason")
        self._running = self._metric("GAUGE", "running_sequences", "Sequences in slots")
        self._waiting = self._metric("GAUGE", "waiting_sequences", "Sequences waiting for a slot")
        self._kv_bytes = self._metric("GAUGE", "kv_bytes_used", "Bytes of the target's keys and values in slots")
        self._metric("GAUGE", "rows_independent", "1 if what is fed together cannot change a token").set(
            int(rows_are_independent)
        )
        self._reuse = ReuseMetrics(kv_cache, sessions, self._metric)
        self._published = Statistics()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="metrics", daemon=True)
        self._thread.start()

    def answered(self, sequence: Sequence, reason: FinishReason) -> None:
        """Count a finished answer."""
        with self._updating:
            self._first_token.observe(sequence.first_token - sequence.arrived)
        self.failed(reason)

    def failed(self, reason: FinishReason) -> None:
        """Count how an answer ended."""
        with self._updating:
            self._finished.increment(reason, 1)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(PUBLISH_INTERVAL_S):
            load = self._engine.load()
            with self._updating:
                self._running.set(load.running)
                self._waiting.set(load.waiting)
                self._kv_bytes.set(load.tokens * self._bytes_per_token)
                self._publish(self._engine.statistics.copy())
            try:
                self._reuse.publish()
            except sqlite3.Error:
                logger.exception("the number of sessions could not be read")

    def _publish(self, now: Statistics) -> None:
        before, self._published = self._published, now
        for name, metric in self._totals.items():
            metric.increment(getattr(now, name) - getattr(before, name))
        for length, (new, old) in enumerate(zip(now.lengths, before.lengths, strict=True)):
            self._lengths.increment(str(length), new - old)
        for place, (new, old) in enumerate(zip(now.accepted_at, before.accepted_at, strict=True)):
            self._accepted.increment(str(place + 1), new - old)
        gaps = [new - old for new, old in zip(now.inter_token_counts, before.inter_token_counts, strict=True)]
        bounds = [*map(str, INTER_TOKEN_BUCKETS_S), "+Inf"]
        for bound, count in zip(bounds, accumulate(gaps), strict=True):
            self._inter_token.increment(bound, count)
        self._inter_token_sum.increment(now.inter_token_s - before.inter_token_s)
        self._inter_token_count.increment(sum(gaps))

    def _metric(self, kind: str, name: str, description: str, **options: Any) -> Any:
        return self.family(kind, name, description).Metric(labels={"model": self._model}, **options)

    def labels(self, name: str, value: str) -> dict[str, str]:
        """Return a metric's labels: the model's, and one more."""
        return {"model": self._model, name: value}

    def family(self, kind: str, name: str, description: str) -> Any:
        """Return a metric family that lives as long as this."""
        family = pb_utils.MetricFamily
        made = family(name=f"speculative_decoding_{name}", description=description, kind=getattr(family, kind))
        self._families.append(made)
        return made


class _Labelled:
    """Counters of one family, one for each value of a label, made when first needed."""

    def __init__(self, metrics: Metrics, kind: str, name: str, description: str, label: str) -> None:
        self._metrics = metrics
        self._family = metrics.family(kind, name, description)
        self._label = label
        self._by_value: dict[str, Any] = {}

    def increment(self, value: str, by: float) -> None:
        if not by and value not in self._by_value:
            return
        if value not in self._by_value:
            self._by_value[value] = self._family.Metric(labels=self._metrics.labels(self._label, value))
        self._by_value[value].increment(by)
