"""Conversations that continue: one request at a time, kept on disk, their blocks pinned in the key/value cache."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from speculative_decoding.kv_metrics import SessionMetrics
from speculative_decoding.prefix_cache import PrefixCache
from speculative_decoding.session_locks import Key, SessionLocks
from speculative_decoding.session_store import SessionStore, SessionSummary, StoredSession, Turn

MAX_ID_BYTES = 256
MAX_TTL_S = 30 * 24 * 3600.0


class InvalidSessionError(ValueError):
    """A request names a session, a turn or a time that cannot be; the message says what would be right."""


@dataclass(frozen=True)
class SessionParts:
    """What sessions are made of: the conversations on disk, who holds them, and the cache, if any, of their blocks."""

    store: SessionStore
    locks: SessionLocks
    cache: PrefixCache | None
    clock: Callable[[], float]


class Lease:
    """One request's hold of a session, from `Sessions` on until `release`; a context manager that releases."""

    def __init__(self, parts: SessionParts, key: Key, ttl_s: float) -> None:
        """Read the session, and renew its time to live; a new one has no turns."""
        self._parts = parts
        self._key = key
        self._ttl_s = ttl_s
        now = parts.clock()
        parts.store.renew(*key, now, ttl_s)
        self._session = parts.store.get(*key, now) or StoredSession(key[1], now, now, now + ttl_s, ())

    @property
    def session(self) -> StoredSession:
        """The conversation as it is now."""
        return self._session

    def append(self, kept: int, tokens: Sequence[int], messages: str) -> None:
        """Add a turn: the session's tokens are its first `kept`, then `tokens`; `messages` (JSON) is kept with it.

        Durable once it has returned. Raises SessionConflictError, TooManySessionsError.
        """
        turn = Turn(kept, tuple(tokens), messages)
        self._parts.store.append(*self._key, len(self._session.turns), turn, self._parts.clock(), self._ttl_s)
        self._reload()

    def rewind(self, turns: int) -> None:
        """Go back to where the session had that many turns. Raises InvalidSessionError for more than it has."""
        have = len(self._session.turns)
        if not 0 <= turns <= have:
            raise InvalidSessionError(f"turn is {turns}; session_id {self._key[1]!r} has turns 0 to {have}")
        self._parts.store.rewind(*self._key, turns, self._parts.clock())
        self._reload()

    def fork(self, fork_id: str) -> None:
        """Copy the session under another id, which must be free.

        Raises InvalidSessionError, SessionBusyError, SessionConflictError, TooManySessionsError.
        """
        require_id(fork_id)
        tenant, session_id = self._key
        with self._parts.locks.held((tenant, fork_id)):
            self._parts.store.fork(tenant, session_id, fork_id, self._parts.clock(), self._ttl_s)
            self._pin((tenant, fork_id))

    def close(self) -> bool:
        """Forget the session and let its blocks go; False when it was not known."""
        if self._parts.cache:
            self._parts.cache.unpin(self._key)
        known = self._parts.store.delete(*self._key)
        self._session = StoredSession(self._key[1], 0.0, 0.0, 0.0, ())
        return known

    def release(self) -> None:
        """Let the next request have the session. Raises KeyError when that was done before."""
        self._parts.locks.give(self._key)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _reload(self) -> None:
        session = self._parts.store.get(*self._key, self._parts.clock())
        self._session = session or StoredSession(self._key[1], 0.0, 0.0, 0.0, ())
        self._pin(self._key)

    def _pin(self, owner: Key) -> None:
        if self._parts.cache:
            self._parts.cache.pin(owner, owner[0], self._session.tokens, self._ttl_s)


class Sessions:
    """All tenants' conversations; a tenant reaches its own alone. Thread-safe.

    A conversation that no request has opened for its time to live is forgotten. Where its blocks are not in the cache
    any more, after eviction or a restart, its tokens are still here to compute them from.
    """

    def __init__(self, store: SessionStore, cache: PrefixCache | None, clock: Callable[[], float] = time.time) -> None:
        self._parts = SessionParts(store, SessionLocks(), cache, clock)

    def open(self, tenant: str, session_id: str, ttl_s: float) -> Lease:
        """Hold a session, known or new. Raises SessionBusyError when another request does, InvalidSessionError.

        Raises sqlite3.Error when it cannot be read; it is not held then.
        """
        require_id(session_id)
        require_ttl(ttl_s)
        key = (tenant, session_id)
        self._parts.locks.take(key)
        return self._lease(key, ttl_s)

    def open_in_turn(
        self, tenant: str, session_id: str, ttl_s: float, granted: Callable[[Callable[[], Lease]], None]
    ) -> Callable[[], bool]:
        """Have `granted` called when no other request holds the session: now, or on the thread that lets go.

        What it gets returns the session, or lets the next request have it and raises sqlite3.Error; it must be called.
        Returns a function that withdraws the request, and is False when it was granted before. Raises SessionBusyError
        when too many wait, InvalidSessionError.
        """
        require_id(session_id)
        require_ttl(ttl_s)
        key = (tenant, session_id)

        def begin() -> None:
            granted(lambda: self._lease(key, ttl_s))

        self._parts.locks.take_in_turn(key, begin)
        return lambda: self._parts.locks.withdraw(key, begin)

    def list(self, tenant: str) -> list[SessionSummary]:
        """Return a tenant's own sessions, the last used first."""
        return self._parts.store.list(tenant, self._parts.clock())

    def purge(self) -> None:
        """Delete what has expired from the disk."""
        self._parts.store.purge(self._parts.clock())

    def snapshot(self) -> SessionMetrics:
        """Return how many sessions there are."""
        return SessionMetrics(self._parts.store.count(self._parts.clock()), *self._parts.locks.load())

    def _lease(self, key: Key, ttl_s: float) -> Lease:
        try:
            return Lease(self._parts, key, ttl_s)
        except BaseException:
            self._parts.locks.give(key)
            raise


def require_id(session_id: str) -> None:
    """Raise InvalidSessionError for what cannot name a session."""
    if not session_id or not session_id.isprintable() or len(session_id.encode()) > MAX_ID_BYTES:
        raise InvalidSessionError(f"session_id is {session_id!r}; it must be 1 to {MAX_ID_BYTES} bytes, all printable")


def require_ttl(ttl_s: float) -> None:
    """Raise InvalidSessionError for a time to live that is none."""
    if not 0 < ttl_s <= MAX_TTL_S:
        raise InvalidSessionError(f"session_ttl_s is {ttl_s}; it must be above 0 and at most {MAX_TTL_S:.0f}")
