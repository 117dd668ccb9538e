"""Identical requests at one time: the first asks, all get what it gets."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

KEPT_S = 30.0  # longer than a lookup that found nothing takes, and than storing takes


class Passenger(Protocol):
    """One request that waits for an answer."""

    def send(self, text: str) -> None:
        """Take the next piece of the answer."""

    def finish(self, answer: str, kept: Callable[[], None] | None) -> None:
        """Take the end of the answer; `answer` is all of it.

        The one that gets `kept` is the leader: it has the answer stored, and `kept` called, on any thread, when the
        cache finds the answer, or never will.
        """

    def fail(self, message: str) -> None:
        """Take the news that there is no answer."""

    def has_left(self) -> bool:
        """Whether nobody waits for it any more."""


class Flight:
    """One answer in the making and those who wait for it; the first of them leads. Thread-safe."""

    def __init__(self, leader: Passenger) -> None:
        self._passengers: list[tuple[Passenger, int]] = [(leader, 0)]  # with how much each has got
        self._text = ""
        self._lock = threading.RLock()  # a passenger that has nothing to store calls back at once
        self._is_over = False
        self._found_since = -math.inf

    def board(self, passenger: Passenger, asked: float) -> bool:
        """Let another one wait, who at once gets what there is; False: the flight is over.

        asked: when the cache was asked, in seconds of the monotonic clock. Who found nothing there because this flight
        was in the air, or its answer not yet stored, and comes after it has landed, gets the answer too.
        """
        with self._lock:
            if self._is_over and asked >= self._found_since:
                return False
            if self._is_over:
                passenger.send(self._text)
                passenger.finish(self._text, None)
                return True
            if self._text:
                passenger.send(self._text)
            self._passengers.append((passenger, len(self._text)))
            return True

    def feed(self, text: str) -> None:
        """Take a piece of the answer; one that was sent before, by an attempt that failed, is not sent again."""
        with self._lock:
            self._text += text
            self._passengers = [
                (passenger, self._send(passenger, got))
                for passenger, got in self._passengers
                if not self._left(passenger)
            ]

    def restart(self) -> bool:
        """Begin anew after a failed attempt: its leader is told, the next one leads; False: nobody is left."""
        with self._lock:
            self._text = ""
            leader, _ = self._passengers.pop(0) if self._passengers else (None, 0)
            if leader:
                leader.fail("the answer could not be made; the server's log says why")
            self._is_over = not self._passengers
            return not self._is_over

    def land(self) -> None:
        """Give everyone the end."""
        with self._lock:
            self._is_over = True
            self._found_since = math.inf
            for number, (passenger, _) in enumerate(self._passengers):
                passenger.finish(self._text, None if number else self._note_found)

    def is_empty(self) -> bool:
        """Whether everybody has left; if so, the flight is over."""
        with self._lock:
            self._passengers = [item for item in self._passengers if not self._left(item[0])]
            self._is_over = self._is_over or not self._passengers
            return not self._passengers

    def _note_found(self) -> None:
        with self._lock:
            self._found_since = time.monotonic()

    def _send(self, passenger: Passenger, got: int) -> int:
        if len(self._text) > got:
            passenger.send(self._text[got:])
        return max(got, len(self._text))

    def _left(self, passenger: Passenger) -> bool:
        if not passenger.has_left():
            return False
        passenger.fail("the request was cancelled")
        return True


class _Retired(NamedTuple):
    """A flight that is over, since a time of the monotonic clock in seconds."""

    name: str
    flight: Flight
    since: float


class Flights:
    """The flights in the air and those that have just landed, by name. Thread-safe."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}
        self._retired: deque[_Retired] = deque()
        self._lock = threading.Lock()

    def join(self, name: str, passenger: Passenger, start: Callable[[Flight], None], asked: float) -> bool:
        """Board the flight of that name, or start one; return whether there was one. Without a name, start one.

        asked: see Flight.board().
        """
        with self._lock:
            self._drop_old()
            flight = self._flights.get(name)
            if flight and flight.board(passenger, asked):
                return True
            flight = Flight(passenger)
            if name:
                self._flights[name] = flight
        start(flight)
        return False

    def retire(self, name: str, flight: Flight) -> None:
        """Forget a flight that is over, once nobody can still be on the way to it."""
        with self._lock:
            self._retired.append(_Retired(name, flight, time.monotonic()))

    def _drop_old(self) -> None:
        now = time.monotonic()
        while self._retired and self._retired[0].since < now - KEPT_S:
            old = self._retired.popleft()
            if self._flights.get(old.name) is old.flight:
                del self._flights[old.name]
