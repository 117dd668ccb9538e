"""Hits that have not been written to the store yet: counted in memory, so that no hit waits for the disk."""

import threading
from collections import Counter

from semantic_cache.records import Key


class Uses:
    """Counts hits by key. Thread-safe. What was not taken is lost with the process, and only eviction misses it."""

    def __init__(self) -> None:
        self._counts: Counter[Key] = Counter()
        self._lock = threading.Lock()

    def add(self, key: Key) -> None:
        """Count one hit."""
        with self._lock:
            self._counts[key] += 1

    def take(self) -> dict[Key, int]:
        """Return the counts since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)
