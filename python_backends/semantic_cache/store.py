"""The contract of a store: the truth about what is cached, shared by the servers that open it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from semantic_cache.records import Candidate, Checks, Entry, Found, Key, Observation, Selector, Usage, Vector

ORDERS = ("lru", "lfu", "cost")


class StoreError(Exception):
    """A store cannot do what it was asked; the message says what its database said."""


class Loading(Exception):  # noqa: N818 - a state, not a fault
    """The partition's index is being read from the store; it will answer soon."""


class Store(Protocol):
    """Where entries are kept. What put() or invalidate() has returned from is durable, and seen by every server.

    Methods raise StoreError, and may be called from any thread; nearest() from one thread at a time.
    """

    def secret(self) -> bytes:
        """Return 32 random bytes, made once for this store and the same on every server."""

    def get(self, key: Key, now: float) -> Found | None:
        """Return the answer stored under a key, unless it has expired."""

    def nearest(self, partition: bytes, vector: Vector, count: int, now: float) -> list[Candidate]:
        """Return about the `count` live entries of a partition nearest to a unit vector. Raises Loading."""

    def put(self, entries: Sequence[Entry]) -> None:
        """Store all entries; one with the key of another replaces it."""

    def touch(self, uses: Mapping[Key, int], now: float) -> None:
        """Count hits of entries, for eviction; unknown keys are ignored."""

    def invalidate(self, selector: Selector) -> int:
        """Delete what matches, and return how many there were. Raises ValueError for a selector that is empty."""

    def purge(self, now: float) -> int:
        """Delete what has expired, and return how many there were."""

    def usage(self) -> Usage:
        """Return how much there is, what expired and is not yet purged included."""

    def evict(self, order: str, limit: Usage) -> int:
        """Delete entries until the store is within `limit`, and return how many.

        First go: "lru" those not used for longest, "lfu" those used least, "cost" those that save the fewest tokens per
        byte, each hit and the first answer counted.
        """

    def observe(self, observations: Iterable[Observation]) -> None:
        """Keep observations of entries, as long as the entry lives."""

    def observations(self, key: Key) -> list[Observation]:
        """Return what was observed of an entry, oldest first."""

    def check(self, partition: bytes, correct: bool) -> None:
        """Count a hit that was checked (Checks.plus), for all servers."""

    def checks(self) -> dict[bytes, Checks]:
        """Return what was counted, by partition."""

    def export(self, after: bytes, limit: int) -> list[Entry]:
        """Return up to `limit` entries with an exact key above `after`, by exact key."""

    def warm(self) -> None:
        """Read what large partitions need to be searched."""

    def keep(self) -> None:
        """Write what makes the next start quick, if much has changed."""

    def close(self) -> None:
        """Close all connections; nobody may use the store any more."""
