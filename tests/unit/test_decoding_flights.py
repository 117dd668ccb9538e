"""Identical requests: decoded once, whoever goes or fails."""

import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from speculative_decoding.flights import KEPT_S, Flights
from speculative_decoding.logprobs import TokenLogprob
from speculative_decoding.options import GenerationOptions
from speculative_decoding.responder import Piece, Reply
from speculative_decoding.sequence import FinishReason, Sequence


def sequence(index: int = 0) -> Sequence:
    return Sequence([1], GenerationOptions(stream=True), lambda *event: None, frozenset(), index)


SEQUENCE = sequence()


def piece(text: str) -> Piece:
    """A token for each character."""
    return Piece(text, len(text), [(TokenLogprob(ord(character), -1.0, 1),) for character in text])


class Client:
    """Notes what it is told."""

    def __init__(self, name: Hashable = "name", answers: int = 1, streams: bool = True) -> None:
        self.name, self.answers, self.streams = name, answers, streams
        self.sent = piece("")
        self.whole: dict[int, str] = {}
        self.failure: FinishReason | None = None
        self.follows = self.gone = self.late = False
        self.is_stored: Callable[[], None] = lambda: None

    def join(self, flights: Flights, engine: "Engine", asked: float | None = None) -> bool:
        asked = time.monotonic() if asked is None else asked
        return flights.join(self.name, self, self.streams, self.answers, engine.start, asked)

    def follow(self) -> None:
        self.follows = True

    def when_kept(self, call: Callable[[], None]) -> None:
        self.is_stored = call

    def is_late(self) -> bool:
        return self.late

    def partial(self, sequence: Sequence, new: Piece) -> None:
        self.sent = Piece(self.sent.text + new.text, self.sent.tokens + new.tokens, self.sent.logprobs + new.logprobs)

    def complete(self, sequence: Sequence, last: Piece, whole: Piece, reason: FinishReason) -> None:
        if self.answers == 1:
            self.partial(sequence, last)
            assert self.sent == whole  # text, tokens and log-probabilities
        else:
            assert last == whole
        self.whole[sequence.index] = whole.text

    def fail(self, reason: FinishReason) -> None:
        assert self.failure is None
        self.failure = reason

    def is_cancelled(self) -> bool:
        return self.gone


class Engine:
    """Notes the replies that it is to decode for."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.error: Exception | None = None

    def start(self, reply: Reply) -> None:
        if self.error:
            raise self.error
        self.replies.append(reply)


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_all_get_the_answer_and_one_is_stored(engine: Engine) -> None:
    flights = Flights()
    leader, streaming, waiting = Client(), Client(), Client(streams=False)
    assert not leader.join(flights, engine)
    [shared] = engine.replies
    shared.partial(SEQUENCE, piece("a "))
    assert streaming.join(flights, engine)
    assert waiting.join(flights, engine)
    assert streaming.sent.text == "a "  # at once
    shared.partial(SEQUENCE, piece("b "))
    assert [client.sent.text for client in (leader, streaming, waiting)] == ["a b ", "a b ", ""]
    shared.complete(SEQUENCE, piece("c"), piece("a b c"), "stop")
    for client in (leader, streaming, waiting):
        assert client.sent.text == client.whole[0] == "a b c"
    assert [client.follows for client in (leader, streaming, waiting)] == [False, True, True]
    assert len(engine.replies) == 1
    leader.is_stored()
    assert not Client().join(flights, engine)  # over: the next one is decoded again


def test_of_several_answers_each_gets_all_even_who_joins_when_some_are_there(engine: Engine) -> None:
    flights = Flights()
    leader, follower = Client(answers=3, streams=False), Client(answers=3, streams=False)
    leader.join(flights, engine)
    [shared] = engine.replies
    shared.complete(sequence(2), piece("z"), piece("z"), "stop")
    assert follower.join(flights, engine) and not leader.whole
    shared.complete(sequence(0), piece("x"), piece("x"), "length")
    shared.complete(sequence(1), piece("y"), piece("y"), "stop")
    assert leader.whole == follower.whole == {0: "x", 1: "y", 2: "z"}


def test_when_one_of_several_answers_fails_what_became_of_the_others_is_not_mixed_in(engine: Engine) -> None:
    flights = Flights()
    leader, follower = Client(answers=2, streams=False), Client(answers=2, streams=False)
    leader.join(flights, engine)
    follower.join(flights, engine)
    engine.replies[0].fail("error")
    first, second = engine.replies
    first.complete(sequence(1), piece("old"), piece("old"), "stop")
    first.fail("error")
    assert first.is_cancelled() and not second.is_cancelled()
    second.complete(sequence(0), piece("x"), piece("x"), "stop")
    assert not follower.whole
    second.complete(sequence(1), piece("y"), piece("y"), "stop")
    assert follower.whole == {0: "x", 1: "y"} and leader.failure == "error" and not leader.whole


@pytest.mark.parametrize(("how", "reason"), [("gone", "cancelled"), ("late", "timeout")])
def test_when_the_leader_goes_decoding_goes_on_for_the_others(engine: Engine, how: str, reason: FinishReason) -> None:
    flights = Flights()
    leader, follower = Client(), Client()
    leader.join(flights, engine)
    follower.join(flights, engine)
    [shared] = engine.replies
    setattr(leader, how, True)
    assert not shared.is_cancelled()
    assert leader.failure == reason
    shared.complete(SEQUENCE, piece("x"), piece("x"), "stop")
    assert follower.whole == {0: "x"} and not follower.follows and not leader.whole


def test_who_would_wait_no_longer_is_told_and_the_others_are_not(engine: Engine) -> None:
    flights = Flights()
    leader, follower = Client(), Client()
    leader.join(flights, engine)
    follower.join(flights, engine)
    follower.late = True
    assert not engine.replies[0].is_cancelled()
    assert (leader.failure, follower.failure) == (None, "timeout")
    leader.late = True
    assert engine.replies[0].is_cancelled()
    assert leader.failure == "timeout"


def test_when_all_have_gone_decoding_ends_and_nobody_joins_it(engine: Engine) -> None:
    flights = Flights()
    client, late = Client(), Client()
    client.join(flights, engine)
    client.gone = True
    assert engine.replies[0].is_cancelled()
    assert not late.join(flights, engine)
    engine.replies[0].fail("cancelled")  # what the engine says of the first must not reach the second
    assert late.failure is None
    engine.replies[1].complete(SEQUENCE, piece("x"), piece("x"), "stop")
    assert late.whole == {0: "x"}


@given(st.lists(st.integers(1, 4), max_size=6), st.lists(st.integers(1, 4), max_size=6))
def test_when_decoding_fails_a_follower_starts_anew_and_nothing_is_sent_twice(
    before: list[int], after: list[int]
) -> None:
    engine, flights, answer = Engine(), Flights(), "abcdefghijklmnopqrstuvwxyz"
    leader, follower = Client(), Client()
    leader.join(flights, engine)
    follower.join(flights, engine)

    def send(reply: Reply, sizes: list[int]) -> str:
        rest = answer
        for size in sizes:
            reply.partial(SEQUENCE, piece(rest[:size]))
            rest = rest[size:]
        return rest

    send(engine.replies[0], before)
    engine.replies[0].fail("error")
    assert leader.failure == "error" and follower.failure is None
    assert len(engine.replies) == 2
    last = send(engine.replies[1], after)
    engine.replies[1].complete(SEQUENCE, piece(last), piece(answer), "stop")
    assert follower.whole == {0: answer}


def test_a_follower_that_cannot_start_anew_is_told(engine: Engine) -> None:
    flights = Flights()
    clients = [Client(), Client()]
    for client in clients:
        client.join(flights, engine)
    engine.error = RuntimeError("full")
    with pytest.raises(RuntimeError):
        engine.replies[0].fail("error")
    assert [client.failure for client in clients] == ["error", "error"]
    engine.error = None
    assert not Client().join(flights, engine)


def test_who_asked_the_cache_before_it_had_the_answers_gets_them_all_the_same(engine: Engine) -> None:
    flights = Flights()
    leader, streaming, waiting, asking_later = Client(), Client(), Client(streams=False), Client()
    asked = time.monotonic()
    leader.join(flights, engine)
    [shared] = engine.replies
    shared.partial(SEQUENCE, piece("a "))
    shared.complete(SEQUENCE, piece("b"), piece("a b"), "stop")
    assert asking_later.join(flights, engine)  # the answers are there, but not yet in the cache
    leader.is_stored()
    for client in (streaming, waiting):
        assert client.join(flights, engine, asked)
    for client in (streaming, waiting, asking_later):
        assert client.follows and client.sent.text == client.whole[0] == "a b"
    assert not Client().join(flights, engine)  # asked after: the cache would have had them
    assert len(engine.replies) == 2


def test_answers_are_kept_no_longer_than_somebody_may_be_on_the_way(engine: Engine) -> None:
    now = 100.0
    flights = Flights(lambda: now)
    for name in "abc":
        Client(name).join(flights, engine)
        now += KEPT_S
        engine.replies[-1].complete(SEQUENCE, piece("x"), piece("x"), "stop")
    assert not Client("a").join(flights, engine, asked=0.0)
    assert Client("b").join(flights, engine, asked=0.0)


def test_a_leader_that_cannot_start_leaves_nothing_behind(engine: Engine) -> None:
    flights = Flights()
    engine.error = RuntimeError("full")
    with pytest.raises(RuntimeError):
        Client().join(flights, engine)
    engine.error = None
    assert not Client().join(flights, engine)


def test_a_client_that_cannot_be_sent_to_does_not_disturb_the_others(engine: Engine) -> None:
    flights = Flights()
    leader, follower = Client(), Client()
    leader.join(flights, engine)
    follower.join(flights, engine)

    def refuse(sequence: Sequence, new: Piece) -> None:
        raise OSError("gone")

    leader.partial = refuse  # type: ignore[method-assign]
    [shared] = engine.replies
    shared.partial(SEQUENCE, piece("a "))
    shared.complete(SEQUENCE, piece("b"), piece("a b"), "stop")
    assert follower.whole == {0: "a b"} and not follower.follows


def test_threads_that_join_while_it_ends_all_get_an_answer() -> None:
    flights, clients = Flights(), [Client() for _ in range(200)]

    def decode(reply: Any) -> None:
        def run() -> None:
            reply.partial(SEQUENCE, piece("a "))
            reply.complete(SEQUENCE, piece("b"), piece("a b"), "stop")

        threading.Thread(target=run).start()

    def run(share: list[Client]) -> Callable[[], None]:
        return lambda: [flights.join("name", client, True, 1, decode, time.monotonic()) for client in share] and None

    threads = [threading.Thread(target=run(clients[at::8])) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(5)
    assert {client.sent.text for client in clients} == {"a b"} == {client.whole.get(0) for client in clients}
