"""One SQLite file, safe to share between servers on one machine."""

import fcntl
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from semantic_cache.index import KEPT, Indexes
from semantic_cache.partition_index import GraphIndex, MakeIndex
from semantic_cache.records import (
    MEMORY,
    Candidate,
    Checks,
    Entry,
    Found,
    Key,
    Observation,
    Selector,
    Usage,
    Vector,
    Vectors,
)
from semantic_cache.stores.selection import conditions
from semantic_cache.stores.translation import translating

SCHEMA_VERSION = 3
BUSY_TIMEOUT_S = 30.0  # for another process that writes: SQLite's lock is not fair, and reads never wait
ROWS = 1000  # deleted per transaction, so that nobody holds writers up for long
SCHEMA = """
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    partition BLOB NOT NULL,
    exact BLOB NOT NULL UNIQUE,
    tenant BLOB NOT NULL,
    model TEXT NOT NULL,
    prompt TEXT NOT NULL,
    answer TEXT NOT NULL,
    info TEXT NOT NULL,
    vector BLOB,
    tags TEXT NOT NULL,
    tokens INTEGER NOT NULL,
    created REAL NOT NULL,
    expires REAL NOT NULL,
    bytes INTEGER NOT NULL,
    hits INTEGER NOT NULL DEFAULT 0,
    used REAL NOT NULL
);
CREATE INDEX entries_by_partition ON entries (partition, id);
CREATE INDEX entries_by_expiry ON entries (expires);
CREATE INDEX entries_by_use ON entries (used);
CREATE INDEX entries_by_tenant ON entries (tenant);
CREATE TABLE tags (tag TEXT NOT NULL, id INTEGER NOT NULL, PRIMARY KEY (tag, id)) WITHOUT ROWID;
CREATE INDEX tags_by_id ON tags (id);
CREATE TABLE observations (
    exact BLOB NOT NULL, similarity REAL NOT NULL, correct INTEGER NOT NULL, made REAL NOT NULL, partition BLOB NOT NULL
);
CREATE INDEX observations_by_entry ON observations (exact);
CREATE TABLE checks (partition BLOB PRIMARY KEY, made REAL NOT NULL, wrong REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE totals (entries INTEGER NOT NULL, bytes INTEGER NOT NULL, secret BLOB NOT NULL);
CREATE TRIGGER entry_added AFTER INSERT ON entries BEGIN
    UPDATE totals SET entries = entries + 1, bytes = bytes + NEW.bytes;
END;
CREATE TRIGGER entry_removed AFTER DELETE ON entries BEGIN
    UPDATE totals SET entries = entries - 1, bytes = bytes - OLD.bytes;
    DELETE FROM tags WHERE id = OLD.id;
    DELETE FROM observations WHERE exact = OLD.exact;
END;
"""
GET = "SELECT answer, info, created FROM entries WHERE exact = ? AND expires > ?"
AFTER = """SELECT id, expires, vector FROM entries
    WHERE partition = ? AND id > ? AND expires > ? AND length(vector) = ? ORDER BY id LIMIT ?"""
PUT = """INSERT INTO entries
    (partition, exact, tenant, model, prompt, answer, info, vector, tags, tokens, created, expires, bytes, used)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
PARTITIONS = "SELECT partition, count(*) FROM entries GROUP BY partition HAVING count(*) > ?"
LAST_SIZE = """SELECT length(vector) FROM entries WHERE partition = ? AND vector IS NOT NULL
    ORDER BY id DESC LIMIT 1"""
CHECK = f"""INSERT INTO checks VALUES (?, 1, ?) ON CONFLICT (partition) DO UPDATE SET
    made = min(1.0, {MEMORY} / (made + 1)) * (made + 1),
    wrong = min(1.0, {MEMORY} / (made + 1)) * (wrong + excluded.wrong)"""
EXPORT = """SELECT partition, exact, tenant, model, prompt, answer, info, vector, tags, tokens, created, expires
    FROM entries WHERE exact > ? ORDER BY exact LIMIT ?"""
ORDER_BY = {"lru": "used", "lfu": "hits, used", "cost": "tokens * (hits + 1.0) / bytes, used"}


class SqliteStore:
    """Entries in `path`, created with its folder if need be; the contract is semantic_cache.store.Store.

    Ids grow in the order of commits, over all processes that share the file, so whoever remembers the last id seen
    finds what is new. Each thread has a connection of its own.
    """

    def __init__(self, path: Path, make_index: MakeIndex = GraphIndex) -> None:
        self._path = path
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._indexes = Indexes(self.after, path.with_name(path.name + ".indexes"), make_index)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            self._prepare()
            self._indexes.discard_beyond(self._last_id())

    @translating(sqlite3.Error)
    def secret(self) -> bytes:
        return bytes(self._connection.execute("SELECT secret FROM totals").fetchone()[0])

    @translating(sqlite3.Error)
    def get(self, key: Key, now: float) -> Found | None:
        row = self._connection.execute(GET, (key.exact, now)).fetchone()
        return Found(*row) if row else None

    @translating(sqlite3.Error)
    def nearest(self, partition: bytes, vector: Vector, count: int, now: float) -> list[Candidate]:
        return self._indexes.candidates(partition, vector, count, now, self._candidates)

    @translating(sqlite3.Error)
    def put(self, entries: Sequence[Entry]) -> None:
        with self._transaction() as connection:
            for entry in entries:
                connection.execute("DELETE FROM entries WHERE exact = ?", (entry.key.exact,))
                id_ = connection.execute(PUT, _row(entry)).lastrowid
                connection.executemany("INSERT OR IGNORE INTO tags VALUES (?, ?)", [(tag, id_) for tag in entry.tags])

    @translating(sqlite3.Error)
    def touch(self, uses: Mapping[Key, int], now: float) -> None:
        rows = [(count, now, key.exact) for key, count in uses.items()]
        with self._transaction() as connection:
            connection.executemany("UPDATE entries SET hits = hits + ?, used = ? WHERE exact = ?", rows)

    @translating(sqlite3.Error)
    def invalidate(self, selector: Selector) -> int:
        where, values = conditions(selector, "?", "id IN (SELECT id FROM tags WHERE tag = ?)")
        return self._delete(f"WHERE {where}", values)

    @translating(sqlite3.Error)
    def purge(self, now: float) -> int:
        return self._delete("WHERE expires <= ?", [now])

    @translating(sqlite3.Error)
    def usage(self) -> Usage:
        return Usage(*self._connection.execute("SELECT entries, bytes FROM totals").fetchone())

    @translating(sqlite3.Error)
    def evict(self, order: str, limit: Usage) -> int:
        evicted = 0
        while True:
            entries, size = self.usage()
            if entries <= limit.entries and size <= limit.bytes:
                return evicted
            share = max(0.0, (entries - limit.entries) / entries, (size - limit.bytes) / size)
            count = min(ROWS, max(1, int(share * entries)))
            evicted += self._delete_some(f"ORDER BY {ORDER_BY[order]} LIMIT ?", [count])

    @translating(sqlite3.Error)
    def observe(self, observations: Iterable[Observation]) -> None:
        rows = [(made.key.exact, made.similarity, made.correct, made.made, made.key.partition) for made in observations]
        with self._transaction() as connection:
            connection.executemany("INSERT INTO observations VALUES (?, ?, ?, ?, ?)", rows)

    @translating(sqlite3.Error)
    def observations(self, key: Key) -> list[Observation]:
        query = "SELECT similarity, correct, made FROM observations WHERE exact = ? ORDER BY rowid"
        return [
            Observation(key, similarity, bool(correct), made)
            for similarity, correct, made in self._connection.execute(query, (key.exact,))
        ]

    @translating(sqlite3.Error)
    def check(self, partition: bytes, correct: bool) -> None:
        with self._transaction() as connection:
            connection.execute(CHECK, (partition, float(not correct)))

    @translating(sqlite3.Error)
    def checks(self) -> dict[bytes, Checks]:
        rows = self._connection.execute("SELECT partition, made, wrong FROM checks").fetchall()
        return {partition: Checks(made, wrong) for partition, made, wrong in rows}

    @translating(sqlite3.Error)
    def export(self, after: bytes, limit: int) -> list[Entry]:
        return [_entry(row) for row in self._connection.execute(EXPORT, (after, limit))]

    @translating(sqlite3.Error)
    def warm(self) -> None:
        for partition, entries in self._connection.execute(PARTITIONS, (KEPT,)).fetchall():
            size = self._connection.execute(LAST_SIZE, (partition,)).fetchone()
            if size:
                self._indexes.load(partition, size[0] // np.dtype(np.float32).itemsize, 0.0, entries)

    def keep(self) -> None:
        self._indexes.keep()

    def close(self) -> None:
        self._indexes.keep(growth=0.0)
        for connection in self._connections:
            connection.close()

    @translating(sqlite3.Error)
    def after(self, partition: bytes, last_id: int, now: float, dimensions: int, limit: int) -> Vectors:
        """Return the first `limit` live vectors of a partition with an id above `last_id`."""
        size = dimensions * np.dtype(np.float32).itemsize
        rows = self._connection.execute(AFTER, (partition, last_id, now, size, limit)).fetchall()
        matrix = np.frombuffer(b"".join(row[2] for row in rows), np.float32).reshape(-1, dimensions)
        return Vectors(np.array([row[0] for row in rows], np.uint64), [row[1] for row in rows], matrix)

    def _candidates(self, partition: bytes, ids: Sequence[int], now: float) -> dict[int, Candidate]:
        marks = ",".join("?" * len(ids))
        query = f"""SELECT id, partition, exact, prompt, vector, answer, info, created
            FROM entries WHERE id IN ({marks}) AND partition = ? AND expires > ?"""
        return {
            id_: Candidate(Key(partition, exact), prompt, np.frombuffer(vector, np.float32), Found(*found))
            for id_, _, exact, prompt, vector, *found in self._connection.execute(query, (*ids, partition, now))
        }

    def _last_id(self) -> int:
        """Return the last id given, whether or not its entry is still there."""
        row = self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchone()
        return row[0] if row else 0

    def _delete(self, where: str, values: Sequence[object]) -> int:
        deleted = 0
        while count := self._delete_some(f"{where} LIMIT ?", [*values, ROWS]):
            deleted += count
        return deleted

    def _delete_some(self, which: str, values: Sequence[object]) -> int:
        with self._transaction() as connection:
            query = f"DELETE FROM entries WHERE id IN (SELECT id FROM entries {which})"
            return connection.execute(query, values).rowcount

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        with connection:
            yield connection

    def _prepare(self) -> None:
        """Create what is missing. Raises ValueError for a file that another release made."""
        self._path.touch(mode=0o600)  # prompts and answers are private; SQLite gives its other files the same mode
        connection = self._connection
        connection.execute("PRAGMA journal_mode = WAL")  # a property of the file
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            with self._transaction():
                for statement in _statements(SCHEMA):
                    connection.execute(statement)
                connection.execute("INSERT INTO totals VALUES (0, 0, ?)", (secrets.token_bytes(32),))
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
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


def _statements(script: str) -> Iterator[str]:
    """Part a script of statements, triggers whole."""
    statement = ""
    for line in script.strip().splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


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
    described = (entry.tenant, entry.model, entry.prompt, entry.answer, entry.info, blob, json.dumps(entry.tags))
    return (*entry.key, *described, entry.tokens, entry.created, entry.expires, entry.bytes, entry.created)


def _entry(row: Sequence[object]) -> Entry:
    partition, exact, tenant, model, prompt, answer, info, blob, tags, *rest = row
    vector = None if blob is None else np.frombuffer(blob, np.float32)  # type: ignore[call-overload]
    tags = tuple(json.loads(str(tags)))
    return Entry(Key(partition, exact), tenant, model, prompt, answer, info, vector, tags, *rest)  # type: ignore[arg-type]
