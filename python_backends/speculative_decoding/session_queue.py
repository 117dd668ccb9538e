"""Requests in line for a session whose clients may go, or wait no longer, before it is their turn."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from speculative_decoding.sequence import FinishReason

logger = logging.getLogger(__name__)
POLL_S = 0.02  # as often as the responder looks after those who are being answered


@dataclass(eq=False)
class Waiter:
    """A request in line.

    is_cancelled: whether its client has gone. deadline: when its client stops waiting, on time.monotonic()'s clock.
    left: called with the reason once it has left the line.
    """

    is_cancelled: Callable[[], bool]
    deadline: float
    left: Callable[[FinishReason], None]
    withdraw: Callable[[], bool] = lambda: False
    done: bool = False


class SessionQueue:
    """Has requests leave the line within POLL_S of when nobody waits for them any more. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiters: list[Waiter] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="session queue", daemon=True)
        self._thread.start()

    def add(self, waiter: Waiter, withdraw: Callable[[], bool]) -> None:
        """Look after a request until it is granted or leaves; `withdraw` takes it out of line, or is False."""
        with self._changed:
            waiter.withdraw = withdraw
            if not waiter.done:
                self._waiters.append(waiter)
                self._changed.notify()

    def grant(self, waiter: Waiter) -> None:
        """Say that a request's turn has come, before or after it was added.

        Once this returns, is_cancelled is not called any more: Triton dies when a request that was answered is asked.
        """
        with self._changed:
            waiter.done = True

    def close(self) -> None:
        """End the thread; nobody is looked after any more."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            for waiter in list(self._waiters):
                try:
                    self._look(waiter)
                except Exception:
                    logger.exception("a request that waits for a session could not be looked after")
            time.sleep(POLL_S)

    def _wait(self) -> bool:
        """Return once somebody waits; False when the queue is closed."""
        with self._changed:
            self._waiters = [waiter for waiter in self._waiters if not waiter.done]
            self._changed.wait_for(lambda: self._closing or self._waiters)
            return not self._closing

    def _look(self, waiter: Waiter) -> None:
        with self._changed:
            if waiter.done:
                return
            cancelled = waiter.is_cancelled()
            if not cancelled and time.monotonic() < waiter.deadline:
                return
            if not waiter.withdraw():  # its turn has come just now
                return
            waiter.done = True
        waiter.left("cancelled" if cancelled else "timeout")
