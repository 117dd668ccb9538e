"""Lookups that missed and wait for their answer."""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from semantic_cache.records import Hit, Vector
from semantic_cache.request import Lookup

CAPACITY = 4096  # more than can be decoding at once; the oldest gives way
LIFETIME_S = 900.0  # longer than any answer takes to decode


class Pending(NamedTuple):
    """A lookup and its vector (None: it has none), both made when the prompt came in.

    passed_over: what would have been served, had it not been withheld: the answer will tell whether rightly.
    """

    lookup: Lookup
    vector: Vector | None
    passed_over: Hit | None = None


class PendingLookups:
    """Hands out an unguessable handle for each lookup, good for storing one answer to it.

    A client that holds no handle cannot write, and the holder of one cannot choose partition or prompt. Thread-safe.
    """

    def __init__(self, capacity: int = CAPACITY, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._clock = clock
        self._waiting: OrderedDict[str, tuple[float, Pending]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, pending: Pending) -> str:
        """Return the handle of `pending`."""
        handle = secrets.token_urlsafe(16)
        now = self._clock()
        with self._lock:
            self._waiting[handle] = (now + LIFETIME_S, pending)
            self._drop_oldest(now)
        return handle

    def take(self, handle: str) -> Pending | None:
        """Return what `handle` stands for and forget it; None for a handle unknown, used or too old."""
        with self._lock:
            deadline, pending = self._waiting.pop(handle, (0.0, None))
        return pending if deadline > self._clock() else None

    def _drop_oldest(self, now: float) -> None:
        while self._waiting:
            deadline, _ = next(iter(self._waiting.values()))
            if deadline > now and len(self._waiting) <= self._capacity:
                return
            self._waiting.popitem(last=False)
