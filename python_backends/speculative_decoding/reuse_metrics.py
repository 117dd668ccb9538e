"""The key/value cache and the sessions on Triton's metrics port."""

from collections.abc import Callable
from typing import Any

from speculative_decoding.kv_metrics import KVCacheCounters
from speculative_decoding.prefix_cache import PrefixCache
from speculative_decoding.sessions import Sessions

COUNTERS = {  # fields of KVCacheCounters
    "tokens_reused": ("reused_tokens", "Tokens of prompts whose keys and values were in the cache"),
    "tokens_computed": ("computed_tokens", "Tokens of prompts whose keys and values were not"),
    "blocks_evicted": ("evicted_blocks", "Blocks pushed out of memory"),
    "blocks_quantized": ("quantized_blocks", "Blocks turned to int8"),
    "blocks_refused": ("refused_blocks", "Blocks not stored, all memory being in use"),
    "pins_refused": ("refused_pins", "Blocks of sessions not pinned, as many as may be being pinned"),
    "tier_hits": ("tier_hits", "Blocks that came back from the file"),
    "tier_evicted": ("tier_evicted_blocks", "Blocks pushed out of the file"),
    "hash_collisions": ("hash_collisions", "Blocks not stored because their hash is another's"),
    "integrity_checks": ("integrity_checks", "Checks of the cache"),
    "integrity_errors": ("integrity_errors", "Checks that found the cache to contradict itself"),
}
GAUGES = {  # fields of KVCacheMetrics
    "blocks": "Blocks in memory",
    "blocks_int8": "Those of them in int8",
    "blocks_in_use": "Those of them that are being copied",
    "blocks_pinned": "Those of them that sessions pin",
    "bytes_used": "Bytes taken in memory",
    "bytes_budget": "Bytes that may be",
    "tier_blocks": "Blocks in the file",
    "tier_bytes_used": "Bytes taken in the file",
    "tier_bytes_budget": "Bytes that may be",
}
SESSIONS = {  # fields of SessionMetrics
    "open": "Sessions that have not expired",
    "busy": "Sessions that a request has",
    "waiting": "Requests that wait for a session",
}

MakeMetric = Callable[[str, str, str], Any]  # of kind, name and description


class ReuseMetrics:
    """What the cache, if there is one, and the sessions say of themselves, as Prometheus metrics."""

    def __init__(self, cache: PrefixCache | None, sessions: Sessions, metric: MakeMetric) -> None:
        self._cache = cache
        self._sessions = sessions
        self._counters, self._gauges = {}, {}
        if cache:
            self._counters = {
                field: metric("COUNTER", f"kv_cache_{name}_total", text) for field, (name, text) in COUNTERS.items()
            }
            self._gauges = {field: metric("GAUGE", f"kv_cache_{field}", text) for field, text in GAUGES.items()}
        self._session_gauges = {field: metric("GAUGE", f"sessions_{field}", text) for field, text in SESSIONS.items()}
        self._published = KVCacheCounters()

    def publish(self) -> None:
        """Set the metrics to what holds now. Raises sqlite3.Error."""
        if self._cache:
            snapshot = self._cache.snapshot()
            for field, counter in self._counters.items():
                counter.increment(getattr(snapshot.counters, field) - getattr(self._published, field))
            self._published = snapshot.counters
            for field, gauge in self._gauges.items():
                gauge.set(getattr(snapshot, field))
        sessions = self._sessions.snapshot()
        for field, gauge in self._session_gauges.items():
            gauge.set(getattr(sessions, field))
