"""Coalescing in front of another model: one answer for all who ask the same, whatever becomes of the first."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from semantic_cache.flights import Flight, Flights
from semantic_cache.key import Keys
from semantic_cache.policy import Policy
from semantic_cache.replay import MOST_PIECES, pieces
from semantic_cache.request import Lookup, parse_lookup
from semantic_cache.upstream import Upstream

KEYS = Keys(b"s" * 32, "m:1", ())


def lookup(prompt: str) -> Lookup:
    return parse_lookup(prompt.encode(), {}, Policy(), KEYS)


class Client:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.answer: str | None = None
        self.kept: Callable[[], None] | None = None
        self.failure = ""
        self.left = False
        self.done = threading.Event()

    def send(self, text: str) -> None:
        self.pieces.append(text)

    def finish(self, answer: str, kept: Callable[[], None] | None) -> None:
        self.answer, self.kept = answer, kept
        self.done.set()

    @property
    def leads(self) -> bool:
        return self.kept is not None

    def fail(self, message: str) -> None:
        self.failure = message
        self.done.set()

    def has_left(self) -> bool:
        return self.left


class Model:
    """Yields pieces as the test lets it, and fails when told."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.calls = 0
        self.tickets = threading.Semaphore(0)
        self.fails_at: dict[int, int] = {}

    def __call__(self, asked: Lookup) -> Iterator[str]:
        self.calls += 1
        call = self.calls
        for number, word in enumerate(self.words):
            assert self.tickets.acquire(timeout=10)
            if self.fails_at.get(call) == number:
                raise RuntimeError("out of memory")
            yield word


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_identical_requests_are_answered_once_and_all_stream() -> None:
    model, coalesced = Model("a ", "b ", "c"), []
    upstream = Upstream(model, lambda: coalesced.append(1))
    clients = [Client() for _ in range(4)]
    for client in clients[:3]:
        upstream.answer(lookup("same"), client)
    model.tickets.release()
    until(lambda: all(client.pieces == ["a "] for client in clients[:3]))
    upstream.answer(lookup("same"), clients[3])  # late: it gets at once what there is
    assert clients[3].pieces == ["a "]
    model.tickets.release(2)
    for client in clients:
        assert client.done.wait(10)
        assert (client.answer, client.pieces) == ("a b c", ["a ", "b ", "c"])
    assert [client.leads for client in clients] == [True, False, False, False]
    assert model.calls == 1 and len(coalesced) == 3
    upstream.close()


def test_different_requests_are_answered_apart() -> None:
    model = Model("x")
    upstream = Upstream(model, lambda: None)
    clients = [Client(), Client()]
    for number, client in enumerate(clients):
        upstream.answer(lookup(f"prompt {number}"), client)
    model.tickets.release(2)
    assert all(client.done.wait(10) and client.leads for client in clients)
    upstream.close()


def test_when_the_leader_leaves_a_follower_takes_over() -> None:
    model = Model("a ", "b ", "c")
    upstream = Upstream(model, lambda: None)
    leader, follower = Client(), Client()
    upstream.answer(lookup("same"), leader)
    upstream.answer(lookup("same"), follower)
    model.tickets.release()
    until(lambda: bool(follower.pieces))
    leader.left = True
    model.tickets.release(2)
    assert follower.done.wait(10) and follower.answer == "a b c" and follower.leads
    assert leader.failure == "the request was cancelled" and leader.answer is None
    assert model.calls == 1
    upstream.close()


def test_when_the_answer_fails_a_follower_starts_anew_and_nothing_is_sent_twice() -> None:
    model = Model("a ", "b ", "c")
    model.fails_at = {1: 2}
    upstream = Upstream(model, lambda: None)
    leader, follower = Client(), Client()
    upstream.answer(lookup("same"), leader)
    upstream.answer(lookup("same"), follower)
    model.tickets.release(6)
    assert leader.done.wait(10) and "could not be made" in leader.failure
    assert follower.done.wait(10) and follower.answer == "a b c" and follower.leads
    assert "".join(follower.pieces) == "a b c"
    assert model.calls == 2
    upstream.close()


def test_an_answer_that_nobody_waits_for_is_abandoned_and_the_next_begins_anew() -> None:
    model = Model(*"abcdefgh")
    upstream = Upstream(model, lambda: None)
    gone = Client()
    upstream.answer(lookup("same"), gone)
    gone.left = True
    model.tickets.release()
    assert gone.done.wait(10)
    client = Client()
    until(lambda: bool(upstream._flights._retired))
    upstream.answer(lookup("same"), client)
    model.tickets.release(8)
    assert client.done.wait(10) and client.answer == "abcdefgh"
    assert model.calls == 2
    upstream.close()


def test_a_flight_that_is_over_takes_nobody_on() -> None:
    flights = Flights()
    started: list[Flight] = []
    leader = Client()
    flights.join("name", leader, started.append, asked=time.monotonic())
    started[0].land()
    assert leader.kept
    leader.kept()
    assert not flights.join("name", Client(), started.append, asked=time.monotonic())
    assert len(started) == 2


def test_who_asked_before_the_cache_had_the_answer_gets_it_and_another_does_not() -> None:
    model, coalesced = Model("a ", "b"), []
    upstream = Upstream(model, lambda: coalesced.append(1))
    early, leader, asking_later, late = Client(), Client(), Client(), Client()
    asked_early = lookup("same")
    upstream.answer(lookup("same"), leader)
    model.tickets.release(2)
    assert leader.done.wait(10)
    until(lambda: bool(upstream._flights._retired))
    upstream.answer(lookup("same"), asking_later)  # the answer is there, but not yet in the cache
    assert leader.kept
    leader.kept()
    upstream.answer(asked_early, early)
    for client in (asking_later, early):
        assert (client.answer, client.leads, client.pieces) == ("a b", False, ["a b"])
    assert coalesced == [1, 1]
    upstream.answer(lookup("same"), late)
    model.tickets.release(2)
    assert late.done.wait(10) and late.leads
    assert model.calls == 2
    upstream.close()


def test_what_has_landed_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    flights, started = Flights(), list[Flight]()
    for number in range(3):
        flights.join(str(number), Client(), started.append, asked=0.0)
    started[0].land()
    flights.retire("0", started[0])
    monkeypatch.setattr("semantic_cache.flights.KEPT_S", 0.0)
    time.sleep(0.01)
    started[1].land()
    flights.retire("1", started[1])
    time.sleep(0.01)
    assert not flights.join("1", Client(), started.append, asked=0.0)
    assert set(flights._flights) == {"1", "2"}


@pytest.mark.parametrize("answer", ["", "one", "one two  three\n\nfour ", " x", "word " * 1000, "\n"])
def test_a_replay_is_the_answer_in_pieces(answer: str) -> None:
    parts = pieces(answer)
    assert "".join(parts) == answer
    assert 1 <= len(parts) <= MOST_PIECES
