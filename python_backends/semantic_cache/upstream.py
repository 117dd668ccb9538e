"""Another Triton text model, asked on a miss: what it streams is sent on, and stored when it is whole."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from semantic_cache.flights import Flight, Flights, Passenger
from semantic_cache.request import Lookup

CONCURRENT = 64  # answers made at one time; others wait

Generate = Callable[[Lookup], Iterator[str]]

logger = logging.getLogger(__name__)


class Upstream:
    """Makes answers, identical ones once, on threads of its own."""

    def __init__(self, generate: Generate, coalesced: Callable[[], None]) -> None:
        """`generate` yields the pieces of an answer and raises RuntimeError; `coalesced` counts those who share one."""
        self._generate = generate
        self._coalesced = coalesced
        self._flights = Flights()
        self._pool = ThreadPoolExecutor(CONCURRENT, "upstream")

    def answer(self, lookup: Lookup, passenger: Passenger) -> None:
        """Have `passenger` get the answer; returns at once."""
        if self._flights.join(lookup.flight, passenger, lambda flight: self._start(lookup, flight), lookup.received):
            self._coalesced()

    def close(self) -> None:
        """Wait for the answers that are being made."""
        self._pool.shutdown()

    def _start(self, lookup: Lookup, flight: Flight) -> None:
        self._pool.submit(self._fly, lookup, flight)

    def _fly(self, lookup: Lookup, flight: Flight) -> None:
        try:
            while not self._attempt(lookup, flight):
                if not flight.restart():
                    return
        except Exception:
            logger.exception("an answer could not be sent")
        finally:
            self._flights.retire(lookup.flight, flight)

    def _attempt(self, lookup: Lookup, flight: Flight) -> bool:
        """Make the answer; False: it failed. It is abandoned when nobody waits for it any more."""
        try:
            for piece in self._generate(lookup):
                flight.feed(piece)
                if flight.is_empty():
                    return True
        except RuntimeError:
            logger.exception("the upstream model failed")
            return False
        flight.land()
        return True
