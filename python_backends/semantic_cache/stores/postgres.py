"""PostgreSQL with pgvector, shared by many servers."""

import hashlib
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psycopg

from semantic_cache.index import Indexes
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

SMALL = 1000  # entries of a partition that the database searches itself, exactly
SAMPLE = 2 * SMALL
WRITERS = 0x5E3A_0001  # advisory lock of those who add entries: ids then grow in the order of commits
SCHEMA_VERSION = 2
CONNECTION = {
    "connect_timeout": 2,
    "tcp_user_timeout": 2000,
    "options": "-c statement_timeout=30000 -c search_path=semantic_cache,public -c synchronous_commit=on",
    "application_name": "semantic_cache",
}
SCHEMA = """
CREATE SCHEMA IF NOT EXISTS semantic_cache;
CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA public;
CREATE TABLE IF NOT EXISTS entries (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    partition BYTEA NOT NULL,
    exact BYTEA NOT NULL UNIQUE,
    tenant BYTEA NOT NULL,
    model TEXT NOT NULL,
    prompt TEXT NOT NULL,
    answer TEXT NOT NULL,
    info TEXT NOT NULL,
    embedding vector,
    tags TEXT[] NOT NULL,
    tokens INTEGER NOT NULL,
    created DOUBLE PRECISION NOT NULL,
    expires DOUBLE PRECISION NOT NULL,
    bytes INTEGER NOT NULL,
    hits INTEGER NOT NULL DEFAULT 0,
    used DOUBLE PRECISION NOT NULL
);
CREATE INDEX IF NOT EXISTS entries_by_partition ON entries (partition, id);
CREATE INDEX IF NOT EXISTS entries_by_expiry ON entries (expires);
CREATE INDEX IF NOT EXISTS entries_by_use ON entries (used);
CREATE INDEX IF NOT EXISTS entries_by_tenant ON entries (tenant);
CREATE INDEX IF NOT EXISTS entries_by_tag ON entries USING gin (tags);
CREATE TABLE IF NOT EXISTS observations (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    exact BYTEA NOT NULL REFERENCES entries (exact) ON DELETE CASCADE,
    similarity DOUBLE PRECISION NOT NULL,
    correct BOOLEAN NOT NULL,
    made DOUBLE PRECISION NOT NULL
);
CREATE INDEX IF NOT EXISTS observations_by_entry ON observations (exact);
CREATE TABLE IF NOT EXISTS checks (
    partition BYTEA PRIMARY KEY, made DOUBLE PRECISION NOT NULL, wrong DOUBLE PRECISION NOT NULL
);
CREATE TABLE IF NOT EXISTS settings (one BOOLEAN PRIMARY KEY DEFAULT true CHECK (one), version INTEGER, secret BYTEA);
"""
GET = "SELECT answer, info, created FROM entries WHERE exact = %s AND expires > %s"
FIELDS = "id, partition, exact, prompt, vector_send(embedding), answer, info, created"
BY_ID = f"SELECT {FIELDS} FROM entries WHERE id = ANY(%s) AND partition = %s AND expires > %s"
EXACT_SEARCH = f"""SELECT {FIELDS} FROM entries WHERE partition = %s AND expires > %s AND embedding IS NOT NULL
    ORDER BY embedding <=> %s::vector LIMIT %s"""
COUNT = "SELECT count(*) FROM (SELECT FROM entries WHERE partition = %s LIMIT %s) AS counted"
AFTER = """SELECT id, expires, vector_send(embedding) FROM entries
    WHERE partition = %s AND id > %s AND expires > %s AND vector_dims(embedding) = %s ORDER BY id LIMIT %s"""
PUT = """INSERT INTO entries
    (partition, exact, tenant, model, prompt, answer, info, embedding, tags, tokens, created, expires, bytes, used)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s::vector, %s, %s, %s, %s, %s, %s)"""
EXPORT = """SELECT partition, exact, tenant, model, prompt, answer, info, vector_send(embedding), tags, tokens, created,
    expires FROM entries WHERE exact > %s ORDER BY exact LIMIT %s"""
OBSERVE = """INSERT INTO observations (exact, similarity, correct, made)
    SELECT %s, %s, %s, %s WHERE EXISTS (SELECT FROM entries WHERE exact = %s)"""
CHECK = f"""INSERT INTO checks VALUES (%s, 1, %s) ON CONFLICT (partition) DO UPDATE SET
    made = least(1.0, {MEMORY} / (checks.made + 1)) * (checks.made + 1),
    wrong = least(1.0, {MEMORY} / (checks.made + 1)) * (checks.wrong + excluded.wrong)"""
PARTITIONS = "SELECT partition, count(*) FROM entries GROUP BY partition HAVING count(*) > %s"
LAST_DIMENSIONS = """SELECT vector_dims(embedding) FROM entries WHERE partition = %s AND embedding IS NOT NULL
    ORDER BY id DESC LIMIT 1"""
LAST_ID = "SELECT last_value FROM entries_id_seq"
ORDER_BY = {"lru": "used", "lfu": "hits, used", "cost": "tokens * (hits + 1.0) / bytes, used"}
EVICT = """WITH gone AS (DELETE FROM entries WHERE id IN (SELECT id FROM entries ORDER BY {} LIMIT %s) RETURNING bytes)
    SELECT count(*), coalesce(sum(bytes), 0) FROM gone"""
HEADER_BYTES = 4  # of pgvector's binary form: dimensions and a reserved field, 2 bytes each


class PostgresStore:
    """Entries in the schema `semantic_cache` of a database; the contract is semantic_cache.store.Store.

    The database searches small partitions itself, exactly, so that no filter can starve a search; large ones have an
    index in each server's memory, caught up at every search. Both read the entries that they serve from the table, so
    what is invalidated anywhere is served nowhere. Each thread has a connection of its own.
    """

    def __init__(self, url: str, folder: Path | None = None, make_index: MakeIndex = GraphIndex) -> None:
        """`url`: libpq's connection URL or string; what it leaves out comes from PGPASSWORD, ~/.pgpass and so on.

        folder: where this machine keeps the indexes of large partitions over a restart.
        """
        self._url = url
        self._local = threading.local()
        self._connections: list[psycopg.Connection[Any]] = []
        self._prepare()
        # A database's own folder: another one gives the same ids to other entries.
        own = folder and folder / hashlib.sha256(self.secret()).hexdigest()[:16]
        self._indexes = Indexes(self.after, own, make_index)
        self._indexes.discard_beyond(self._last_id())

    @translating(psycopg.Error)
    def secret(self) -> bytes:
        return bytes(self._one("SELECT secret FROM settings")[0])

    @translating(psycopg.Error)
    def get(self, key: Key, now: float) -> Found | None:
        rows = self._query(GET, (key.exact, now))
        return Found(*rows[0]) if rows else None

    @translating(psycopg.Error)
    def nearest(self, partition: bytes, vector: Vector, count: int, now: float) -> list[Candidate]:
        if not self._indexes.holds(partition) and self._one(COUNT, (partition, SAMPLE))[0] <= SMALL:
            rows = self._query(EXACT_SEARCH, (partition, now, _text(vector), count))
            return [_candidate(row) for row in rows]
        return self._indexes.candidates(partition, vector, count, now, self._candidates)

    @translating(psycopg.Error)
    def put(self, entries: Sequence[Entry]) -> None:
        with self._transaction() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (WRITERS,))
            latest = {entry.key.exact: entry for entry in entries}
            cursor.execute("DELETE FROM entries WHERE exact = ANY(%s)", (list(latest),))
            cursor.executemany(PUT, [_row(entry) for entry in latest.values()])

    @translating(psycopg.Error)
    def touch(self, uses: Mapping[Key, int], now: float) -> None:
        rows = [(count, now, key.exact) for key, count in sorted(uses.items())]  # in one order: no deadlock
        with self._transaction() as cursor:
            cursor.executemany("UPDATE entries SET hits = hits + %s, used = %s WHERE exact = %s", rows)

    @translating(psycopg.Error)
    def invalidate(self, selector: Selector) -> int:
        where, values = conditions(selector, "%s", "tags @> ARRAY[%s]")
        return self._run(f"DELETE FROM entries WHERE {where}", values)

    @translating(psycopg.Error)
    def purge(self, now: float) -> int:
        return self._run("DELETE FROM entries WHERE expires <= %s", (now,))

    @translating(psycopg.Error)
    def usage(self) -> Usage:
        return Usage(*map(int, self._one("SELECT count(*), coalesce(sum(bytes), 0)::bigint FROM entries")))

    @translating(psycopg.Error)
    def evict(self, order: str, limit: Usage) -> int:
        entries, size = self.usage()
        evicted = 0
        while entries > limit.entries or size > limit.bytes:
            share = max(0.0, (entries - limit.entries) / entries, (size - limit.bytes) / size)
            count, freed = self._one(EVICT.format(ORDER_BY[order]), (max(1, int(share * entries)),))
            if not count:
                break
            evicted, entries, size = evicted + count, entries - count, size - int(freed)
        return evicted

    @translating(psycopg.Error)
    def observe(self, observations: Iterable[Observation]) -> None:
        rows = [(made.key.exact, made.similarity, made.correct, made.made, made.key.exact) for made in observations]
        with self._transaction() as cursor:
            cursor.executemany(OBSERVE, rows)

    @translating(psycopg.Error)
    def observations(self, key: Key) -> list[Observation]:
        query = "SELECT similarity, correct, made FROM observations WHERE exact = %s ORDER BY id"
        return [Observation(key, *row) for row in self._query(query, (key.exact,))]

    @translating(psycopg.Error)
    def check(self, partition: bytes, correct: bool) -> None:
        self._run(CHECK, (partition, float(not correct)))

    @translating(psycopg.Error)
    def checks(self) -> dict[bytes, Checks]:
        rows = self._query("SELECT partition, made, wrong FROM checks")
        return {partition: Checks(made, wrong) for partition, made, wrong in rows}

    @translating(psycopg.Error)
    def export(self, after: bytes, limit: int) -> list[Entry]:
        return [_entry(row) for row in self._query(EXPORT, (after, limit))]

    @translating(psycopg.Error)
    def warm(self) -> None:
        for partition, entries in self._query(PARTITIONS, (SMALL,)):
            for [dimensions] in self._query(LAST_DIMENSIONS, (partition,)):
                self._indexes.load(partition, dimensions, 0.0, entries)

    def keep(self) -> None:
        self._indexes.keep()

    def close(self) -> None:
        self._indexes.keep(growth=0.0)
        for connection in self._connections:
            connection.close()

    @translating(psycopg.Error)
    def after(self, partition: bytes, last_id: int, now: float, dimensions: int, limit: int) -> Vectors:
        """Return the first `limit` live vectors of a partition with an id above `last_id`."""
        rows = self._query(AFTER, (partition, last_id, now, dimensions, limit))
        joined = b"".join(row[2][HEADER_BYTES:] for row in rows)
        matrix = np.frombuffer(joined, ">f4").astype(np.float32).reshape(-1, dimensions)
        return Vectors(np.array([row[0] for row in rows], np.uint64), [row[1] for row in rows], matrix)

    def _candidates(self, partition: bytes, ids: Sequence[int], now: float) -> dict[int, Candidate]:
        return {row[0]: _candidate(row) for row in self._query(BY_ID, (list(ids), partition, now))}

    @translating(psycopg.Error)
    def _last_id(self) -> int:
        """Return the last id given, whether or not its entry is still there."""
        return int(self._one(LAST_ID)[0])

    def _one(self, query: str, values: Sequence[object] = ()) -> tuple[Any, ...]:
        return self._query(query, values)[0]

    def _query(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Read; on a connection that broke while nobody used it, as by a restart of the database, once more."""
        connection = self._connection
        try:
            return _fetch(connection, query, values)
        except psycopg.OperationalError:
            if not connection.closed:
                raise
        return _fetch(self._connection, query, values)

    def _run(self, query: str, values: Sequence[object] = ()) -> int:
        with self._connection.cursor() as cursor:
            return cursor.execute(query, values).rowcount

    @contextmanager
    def _transaction(self) -> Iterator[psycopg.Cursor[Any]]:
        connection = self._connection
        with connection.transaction(), connection.cursor() as cursor:
            yield cursor

    @translating(psycopg.Error)
    def _prepare(self) -> None:
        """Create what is missing, one server at a time. Raises ValueError for tables that another release made."""
        with self._transaction() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (WRITERS,))
            cursor.execute(SCHEMA)
            cursor.execute(
                "INSERT INTO settings (version, secret) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                (SCHEMA_VERSION, secrets.token_bytes(32)),
            )
        [version] = self._one("SELECT version FROM settings")
        if version != SCHEMA_VERSION:
            raise ValueError(f"the database's semantic_cache has version {version}, not {SCHEMA_VERSION}: name another")

    @property
    def _connection(self) -> psycopg.Connection[Any]:
        connection: psycopg.Connection[Any] | None = getattr(self._local, "connection", None)
        if connection is None or connection.closed:
            connection = self._local.connection = psycopg.connect(self._url, autocommit=True, **CONNECTION)  # type: ignore[arg-type]
            self._connections = [known for known in self._connections if not known.closed] + [connection]
        return connection


def _fetch(connection: psycopg.Connection[Any], query: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
    with connection.cursor(binary=True) as cursor:
        return cursor.execute(query, values).fetchall()


def _row(entry: Entry) -> tuple[object, ...]:
    described = (entry.tenant, entry.model, entry.prompt, entry.answer, entry.info)
    vector = None if entry.vector is None else _text(entry.vector)
    return (*entry.key, *described, vector, list(entry.tags), entry.tokens, entry.created, entry.expires, entry.bytes,
            entry.created)  # fmt: skip


def _text(vector: Vector) -> str:
    return str(vector.tolist())  # exact: a float32 has a short decimal form as a float64


def _candidate(row: tuple[Any, ...]) -> Candidate:
    _, partition, exact, prompt, vector, answer, info, created = row
    return Candidate(Key(partition, exact), prompt, _vector(vector), Found(answer, info, created))


def _vector(sent: bytes) -> Vector:
    return np.frombuffer(sent, ">f4", offset=HEADER_BYTES).astype(np.float32)


def _entry(row: tuple[Any, ...]) -> Entry:
    partition, exact, tenant, model, prompt, answer, info, vector, tags, *rest = row
    vector = None if vector is None else _vector(vector)
    return Entry(Key(partition, exact), tenant, model, prompt, answer, info, vector, tuple(tags), *rest)
