"""The decoder's Prometheus metrics, on Triton's metrics port."""

import threading
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils

from speculative_decoding.sequence import FinishReason, Sequence

SECONDS_BUCKETS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
LOAD_INTERVAL_S = 1.0


class Metrics:
    """Counters by model, updated once a request, after its last response."""

    def __init__(self, model: str, load: Callable[[], tuple[int, int]]) -> None:
        """`load` gives how many sequences run and how many wait; it is asked every LOAD_INTERVAL_S seconds."""
        self._families: list[Any] = []  # a metric dies with its family
        self._model = model
        self._counters = {
            "prompt_tokens": self._metric("COUNTER", "prompt_tokens_total", "Tokens of prompts"),
            "output_tokens": self._metric("COUNTER", "output_tokens_total", "Tokens of answers"),
            "draft_tokens": self._metric("COUNTER", "draft_tokens_total", "Tokens drafted"),
            "accepted_tokens": self._metric(
                "COUNTER", "accepted_tokens_total", "Drafted tokens that the target accepted"
            ),
        }
        self._first_token = self._metric(
            "HISTOGRAM", "time_to_first_token_seconds", "Arrival to first token", buckets=SECONDS_BUCKETS
        )
        self._finished_family = self._family("COUNTER", "requests_total", "Requests, by how they ended")
        self._finished: dict[str, Any] = {}
        self._running = self._metric("GAUGE", "running_sequences", "Sequences in slots")
        self._waiting = self._metric("GAUGE", "waiting_sequences", "Sequences waiting for a slot")
        self._load = load
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch_load, name="load metrics", daemon=True)
        self._thread.start()

    def answered(self, sequence: Sequence, reason: FinishReason) -> None:
        """Count a finished answer."""
        self._counters["prompt_tokens"].increment(len(sequence.prompt))
        self._counters["output_tokens"].increment(sequence.answered)
        self._counters["draft_tokens"].increment(sequence.drafted)
        self._counters["accepted_tokens"].increment(sequence.accepted)
        self._first_token.observe(sequence.first_token - sequence.arrived)
        self.failed(reason)

    def failed(self, reason: FinishReason) -> None:
        """Count how a request ended."""
        if reason not in self._finished:
            self._finished[reason] = self._finished_family.Metric(labels={"model": self._model, "reason": reason})
        self._finished[reason].increment(1)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _watch_load(self) -> None:
        while not self._closed.wait(LOAD_INTERVAL_S):
            running, waiting = self._load()
            self._running.set(running)
            self._waiting.set(waiting)

    def _metric(self, kind: str, name: str, description: str, **options: Any) -> Any:
        return self._family(kind, name, description).Metric(labels={"model": self._model}, **options)

    def _family(self, kind: str, name: str, description: str) -> Any:
        family = pb_utils.MetricFamily
        made = family(name=f"speculative_decoding_{name}", description=description, kind=getattr(family, kind))
        self._families.append(made)
        return made
