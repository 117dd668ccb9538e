"""A store that may be down: lookups give up in time, and leave it alone until it may be back."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import ParamSpec, TypeVar

from semantic_cache.records import Candidate, Found, Key, Observation, Vector
from semantic_cache.store import Store, StoreError

DEADLINE_S = 0.05
RETRY_S = 1.0  # a store that failed is asked again after so long, by one caller
READERS = 4

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class GuardedReads:
    """What lookups read of a store, answered or failed within DEADLINE_S: StoreError, and Loading from nearest().

    While a store is down, calls fail at once; after RETRY_S one call tries it again. A local store, which cannot keep
    anybody waiting for a network, is called directly.
    """

    def __init__(self, store: Store, is_remote: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._down_until = 0.0
        self._lock = threading.Lock()
        self._gets = ThreadPoolExecutor(READERS, "store get") if is_remote else None
        self._searches = ThreadPoolExecutor(1, "store search") if is_remote else None
        for pool, threads in ((self._gets, READERS), (self._searches, 1)):
            if pool:  # connect now: the first lookup has no time for it
                barrier = threading.Barrier(threads)
                list(pool.map(lambda _, barrier=barrier: self._connect(barrier), range(threads)))

    def get(self, key: Key, now: float) -> Found | None:
        return self._call(self._gets, self._store.get, key, now)

    def nearest(self, partition: bytes, vector: Vector, count: int, now: float) -> list[Candidate]:
        return self._call(self._searches, self._store.nearest, partition, vector, count, now)

    def observations(self, key: Key) -> list[Observation]:
        return self._call(self._searches, self._store.observations, key)

    def close(self) -> None:
        """End the threads, without waiting for calls that hang."""
        for pool in (self._gets, self._searches):
            if pool:
                pool.shutdown(wait=False, cancel_futures=True)

    def _call(
        self,
        pool: ThreadPoolExecutor | None,
        method: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        self._enter()
        try:
            if pool is None:
                return method(*args, **kwargs)
            future = pool.submit(method, *args, **kwargs)
            try:
                return future.result(DEADLINE_S)
            except FutureTimeoutError:
                future.cancel()
                raise StoreError(f"the store did not answer within {DEADLINE_S * 1e3:.0f} ms") from None
        except StoreError:
            self._down_until = self._clock() + RETRY_S
            raise

    def _enter(self) -> None:
        """Raise StoreError while the store is left alone; let one caller through when that time is over."""
        if not self._down_until:
            return
        with self._lock:
            now = self._clock()
            if now < self._down_until:
                raise StoreError("the store is down")
            self._down_until = 0.0

    def _connect(self, barrier: threading.Barrier) -> None:
        barrier.wait()  # one call per thread
        self._store.secret()
