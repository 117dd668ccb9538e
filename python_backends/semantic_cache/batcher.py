"""A thread that takes work in batches."""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


class Batcher(Generic[Item]):
    """Calls `handle` on a thread of its own with whatever is waiting, at most `limit` items at a time.

    A batch is what came in while the one before it was at work, so nothing waits to fill one. What `handle` raises is
    logged, and the next batch is taken.
    """

    def __init__(self, handle: Callable[[list[Item]], None], limit: int, name: str) -> None:
        self._handle = handle
        self._limit = limit
        self._queue: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, item: Item) -> None:
        """Queue one item."""
        self._queue.put(item)

    def close(self) -> None:
        """Return when everything submitted has been handled; submit nothing afterwards."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            waiting = self._wait()
            batch = [item for item in waiting if item is not None]
            closing = len(batch) < len(waiting)
            if batch:
                self._attempt(batch)

    def _attempt(self, batch: list[Item]) -> None:
        try:
            self._handle(batch)
        except Exception:
            logger.exception("a batch of %d failed in thread %s", len(batch), self._thread.name)

    def _wait(self) -> list[Item | None]:
        waiting = [self._queue.get()]
        while len(waiting) < self._limit and not self._queue.empty():
            waiting.append(self._queue.get())
        return waiting
