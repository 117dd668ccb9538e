"""The index: near things are found, dead ones are not, and it keeps up with the store."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from semantic_cache.index import Indexes
from semantic_cache.store import Entry, Store

DIMENSIONS = 384
FAR = 1e12


def unit(rows: int, seed: int) -> npt.NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIMENSIONS)).astype(np.float32)
    unit_vectors: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit_vectors


def put(store: Store, vectors: npt.NDArray[np.float32], partition: bytes = b"p", expires: float = FAR) -> None:
    store.put([Entry(partition, vector.tobytes(), "", "a", "{}", vector, 0.0, expires) for vector in vectors])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store.sqlite")


def test_the_nearest_comes_first(store: Store) -> None:
    vectors = unit(1000, seed=0)
    put(store, vectors)
    indexes = Indexes(store)
    asked = vectors + 0.005 * np.random.default_rng(1).standard_normal(vectors.shape).astype(np.float32)
    found = [indexes.nearest(b"p", vector, 5, 0.0)[0] for vector in asked]
    assert np.mean(np.array(found) == np.arange(1, 1001)) >= 0.99


def test_partitions_do_not_see_each_other(store: Store) -> None:
    vectors = unit(20, seed=0)
    put(store, vectors[:10])
    put(store, vectors[10:], partition=b"q")
    indexes = Indexes(store)
    for vector in vectors:
        assert set(indexes.nearest(b"p", vector, 20, 0.0)) == set(range(1, 11))
        assert set(indexes.nearest(b"q", vector, 20, 0.0)) == set(range(11, 21))
        assert indexes.nearest(b"nobody's", vector, 20, 0.0) == []


def test_it_catches_up_with_what_others_store(store: Store) -> None:
    vectors = unit(10_000, seed=0)
    indexes = Indexes(store)
    assert indexes.nearest(b"p", vectors[0], 1, 0.0) == []
    for known in (1, 2, 10_000):  # the last more than one chunk
        put(store, vectors[known - 1 : known])
        if known == 10_000:
            put(store, vectors[2:-1])
        assert indexes.nearest(b"p", vectors[known - 1], 1, 0.0) == [min(known, 3)]
    assert indexes.nearest(b"p", vectors[9_000], 1, 0.0) == [3 + 9_000 - 1]


def test_what_is_removed_is_not_found_again_even_if_it_was_the_last(store: Store) -> None:
    vectors = unit(3, seed=0)
    put(store, vectors)
    indexes = Indexes(store)
    for left in ({1, 2, 3}, {2, 3}, {3}):
        assert set(indexes.nearest(b"p", vectors[0], 5, 0.0)) == left
        indexes.remove(b"p", [min(left), 99])
    assert indexes.nearest(b"p", vectors[0], 5, 0.0) == []
    put(store, unit(1, seed=1))
    assert indexes.nearest(b"p", vectors[0], 5, 0.0) == [4]


def test_what_expired_leaves_the_memory(store: Store) -> None:
    vectors = unit(6, seed=0)
    put(store, vectors[:3], expires=10.0)
    put(store, vectors[3:], expires=20.0)
    indexes = Indexes(store)
    assert len(indexes.nearest(b"p", vectors[0], 9, 0.0)) == 6
    indexes.expire(10.0)
    assert set(indexes.nearest(b"p", vectors[0], 9, 10.0)) == {4, 5, 6}
    indexes.expire(20.0)
    assert indexes.nearest(b"p", vectors[0], 9, 20.0) == []
