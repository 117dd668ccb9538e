"""The threads beside the cache: nothing is lost, nothing waits in vain."""

import threading

import pytest
from semantic_cache.batcher import Batcher
from semantic_cache.janitor import Janitor


def test_what_waits_is_taken_together_in_order_and_bounded() -> None:
    batches: list[list[int]] = []
    started, release = threading.Event(), threading.Event()

    def handle(batch: list[int]) -> None:
        batches.append(batch)
        started.set()
        assert release.wait(10)

    batcher = Batcher(handle, limit=3, name="test")
    batcher.submit(0)
    assert started.wait(10)
    for item in range(1, 8):
        batcher.submit(item)
    release.set()
    batcher.close()
    assert batches == [[0], [1, 2, 3], [4, 5, 6], [7]]


def test_a_failed_batch_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    handled: list[int] = []

    def handle(batch: list[int]) -> None:
        if batch == [0]:
            raise RuntimeError("no")
        handled.extend(batch)

    batcher = Batcher(handle, limit=1, name="test")
    batcher.submit(0)
    batcher.submit(1)
    batcher.close()
    assert handled == [1]
    assert "a batch of 1 failed in thread test" in caplog.text


def test_the_janitor_works_until_it_is_closed() -> None:
    worked = threading.Semaphore(0)
    janitor = Janitor(lambda: worked.release(), interval_s=0.01)
    assert all(worked.acquire(timeout=10) for _ in range(3))
    janitor.close()
    while worked.acquire(blocking=False):
        pass
    assert not worked.acquire(timeout=0.05)
