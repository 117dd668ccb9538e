"""The truth about what is cached: one SQLite file, safe to share between servers on one machine."""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from semantic_cache.embedder import Vector

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 30.0  # for another process that writes: SQLite's lock is not fair, and reads never wait
PURGE_ROWS = 1000  # per transaction, so that a purge never holds writers up for long
SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    partition BLOB NOT NULL,
    exact BLOB NOT NULL UNIQUE,
    prompt TEXT NOT NULL,
    answer TEXT NOT NULL,
    info TEXT NOT NULL,
    vector BLOB,
    created REAL NOT NULL,
    expires REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS entries_by_partition ON entries (partition, id);
CREATE INDEX IF NOT EXISTS entries_by_expiry ON entries (expires);
"""
GET = "SELECT answer, info FROM entries WHERE exact = ? AND expires > ?"
AFTER = """SELECT id, expires, vector FROM entries
    WHERE partition = ? AND id > ? AND expires > ? AND length(vector) = ? ORDER BY id LIMIT ?"""
PUT = """INSERT OR REPLACE INTO entries (partition, exact, prompt, answer, info, vector, created, expires)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""
PURGE = "DELETE FROM entries WHERE id IN (SELECT id FROM entries WHERE expires <= ? LIMIT ?)"


class Entry(NamedTuple):
    """One answer to store. `info` is a JSON object; times are seconds since 1970; no vector: found exactly only."""

    partition: bytes
    exact: bytes
    prompt: str
    answer: str
    info: str
    vector: Vector | None
    created: float
    expires: float


class Found(NamedTuple):
    """A stored answer and what was stored with it (a JSON object)."""

    answer: str
    info: str


class Candidate(NamedTuple):
    """A stored answer whose prompt may mean the same."""

    id: int
    vector: Vector
    found: Found


class Vectors(NamedTuple):
    """Vectors to index: ids [n], times of expiry [n], vectors [n, dimensions]."""

    ids: npt.NDArray[np.uint64]
    expiries: list[float]
    matrix: Vector


class Store:
    """Entries in `path`, created with its folder if need be; an entry is durable once put() has returned.

    Ids grow in the order of commits, over all processes that share the file, so whoever remembers the last id seen
    finds what is new. Thread-safe: each thread has a connection of its own. Methods raise sqlite3.Error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            self._prepare()

    def get(self, exact: bytes, now: float) -> Found | None:
        """Return the answer stored under an exact key, unless it has expired."""
        row = self._connection.execute(GET, (exact, now)).fetchone()
        return Found(*row) if row else None

    def candidates(self, ids: Sequence[int], now: float) -> list[Candidate]:
        """Return those of the entries that still exist and have not expired."""
        marks = ",".join("?" * len(ids))
        query = f"SELECT id, vector, answer, info FROM entries WHERE id IN ({marks}) AND expires > ?"
        rows = self._connection.execute(query, (*ids, now))
        return [Candidate(id_, np.frombuffer(blob, np.float32), Found(*found)) for id_, blob, *found in rows]

    def after(self, partition: bytes, last_id: int, now: float, dimensions: int, limit: int) -> Vectors:
        """Return the first `limit` live vectors of a partition with an id above `last_id`."""
        size = dimensions * np.dtype(np.float32).itemsize
        rows = self._connection.execute(AFTER, (partition, last_id, now, size, limit)).fetchall()
        matrix = np.frombuffer(b"".join(row[2] for row in rows), np.float32).reshape(-1, dimensions)
        return Vectors(np.array([row[0] for row in rows], np.uint64), [row[1] for row in rows], matrix)

    def put(self, entries: Iterable[Entry]) -> None:
        """Store all entries, or none, durably; one with the exact key of another replaces it under a new id."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        with connection:
            connection.executemany(PUT, [_row(entry) for entry in entries])

    def purge(self, now: float) -> None:
        """Delete what has expired."""
        while self._connection.execute(PURGE, (now, PURGE_ROWS)).rowcount:
            pass

    def count(self) -> int:
        """Return how many entries there are, expired ones that are not yet purged included."""
        return int(self._connection.execute("SELECT count(*) FROM entries").fetchone()[0])

    def close(self) -> None:
        """Close the connections of all threads; nobody may use the store any more."""
        for connection in self._connections:
            connection.close()

    def _prepare(self) -> None:
        """Create what is missing. Raises ValueError for a file that another release made."""
        self._path.touch(mode=0o600)  # prompts and answers are private; SQLite gives its other files the same mode
        connection = self._connection
        connection.execute("PRAGMA journal_mode = WAL")  # a property of the file
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise ValueError(f"{self._path} has schema version {version}, not {SCHEMA_VERSION}: name another file")

    @property
    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
        return connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous = FULL")
        self._connections.append(connection)
        return connection


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from opening a store in `folder`: SQLite cannot wait for its turn to switch WAL on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _row(entry: Entry) -> tuple[object, ...]:
    blob = None if entry.vector is None else entry.vector.astype(np.float32, copy=False).tobytes()
    return (*entry[:5], blob, entry.created, entry.expires)
