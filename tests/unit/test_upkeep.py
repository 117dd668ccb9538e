"""What is done now and then while a model is served: expired sessions leave the disk, and the cache is checked."""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from speculative_decoding import upkeep
from speculative_decoding.session_store import SessionStore, Turn
from speculative_decoding.sessions import Sessions
from speculative_decoding.upkeep import Upkeep

from tests.key_values import Clock, insert, make_cache

PATIENCE_S = 10.0


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "LOOK_S", 0.01)
    monkeypatch.setattr(upkeep, "PURGE_S", 0.02)


def turns_in(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        count: int = connection.execute("SELECT count(*) FROM turns").fetchone()[0]
        return count


def test_expired_sessions_leave_the_disk_by_themselves(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "sessions.sqlite"
    store = SessionStore(path)
    store.append("ada", "chat", 0, Turn(0, (1, 2), "[]"), now=0.0, ttl_s=60.0)
    kept = Upkeep(Sessions(store, None, clock), None, lambda: True)
    assert turns_in(path) == 1
    clock.now = 60.0
    eventually(lambda: turns_in(path) == 0)
    kept.close()


def test_the_cache_is_checked_while_nothing_is_decoded_and_a_contradiction_is_logged_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, idle = make_cache(8), [False]
    insert(cache, "ada", list(range(12)))
    kept = Upkeep(Sessions(SessionStore(tmp_path / "s"), None), cache, lambda: idle[0], check_s=0.01)
    time.sleep(0.1)
    assert cache.snapshot().counters.integrity_checks == 0
    idle[0] = True
    eventually(lambda: cache.snapshot().counters.integrity_checks > 1)
    assert cache.snapshot().counters.integrity_errors == 0
    next(iter(cache._tree)).refs = 7
    eventually(lambda: cache.snapshot().counters.integrity_errors > 0)
    kept.close()
    assert "the key/value cache contradicts itself" in caplog.text


def test_a_cache_is_checked_only_when_that_was_asked_for(tmp_path: Path) -> None:
    cache = make_cache(8)
    kept = Upkeep(Sessions(SessionStore(tmp_path / "s"), None), cache, lambda: True)
    time.sleep(0.1)
    kept.close()
    assert cache.snapshot().counters.integrity_checks == 0
