"""A store that hangs or fails costs a lookup little, and is asked again when it may be back."""

import threading
import time

import numpy as np
import pytest
from semantic_cache.guard import DEADLINE_S, RETRY_S, GuardedReads
from semantic_cache.records import Candidate, Found, Key, Observation, Vector
from semantic_cache.store import Loading, StoreError

KEY = Key(b"p", b"e")
VECTOR = np.ones(4, np.float32)


class Faulty:
    """A store whose reads hang or fail as told."""

    def __init__(self) -> None:
        self.asked = 0
        self.error: Exception | None = None
        self.hangs = threading.Event()
        self.hangs.set()

    def secret(self) -> bytes:
        return b"s" * 32

    def get(self, key: Key, now: float) -> Found | None:
        self.asked += 1
        self.hangs.wait()
        if self.error:
            raise self.error
        return Found("answer", "{}", 0.0)

    def nearest(self, partition: bytes, vector: Vector, count: int, now: float) -> list[Candidate]:
        self.get(KEY, now)
        return []

    def observations(self, key: Key) -> list[Observation]:
        self.get(KEY, 0.0)
        return []


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def guarded(store: Faulty, clock: Clock, is_remote: bool = True) -> GuardedReads:
    return GuardedReads(store, is_remote, clock)  # type: ignore[arg-type]


def test_a_store_that_hangs_costs_a_lookup_its_deadline_and_the_next_nothing() -> None:
    store, clock = Faulty(), Clock()
    reads = guarded(store, clock)
    store.hangs.clear()
    started = time.monotonic()
    with pytest.raises(StoreError, match="did not answer within 50 ms"):
        reads.observations(KEY)
    assert DEADLINE_S <= time.monotonic() - started < 1.0
    for _ in range(100):
        with pytest.raises(StoreError, match="the store is down"):
            reads.get(KEY, 0.0)
        with pytest.raises(StoreError, match="the store is down"):
            reads.nearest(b"p", VECTOR, 5, 0.0)
    assert store.asked == 1
    store.hangs.set()
    reads.close()


@pytest.mark.parametrize("is_remote", [True, False])
def test_it_recovers_by_itself(is_remote: bool) -> None:
    store, clock = Faulty(), Clock()
    reads = guarded(store, clock, is_remote)
    store.error = StoreError("connection refused")
    for _ in range(3):
        with pytest.raises(StoreError, match="connection refused"):
            reads.get(KEY, 0.0)
        clock.now += RETRY_S
    store.error = None
    assert reads.get(KEY, 0.0) == Found("answer", "{}", 0.0)
    assert reads.nearest(b"p", VECTOR, 5, 0.0) == []
    assert store.asked == 5
    reads.close()


def test_an_index_that_is_loading_is_no_fault() -> None:
    store, clock = Faulty(), Clock()
    reads = guarded(store, clock)
    store.error = Loading()
    with pytest.raises(Loading):
        reads.nearest(b"p", VECTOR, 5, 0.0)
    store.error = None
    assert reads.get(KEY, 0.0)
    reads.close()
