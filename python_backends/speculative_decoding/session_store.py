"""Conversations on disk: the tokens of every turn, in one SQLite file, so that a restart loses none."""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 30.0
MAX_SESSIONS = 10_000  # of one tenant: the file must not grow without bound
SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    key INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    created REAL NOT NULL,
    used REAL NOT NULL,
    expires REAL NOT NULL,
    UNIQUE (tenant, id)
);
CREATE INDEX IF NOT EXISTS sessions_by_expiry ON sessions (expires);
CREATE TABLE IF NOT EXISTS turns (
    session INTEGER NOT NULL REFERENCES sessions (key) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    kept INTEGER NOT NULL,
    tokens BLOB NOT NULL,
    messages TEXT NOT NULL,
    PRIMARY KEY (session, number)
) WITHOUT ROWID;
"""
FIND = "SELECT key, created, used, expires FROM sessions WHERE tenant = ? AND id = ? AND expires > ?"
TURNS = "SELECT kept, tokens, messages FROM turns WHERE session = ? ORDER BY number"
LIST = """SELECT id, created, used, expires, (SELECT count(*) FROM turns WHERE session = key)
    FROM sessions WHERE tenant = ? AND expires > ? ORDER BY used DESC, id"""
COUNT = "SELECT count(*) FROM sessions WHERE expires > ?"
COUNT_OF_TENANT = "SELECT count(*) FROM sessions WHERE tenant = ?"
CREATE = "INSERT INTO sessions (tenant, id, created, used, expires) VALUES (?, ?, ?, ?, ?)"
TOUCH = "UPDATE sessions SET used = ?, expires = ? WHERE key = ?"
APPEND = "INSERT INTO turns (session, number, kept, tokens, messages) VALUES (?, ?, ?, ?, ?)"
REWIND = "DELETE FROM turns WHERE session = ? AND number > ?"
COUNT_TURNS = "SELECT count(*) FROM turns WHERE session = ?"
COPY = """INSERT INTO turns (session, number, kept, tokens, messages)
    SELECT ?, number, kept, tokens, messages FROM turns WHERE session = ?"""
DELETE = "DELETE FROM sessions WHERE tenant = ? AND id = ?"
PURGE = "DELETE FROM sessions WHERE expires <= ?"


class SessionConflictError(Exception):
    """A session is not as the caller believes: another server changed it, or it exists already, or has expired."""


class TooManySessionsError(Exception):
    """A tenant has as many sessions as it may."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer: the session's first `kept` tokens, and then these. `messages` is a JSON array.

    A turn keeps all tokens before it, unless the chat template rendered the conversation anew.
    """

    kept: int
    tokens: tuple[int, ...]
    messages: str


@dataclass(frozen=True)
class StoredSession:
    """A conversation; times are seconds since 1970."""

    id: str
    created: float
    used: float
    expires: float
    turns: tuple[Turn, ...]

    @property
    def tokens(self) -> list[int]:
        """All committed tokens."""
        tokens: list[int] = []
        for turn in self.turns:
            tokens[turn.kept :] = turn.tokens
        return tokens


@dataclass(frozen=True)
class SessionSummary:
    """A conversation in a list."""

    id: str
    created: float
    used: float
    expires: float
    turns: int


class SessionStore:
    """Sessions in `path`, created with its folder if need be; what a method wrote is durable once it has returned.

    Thread-safe. Tenants and ids are values of SQL parameters and nothing else. Methods raise sqlite3.Error.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises ValueError for one that another release made."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)  # conversations are private; SQLite gives its other files the same mode
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        with _only_process_in(path.parent):
            self._prepare(path)

    def get(self, tenant: str, session_id: str, now: float) -> StoredSession | None:
        """Return a session, unless it is unknown or has expired."""
        with self._transaction(writes=False) as connection:
            row = connection.execute(FIND, (tenant, session_id, now)).fetchone()
            turns = connection.execute(TURNS, row[:1]).fetchall() if row else []
        if row is None:
            return None
        _, created, used, expires = row
        return StoredSession(session_id, created, used, expires, tuple(_turn(*turn) for turn in turns))

    def renew(self, tenant: str, session_id: str, now: float, ttl_s: float) -> None:
        """Let a session live on, if it is known, so that it does not expire while a request on it runs."""
        with self._transaction() as connection:
            row = connection.execute(FIND, (tenant, session_id, now)).fetchone()
            if row:
                connection.execute(TOUCH, (now, now + ttl_s, row[0]))

    def append(self, tenant: str, session_id: str, turns: int, turn: Turn, now: float, ttl_s: float) -> None:
        """Add a turn to a session of `turns` turns, which is made if it has none. Raises SessionConflictError."""
        with self._transaction() as connection:
            row = connection.execute(FIND, (tenant, session_id, now)).fetchone()
            if row is None and turns:
                raise SessionConflictError(f"session_id {session_id!r} has expired or was closed meanwhile")
            key = row[0] if row else self._create(tenant, session_id, now, ttl_s)
            if connection.execute(COUNT_TURNS, (key,)).fetchone()[0] != turns:
                raise SessionConflictError(f"session_id {session_id!r} was changed by another server meanwhile")
            tokens = np.array(turn.tokens, np.int32).tobytes()
            connection.execute(APPEND, (key, turns + 1, turn.kept, tokens, turn.messages))
            connection.execute(TOUCH, (now, now + ttl_s, key))

    def rewind(self, tenant: str, session_id: str, turns: int, now: float) -> None:
        """Forget all but the first `turns` turns. Raises SessionConflictError for an unknown session."""
        with self._transaction() as connection:
            connection.execute(REWIND, (self._key(tenant, session_id, now), turns))

    def fork(self, tenant: str, session_id: str, fork_id: str, now: float, ttl_s: float) -> None:
        """Copy a session under another id. Raises SessionConflictError when that is taken, or the session unknown."""
        with self._transaction() as connection:
            source = self._key(tenant, session_id, now)
            connection.execute(COPY, (self._create(tenant, fork_id, now, ttl_s), source))

    def delete(self, tenant: str, session_id: str) -> bool:
        """Forget a session; False when it was unknown."""
        with self._transaction(writes=False) as connection:
            return connection.execute(DELETE, (tenant, session_id)).rowcount > 0

    def list(self, tenant: str, now: float) -> list[SessionSummary]:
        """Return a tenant's sessions, the last used first."""
        with self._transaction() as connection:
            return [SessionSummary(*row) for row in connection.execute(LIST, (tenant, now))]

    def count(self, now: float) -> int:
        """Return how many sessions of all tenants have not expired."""
        with self._transaction(writes=False) as connection:
            return int(connection.execute(COUNT, (now,)).fetchone()[0])

    def purge(self, now: float) -> None:
        """Delete what has expired."""
        with self._transaction() as connection:
            connection.execute(PURGE, (now,))

    def close(self) -> None:
        """Close the file; nobody may use the store any more."""
        with self._lock:
            self._connection.close()

    def _prepare(self, path: Path) -> None:
        connection = self._connection
        connection.execute("PRAGMA journal_mode = WAL")  # a property of the file
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # closed conversations are overwritten, not only unlinked
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise ValueError(f"{path} has schema version {version}, not {SCHEMA_VERSION}: name another file")

    @contextmanager
    def _transaction(self, writes: bool = True) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")  # reads wait for no other process
            with self._connection:
                yield self._connection

    def _key(self, tenant: str, session_id: str, now: float) -> int:
        row = self._connection.execute(FIND, (tenant, session_id, now)).fetchone()
        if row is None:
            raise SessionConflictError(f"session_id {session_id!r} is unknown, or has expired")
        return int(row[0])

    def _create(self, tenant: str, session_id: str, now: float, ttl_s: float) -> int:
        connection = self._connection
        connection.execute(PURGE, (now,))
        if connection.execute(COUNT_OF_TENANT, (tenant,)).fetchone()[0] >= MAX_SESSIONS:
            raise TooManySessionsError(f"{MAX_SESSIONS} sessions are open; close one first")
        try:
            return int(connection.execute(CREATE, (tenant, session_id, now, now, now + ttl_s)).lastrowid or 0)
        except sqlite3.IntegrityError as error:
            raise SessionConflictError(f"session_id {session_id!r} exists already") from error


def _turn(kept: int, tokens: bytes, messages: str) -> Turn:
    return Turn(kept, tuple(np.frombuffer(tokens, np.int32).tolist()), messages)


@contextmanager
def _only_process_in(folder: Path) -> Iterator[None]:
    """Keep other processes from opening a store in `folder`: SQLite cannot wait for its turn to switch WAL on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
