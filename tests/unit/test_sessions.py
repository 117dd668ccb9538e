"""Sessions: durable turns, rewinding and forking, walls between tenants, and one request at a time."""

import json
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speculative_decoding import session_store
from speculative_decoding.kv_cache import KVCache
from speculative_decoding.session_locks import MAX_WAITING, SessionBusyError, SessionLocks
from speculative_decoding.session_store import SessionConflictError, SessionStore, TooManySessionsError, Turn
from speculative_decoding.sessions import MAX_TTL_S, InvalidSessionError, Lease, Sessions

from tests.key_values import Clock, found, insert, make_cache

PYTHON_BACKENDS = Path(__file__).parents[2] / "python_backends"
TTL_S = 60.0
HOSTILE = "../../etc/passwd'); DROP TABLE sessions; --"
WRITER = """
import sys
from collections.abc import Callable
from pathlib import Path
from speculative_decoding.session_store import SessionStore, Turn
store = SessionStore(Path(sys.argv[1]))
number = 0
while True:
    store.append("ada", "chat", number, Turn(3 * number, (number, number, number), "[]"), 0.0, 1e9)
    print(number, flush=True)
    number += 1
"""


class Service:
    """Sessions with their parts, and a restart that keeps the disk alone."""

    def __init__(self, path: Path, pages: int = 16) -> None:
        self.path, self.pages = path, pages
        self.clock = Clock()
        self.start()

    def start(self) -> None:
        self.cache: KVCache = make_cache(self.pages, clock=self.clock)
        self.store = SessionStore(self.path)
        self.sessions = Sessions(self.store, self.cache, self.clock)

    def restart(self) -> None:
        self.store.close()
        self.start()

    def turn(self, session_id: str, tokens: list[int], tenant: str = "ada") -> None:
        """A request: what is new is computed and stored, and the turn kept."""
        with self.sessions.open(tenant, session_id, TTL_S) as lease:
            before = lease.session.tokens
            insert(self.cache, tenant, [*before, *tokens])
            lease.append(len(before), tokens, json.dumps([{"role": "user", "content": "?"}]))

    def tokens(self, session_id: str, tenant: str = "ada") -> list[int]:
        with self.sessions.open(tenant, session_id, TTL_S) as lease:
            return lease.session.tokens


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path / "state" / "sessions.sqlite")


def test_a_session_continues_after_a_restart_with_the_same_tokens(service: Service) -> None:
    service.turn("chat", [1, 2, 3, 4, 5])
    service.turn("chat", [6, 7, 8, 9])
    service.restart()
    with service.sessions.open("ada", "chat", TTL_S) as lease:
        assert lease.session.tokens == [1, 2, 3, 4, 5, 6, 7, 8, 9]
        assert [len(turn.tokens) for turn in lease.session.turns] == [5, 4]
        assert json.loads(lease.session.turns[0].messages) == [{"role": "user", "content": "?"}]
    assert found(service.cache, "ada", list(range(1, 10))) == 0, "the blocks are gone, the tokens are not"
    service.turn("chat", [10])
    assert service.tokens("chat") == list(range(1, 11))
    assert found(service.cache, "ada", list(range(1, 12))) == 8


@pytest.mark.parametrize("round_", range(3))
def test_a_killed_server_loses_no_turn_that_was_acknowledged(tmp_path: Path, round_: int) -> None:
    path = tmp_path / "sessions.sqlite"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], cwd=PYTHON_BACKENDS, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.readline()
    time.sleep(0.05 + 0.1 * round_)
    process.kill()
    acknowledged = 1 + process.communicate()[0].count("\n")
    session = SessionStore(path).get("ada", "chat", 0.0)
    assert session and acknowledged <= len(session.turns) <= acknowledged + 1
    assert session.tokens == [number for number in range(len(session.turns)) for _ in range(3)]


def test_a_turn_that_was_rendered_anew_replaces_tokens_and_rewinding_brings_them_back(service: Service) -> None:
    service.turn("chat", [1, 2, 3, 4])
    with service.sessions.open("ada", "chat", TTL_S) as lease:
        lease.append(2, [9, 9], "[]")
        assert lease.session.tokens == [1, 2, 9, 9]
        lease.rewind(1)
        assert lease.session.tokens == [1, 2, 3, 4]
        lease.rewind(0)
        assert lease.session.tokens == []
        with pytest.raises(InvalidSessionError, match="turn is 1; session_id 'chat' has turns 0 to 0"):
            lease.rewind(1)


def test_a_fork_and_its_origin_go_their_own_ways(service: Service) -> None:
    service.turn("chat", [1, 2, 3, 4, 5])
    with service.sessions.open("ada", "chat", TTL_S) as lease:
        lease.fork("other")
        with pytest.raises(SessionConflictError, match="'other' exists already"):
            lease.fork("other")
        with pytest.raises(SessionBusyError), service.sessions.open("ada", "third", TTL_S):
            lease.fork("third")
    service.turn("other", [6])
    service.turn("chat", [7])
    assert (service.tokens("chat"), service.tokens("other")) == ([1, 2, 3, 4, 5, 7], [1, 2, 3, 4, 5, 6])
    service.cache.check_integrity()


def test_forking_or_rewinding_what_is_unknown_is_refused(service: Service) -> None:
    with service.sessions.open("ada", "nothing", TTL_S) as lease:
        with pytest.raises(SessionConflictError, match="'nothing' is unknown"):
            lease.fork("copy")
        assert not lease.close()


def test_sessions_pin_their_blocks_until_they_are_closed(service: Service) -> None:
    service.turn("chat", list(range(8)))
    for number in range(10):
        insert(service.cache, "bob", [100 + number] * 17)
    assert found(service.cache, "ada", [*range(8), 0]) == 8
    with service.sessions.open("ada", "chat", TTL_S) as lease:
        assert lease.close()
        assert lease.session.tokens == []
    assert service.cache.snapshot().blocks_pinned == 0
    assert service.tokens("chat") == []
    assert service.sessions.snapshot().open == 0


def test_rewinding_lets_go_of_the_blocks_after_it(service: Service) -> None:
    service.turn("chat", list(range(8)))
    service.turn("chat", list(range(8, 16)))
    assert service.cache.snapshot().blocks_pinned == 4
    with service.sessions.open("ada", "chat", TTL_S) as lease:
        lease.rewind(1)
    assert service.cache.snapshot().blocks_pinned == 2


def test_a_session_is_forgotten_when_its_time_is_over_and_every_request_renews_it(service: Service) -> None:
    service.turn("chat", [1])
    service.clock.now = TTL_S - 1
    service.turn("chat", [2])
    service.clock.now = 2 * TTL_S - 2
    assert service.tokens("chat") == [1, 2]
    service.clock.now = 3 * TTL_S - 2
    assert service.tokens("chat") == []
    assert service.sessions.list("ada") == []
    service.turn("chat", [3])  # a new one under the old id
    assert service.tokens("chat") == [3]


def test_a_session_does_not_expire_while_a_request_that_came_in_time_runs(service: Service) -> None:
    service.turn("chat", [1])
    service.clock.now = TTL_S - 1
    with service.sessions.open("ada", "chat", TTL_S) as lease:
        service.clock.now = TTL_S + 1
        service.turn("other", [1])
        lease.append(1, [2], "[]")
    assert service.tokens("chat") == [1, 2]


def test_what_has_expired_leaves_the_disk(service: Service) -> None:
    service.turn("chat", [1])
    service.clock.now = TTL_S
    service.sessions.purge()
    with sqlite3.connect(service.path) as connection:
        assert connection.execute("SELECT count(*) FROM turns").fetchone() == (0,)


def test_tenants_have_their_own_sessions_whatever_they_are_called(service: Service) -> None:
    for tenant in ("ada", "bob"):
        service.turn("chat", [len(tenant), ord(tenant[0])], tenant)
        service.turn(HOSTILE, [7], tenant)
    assert [service.tokens("chat", tenant)[1] for tenant in ("ada", "bob")] == [ord("a"), ord("b")]
    with service.sessions.open("bob", "chat", TTL_S) as lease:
        lease.close()
    assert [entry.id for entry in service.sessions.list("bob")] == [HOSTILE]
    assert {entry.id for entry in service.sessions.list("ada")} == {"chat", HOSTILE}
    assert service.sessions.list("eve") == []
    assert service.tokens("chat", "bob") == []
    assert {path.name.split("-")[0] for path in service.path.parent.iterdir()} == {"sessions.sqlite"}


def test_a_list_tells_turns_and_times_the_last_used_first(service: Service) -> None:
    service.turn("one", [1])
    service.clock.now = 5.0
    service.turn("two", [1])
    service.clock.now = 9.0
    service.turn("one", [2])
    first, second = service.sessions.list("ada")
    assert (first.id, first.turns, first.created, first.used, first.expires) == ("one", 2, 0.0, 9.0, 9.0 + TTL_S)
    assert (second.id, second.turns) == ("two", 1)


def test_only_the_owner_can_read_the_file(service: Service) -> None:
    service.turn("chat", [1])
    for path in service.path.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_of_another_release_is_refused(service: Service) -> None:
    with sqlite3.connect(service.path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="schema version 99, not 1: name another file"):
        SessionStore(service.path)


@pytest.mark.parametrize("session_id", ["", "a\nb", "a\0b", "é" * 129, "\udc80"])
def test_ids_that_cannot_be_are_refused(service: Service, session_id: str) -> None:
    with pytest.raises(InvalidSessionError, match="it must be 1 to 256 bytes"):
        service.sessions.open("ada", session_id, TTL_S)


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, MAX_TTL_S + 1, float("nan"), float("inf")])
def test_times_to_live_that_cannot_be_are_refused(service: Service, ttl_s: float) -> None:
    with pytest.raises(InvalidSessionError, match=r"session_ttl_s is .*; it must be above 0"):
        service.sessions.open("ada", "chat", ttl_s)


def test_a_tenant_has_a_bounded_number_of_sessions(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_store, "MAX_SESSIONS", 2)
    service.turn("one", [1])
    service.turn("two", [1])
    with pytest.raises(TooManySessionsError, match="2 sessions are open"):
        service.turn("three", [1])
    service.turn("two", [2])
    service.turn("one", [1], tenant="bob")
    service.clock.now = TTL_S
    service.turn("three", [1])


def test_a_second_server_that_changed_a_session_is_noticed(service: Service) -> None:
    service.turn("chat", [1])
    other = SessionStore(service.path)
    with service.sessions.open("ada", "chat", TTL_S) as lease:
        other.append("ada", "chat", 1, Turn(1, (2,), "[]"), 0.0, TTL_S)
        with pytest.raises(SessionConflictError, match="changed by another server"):
            lease.append(1, [3], "[]")
    assert service.tokens("chat") == [1, 2]


def test_a_busy_session_is_refused_or_waited_for_first_come_first_served(service: Service) -> None:
    lease = service.sessions.open("ada", "chat", TTL_S)
    with pytest.raises(SessionBusyError, match="'chat' is in use by another request"):
        service.sessions.open("ada", "chat", TTL_S)
    service.sessions.open("bob", "chat", TTL_S).release()
    granted: list[tuple[str, Lease]] = []
    service.sessions.open_in_turn("ada", "chat", TTL_S, lambda session: granted.append(("first", session())))
    withdraw = service.sessions.open_in_turn("ada", "chat", TTL_S, lambda session: granted.append(("never", session())))
    service.sessions.open_in_turn("ada", "chat", TTL_S, lambda session: granted.append(("last", session())))
    assert (service.sessions.snapshot().busy, service.sessions.snapshot().waiting) == (1, 3)
    assert not granted and withdraw() and not withdraw()
    lease.append(0, [1, 2], "[]")
    lease.release()
    assert [name for name, _ in granted] == ["first"]
    assert granted[0][1].session.tokens == [1, 2], "whoever waited sees what was done meanwhile"
    granted[0][1].release()
    assert [name for name, _ in granted] == ["first", "last"]
    granted[1][1].release()
    service.sessions.open("ada", "chat", TTL_S).release()
    with pytest.raises(KeyError):
        lease.release()


def test_too_many_requests_for_one_session_are_refused(service: Service) -> None:
    with service.sessions.open("ada", "chat", TTL_S):
        for _ in range(MAX_WAITING):
            service.sessions.open_in_turn("ada", "chat", TTL_S, lambda session: session().release())
        with pytest.raises(SessionBusyError, match=f"{MAX_WAITING} requests wait for"):
            service.sessions.open_in_turn("ada", "chat", TTL_S, lambda session: session().release())
    assert service.sessions.snapshot().busy == 0


def test_a_session_that_cannot_be_read_is_not_held_for_ever(service: Service) -> None:
    service.store.close()
    for _ in range(2):
        with pytest.raises(sqlite3.ProgrammingError):
            service.sessions.open("ada", "chat", TTL_S)


def test_those_who_wait_for_a_session_that_cannot_be_read_are_told_and_it_is_free_again(service: Service) -> None:
    service.turn("chat", [1])
    lease = service.sessions.open("ada", "chat", TTL_S)
    told: list[str] = []

    def begin(session: Callable[[], Lease]) -> None:
        with pytest.raises(sqlite3.OperationalError) as error:
            session()
        told.append(str(error.value))

    for _ in range(3):
        service.sessions.open_in_turn("ada", "chat", TTL_S, begin)
    with sqlite3.connect(service.path) as connection:
        connection.execute("ALTER TABLE turns RENAME TO hidden")
    lease.release()
    assert told == ["no such table: turns"] * 3
    with sqlite3.connect(service.path) as connection:
        connection.execute("ALTER TABLE hidden RENAME TO turns")
    service.turn("chat", [2])
    assert service.tokens("chat") == [1, 2]


def test_concurrent_requests_on_one_session_never_interleave(service: Service) -> None:
    """Each request reads the tokens and appends their count: any interleaving would repeat or lose one."""
    done = threading.Semaphore(0)

    def answer(session: Callable[[], Lease]) -> None:
        lease = session()
        count = len(lease.session.tokens)
        lease.append(count, [count], "[]")
        lease.release()
        done.release()

    def ask() -> None:
        asked = 0
        while asked < 10:
            try:
                service.sessions.open_in_turn("ada", "chat", TTL_S, answer)
                asked += 1
            except SessionBusyError:
                time.sleep(0.01)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(done.acquire(timeout=10) for _ in range(40))
    assert service.tokens("chat") == list(range(40))


@given(st.lists(st.tuples(st.sampled_from(["append", "rewind", "fork"]), st.integers(0, 5), st.integers(0, 3))))
@settings(max_examples=100, deadline=None)
def test_any_history_of_turns_reads_back_as_a_plain_list_says(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    service = Service(tmp_path_factory.mktemp("sessions") / "sessions.sqlite")
    histories: dict[str, list[list[int]]] = {"0": [[]]}  # the tokens after each turn
    for number, (step, value, which) in enumerate(steps):
        name = sorted(histories)[which % len(histories)]
        history = histories[name]
        with service.sessions.open("ada", name, TTL_S) as lease:
            if step == "append":
                kept = min(value, len(history[-1]))
                history.append([*history[-1][:kept], number, number])
                lease.append(kept, [number, number], "[]")
            elif step == "rewind":
                turn = min(value, len(history) - 1)
                if turn < len(history) - 1:
                    lease.rewind(turn)
                    del history[turn + 1 :]
            elif len(history) > 1:
                lease.fork(str(len(histories)))
                histories[str(len(histories))] = list(history)
    service.restart()
    for name, history in histories.items():
        assert service.tokens(name) == history[-1]
    service.store.close()


def test_locks_leave_nothing_behind() -> None:
    locks = SessionLocks()
    for number in range(100):
        with locks.held(("ada", str(number))):
            assert locks.load() == (1, 0)
    assert locks.load() == (0, 0)
    assert not locks.withdraw(("ada", "0"), lambda: None)
