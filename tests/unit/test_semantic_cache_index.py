"""The index: near things are found, dead ones are not, and it keeps up with the store."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from semantic_cache.index import CHUNK, KEPT, Indexes
from semantic_cache.partition_index import kept, kept_last_id
from semantic_cache.records import Entry, Key, Vectors
from semantic_cache.store import Loading
from semantic_cache.stores.sqlite import SqliteStore as Store

DIMENSIONS = 384
FAR = 1e12
PYTHON_BACKENDS = Path(__file__).parents[2] / "python_backends"
SERVER = """
import sys, time
from pathlib import Path
import numpy as np
from semantic_cache.records import Entry, Key, Selector
from semantic_cache.stores.sqlite import SqliteStore
store, vectors, before = SqliteStore(Path(sys.argv[1])), np.load(sys.argv[2]), int(sys.argv[3])
def entry(number, vector, answer):
    tags = ("gone",) if number % 10 == 0 else ()
    return Entry(Key(b"p", b"%d" % number), b"t", "m", "", answer, "{}", vector, tags, 1, 0.0, 1e12)
store.put([entry(number, vectors[number], "old") for number in range(before)])
store.warm()
for number in range(before, len(vectors) - 1):
    store.put([entry(number, vectors[number], "new")])
store.put([entry(7, vectors[-1], "replaced")])
store.invalidate(Selector(tag="gone"))
print("done", flush=True)
time.sleep(60)
"""


def unit(rows: int, seed: int) -> npt.NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIMENSIONS)).astype(np.float32)
    unit_vectors: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit_vectors


def put(store: Store, vectors: npt.NDArray[np.float32], partition: bytes = b"p", expires: float = FAR) -> None:
    store.put(
        [
            Entry(Key(partition, vector.tobytes()), b"t", "m", "", "a", "{}", vector, (), 1, 0.0, expires)
            for vector in vectors
        ]
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store.sqlite")


def test_the_nearest_comes_first(store: Store) -> None:
    vectors = unit(1000, seed=0)
    put(store, vectors)
    indexes = Indexes(store.after)
    asked = vectors + 0.005 * np.random.default_rng(1).standard_normal(vectors.shape).astype(np.float32)
    found = [indexes.nearest(b"p", vector, 5, 0.0)[0] for vector in asked]
    assert np.mean(np.array(found) == np.arange(1, 1001)) >= 0.99


def test_partitions_do_not_see_each_other(store: Store) -> None:
    vectors = unit(20, seed=0)
    put(store, vectors[:10])
    put(store, vectors[10:], partition=b"q")
    indexes = Indexes(store.after)
    for vector in vectors:
        assert set(indexes.nearest(b"p", vector, 20, 0.0)) == set(range(1, 11))
        assert set(indexes.nearest(b"q", vector, 20, 0.0)) == set(range(11, 21))
        assert indexes.nearest(b"nobody's", vector, 20, 0.0) == []


def test_it_catches_up_with_what_others_store(store: Store) -> None:
    vectors = unit(100, seed=0)
    indexes = Indexes(store.after)
    assert indexes.nearest(b"p", vectors[0], 1, 0.0) == []
    for known in (1, 2, 100):
        put(store, vectors[known - 1 : known])
        if known == 100:
            put(store, vectors[2:-1])
        assert indexes.nearest(b"p", vectors[known - 1], 1, 0.0) == [min(known, 3)]


def test_a_search_does_not_wait_for_a_large_partition(store: Store) -> None:
    vectors = unit(CHUNK + 1000, seed=0)
    put(store, vectors)
    indexes = Indexes(store.after)
    with pytest.raises(Loading):
        indexes.nearest(b"p", vectors[0], 1, 0.0)
    indexes.load(b"p", DIMENSIONS, 0.0)
    assert indexes.nearest(b"p", vectors[CHUNK + 500], 1, 0.0) == [CHUNK + 501]


def test_what_expired_leaves_the_memory(store: Store) -> None:
    vectors = unit(6, seed=0)
    put(store, vectors[:3], expires=10.0)
    put(store, vectors[3:], expires=200.0)
    indexes = Indexes(store.after)
    assert len(indexes.nearest(b"p", vectors[0], 9, 0.0)) == 6
    assert set(indexes.nearest(b"p", vectors[0], 9, 100.0)) == {4, 5, 6}
    assert indexes.nearest(b"p", vectors[0], 9, 300.0) == []
    assert not indexes.holds(b"p")


def test_a_large_partition_is_kept_over_a_restart_and_caught_up(store: Store, tmp_path: Path) -> None:
    vectors = unit(CHUNK + 200, seed=0)
    put(store, vectors[:-100])
    Indexes(store.after, tmp_path).load(b"p", DIMENSIONS, 0.0)
    put(store, vectors[-100:])
    asked: list[int] = []

    def feed(partition: bytes, last_id: int, now: float, dimensions: int, limit: int) -> Vectors:
        asked.append(last_id)
        return store.after(partition, last_id, now, dimensions, limit)

    indexes = Indexes(feed, tmp_path)
    indexes.load(b"p", DIMENSIONS, 0.0)
    assert min(asked) == CHUNK + 100
    for number in (5, CHUNK + 150):
        assert indexes.nearest(b"p", vectors[number], 1, 0.0) == [number + 1]


def test_a_kept_index_that_is_broken_is_made_anew(store: Store, tmp_path: Path) -> None:
    vectors = unit(KEPT, seed=0)
    put(store, vectors)
    Indexes(store.after, tmp_path).load(b"p", DIMENSIONS, 0.0)
    [file] = kept(tmp_path)
    file.write_bytes(b"broken")
    indexes = Indexes(store.after, tmp_path)
    indexes.load(b"p", DIMENSIONS, 0.0)
    assert indexes.nearest(b"p", vectors[7], 1, 0.0) == [8]


def test_an_index_that_is_ahead_of_a_store_restored_from_a_copy_is_made_anew(tmp_path: Path) -> None:
    vectors = unit(CHUNK + 300, seed=0)
    path, copy = tmp_path / "store.sqlite", tmp_path / "copy"
    store = Store(path)
    put(store, vectors[:CHUNK])
    with sqlite3.connect(path) as connection:
        connection.execute("VACUUM INTO ?", (str(copy),))
    put(store, vectors[CHUNK : CHUNK + 100])
    store.warm()
    store.close()
    copy.replace(path)
    for name in ("store.sqlite-wal", "store.sqlite-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    restored = Store(path)
    put(restored, vectors[CHUNK + 100 :])  # under the ids that the index has for others
    restored.warm()
    for number in (5, CHUNK + 150, CHUNK + 299):
        found = restored.nearest(b"p", vectors[number], 1, 0.0)
        assert [candidate.key.exact for candidate in found] == [vectors[number].tobytes()]
    restored.close()


def test_what_happened_between_keeping_the_index_and_a_kill_is_seen_after_the_restart(tmp_path: Path) -> None:
    """New, replaced and invalidated entries that the kept index knows nothing of, and a server killed outright."""
    vectors = unit(KEPT + 200, seed=0)
    before, path, data = KEPT + 50, tmp_path / "store.sqlite", tmp_path / "vectors.npy"
    np.save(data, vectors)
    arguments = [sys.executable, "-c", SERVER, str(path), str(data), str(before)]
    server = subprocess.Popen(arguments, cwd=PYTHON_BACKENDS, stdout=subprocess.PIPE, text=True)
    assert server.stdout and server.stdout.readline() == "done\n"
    server.kill()
    server.wait()
    [file] = kept(tmp_path / "store.sqlite.indexes")
    assert kept_last_id(file) == before
    store = Store(path)
    store.warm()
    for number in (7, *range(1000, len(vectors) - 1)):
        found = store.nearest(b"p", vectors[-1] if number == 7 else vectors[number], 1, 0.0)
        answer = "replaced" if number == 7 else "old" if number < before else "new"
        [(key, said)] = [(candidate.key.exact, candidate.found.answer) for candidate in found]
        assert (key == b"%d" % number and said == answer) if number % 10 else int(key) % 10
    store.close()


def test_an_index_is_kept_again_when_it_has_grown_by_a_tenth_and_once_more_at_the_end(tmp_path: Path) -> None:
    vectors = unit(KEPT + 300, seed=0)
    store = Store(tmp_path / "store.sqlite")
    kept_ids = []
    for start, end in ((0, KEPT), (KEPT, KEPT + 100), (KEPT + 100, KEPT + 290), (KEPT + 290, KEPT + 300)):
        put(store, vectors[start:end])
        store.nearest(b"p", vectors[0], 1, 0.0)
        store.keep()
        kept_ids.append([kept_last_id(file) for file in kept(tmp_path / "store.sqlite.indexes")])
    assert kept_ids == [[KEPT], [KEPT], [KEPT + 290], [KEPT + 290]]
    store.close()
    assert [kept_last_id(file) for file in kept(tmp_path / "store.sqlite.indexes")] == [KEPT + 300]


def test_a_kept_index_that_is_mostly_of_the_dead_is_made_anew(store: Store, tmp_path: Path) -> None:
    vectors = unit(2 * KEPT, seed=0)
    put(store, vectors, expires=10.0)
    Indexes(store.after, tmp_path).load(b"p", DIMENSIONS, 0.0)
    for entries, size in ((KEPT * 3 // 2, 2 * KEPT), (KEPT, 0)):
        indexes = Indexes(store.after, tmp_path)
        indexes.load(b"p", DIMENSIONS, 20.0, entries)
        assert indexes._partitions[b"p"].size == size


def test_one_search_finds_the_living_behind_a_thousand_dead(store: Store) -> None:
    near = unit(1, seed=0) + 0.01 * unit(1000, seed=1)
    far = unit(8, seed=2)
    put(store, near.astype(np.float32), expires=10.0)
    put(store, far)
    assert store.nearest(b"p", near[0], 1, 0.0)  # all are in the index
    found = store.nearest(b"p", near[0], 5, 10.0)
    assert len(found) == 5
    assert {candidate.key.exact for candidate in found} <= {vector.tobytes() for vector in far}
