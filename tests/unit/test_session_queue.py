"""Requests in line for a session: those whose clients have gone, or wait no longer, leave it."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from speculative_decoding.sequence import FinishReason
from speculative_decoding.session_queue import POLL_S, SessionQueue, Waiter
from speculative_decoding.session_store import SessionStore
from speculative_decoding.sessions import Lease, Sessions

TTL_S = 60.0
PATIENCE_S = 10.0


class Client:
    """Who asks for a session, and what becomes of it."""

    def __init__(self, sessions: Sessions, queue: SessionQueue, deadline: float = math.inf) -> None:
        self.gone = threading.Event()
        self._queue = queue
        self._waiter = Waiter(self._is_gone, deadline, self._left)
        self.lease: Lease | None = None
        self.reason: FinishReason | None = None
        self.answered = threading.Event()
        queue.add(self._waiter, sessions.open_in_turn("ada", "chat", TTL_S, self._granted))

    def _is_gone(self) -> bool:
        assert not self.answered.is_set(), "Triton dies when a request that was answered is asked"
        return self.gone.is_set()

    def _granted(self, session: Callable[[], Lease]) -> None:
        self._queue.grant(self._waiter)
        self.lease = session()
        self.answered.set()

    def _left(self, reason: FinishReason) -> None:
        self.reason = reason
        self.answered.set()


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(SessionStore(tmp_path / "sessions.sqlite"), None)


@pytest.fixture
def queue() -> Iterator[SessionQueue]:
    queue = SessionQueue()
    yield queue
    queue.close()


def test_a_client_that_goes_leaves_the_line_before_its_turn(sessions: Sessions, queue: SessionQueue) -> None:
    holder = sessions.open("ada", "chat", TTL_S)
    first, second, third = (Client(sessions, queue) for _ in range(3))
    second.gone.set()
    assert second.answered.wait(PATIENCE_S)
    assert (second.reason, sessions.snapshot().waiting) == ("cancelled", 2)
    assert not first.answered.is_set() and not third.answered.is_set()
    holder.release()
    assert first.lease and not third.lease
    first.lease.release()
    assert third.lease
    third.lease.release()
    assert sessions.snapshot().busy == 0
    assert POLL_S <= 0.05, "a client that goes is to be noticed within 50 ms"


def test_a_client_that_waits_no_longer_leaves_the_line(sessions: Sessions, queue: SessionQueue) -> None:
    holder = sessions.open("ada", "chat", TTL_S)
    hasty = Client(sessions, queue, time.monotonic() + 0.05)
    assert hasty.answered.wait(PATIENCE_S)
    assert (hasty.reason, sessions.snapshot().waiting) == ("timeout", 0)
    holder.release()
    assert sessions.snapshot().busy == 0


def test_a_client_whose_turn_has_come_is_left_to_who_answers_it(sessions: Sessions, queue: SessionQueue) -> None:
    served = Client(sessions, queue)
    served.gone.set()
    other = Client(sessions, queue)
    other.gone.set()
    assert other.answered.wait(PATIENCE_S)
    assert served.lease and served.reason is None


def test_nobody_is_asked_who_has_been_answered(
    sessions: Sessions, queue: SessionQueue, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(300):
        client = Client(sessions, queue)
        assert client.lease
        client.lease.release()
    holder = sessions.open("ada", "chat", TTL_S)
    waiting = [Client(sessions, queue) for _ in range(8)]
    time.sleep(3 * POLL_S)
    holder.release()
    for client in waiting:
        assert client.lease
        client.lease.release()
    time.sleep(3 * POLL_S)
    assert not caplog.text


def test_one_client_that_cannot_be_asked_does_not_keep_others_in_line(
    sessions: Sessions, queue: SessionQueue, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> bool:
        raise RuntimeError("no such client")

    sessions.open("ada", "chat", TTL_S)
    queue.add(Waiter(broken, math.inf, lambda _: None), lambda: False)
    client = Client(sessions, queue)
    client.gone.set()
    assert client.answered.wait(PATIENCE_S)
    assert "could not be looked after" in caplog.text
