"""The contract of a store, kept by every store that can be had here."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from semantic_cache.records import MEMORY, Checks, Entry, Found, Key, Observation, Selector, Usage, Vector
from semantic_cache.store import Store
from semantic_cache.stores.sqlite import SqliteStore

from tests.stores import KINDS, StoreMaker

DIMENSIONS = 384
FAR = 1e12
ROOM = 10**9


def unit(rows: int, seed: int = 0) -> Vector:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIMENSIONS)).astype(np.float32)
    unit_vectors: Vector = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit_vectors


VECTORS = unit(3000)


def entry(number: int, partition: bytes = b"p", expires: float = FAR, **changes: object) -> Entry:
    key = Key(partition.ljust(32, b"."), b"%s %d" % (partition, number))
    made = Entry(
        key, b"tenant", "m:1", f"prompt {number}", f"answer {number}", "{}", VECTORS[number], (), 10, 0.0, expires
    )
    return made._replace(**changes)  # type: ignore[arg-type]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Opens the same store again and again, as servers would."""
    with StoreMaker(str(request.param), tmp_path) as maker:
        yield maker.open


@pytest.fixture
def store(make: Callable[[], Store]) -> Store:
    return make()


def nearest(store: Store, number: int, partition: bytes = b"p", count: int = 5, now: float = 0.0) -> list[bytes]:
    found = store.nearest(partition.ljust(32, b"."), VECTORS[number], count, now)
    return [candidate.key.exact for candidate in found]


def test_what_is_put_is_found_by_key_and_by_vector(store: Store) -> None:
    store.put([entry(number, info='{"a": 1}', created=5.0) for number in range(20)])
    assert store.get(entry(3).key, 0.0) == Found("answer 3", '{"a": 1}', 5.0)
    assert store.get(entry(30).key, 0.0) is None
    [candidate] = store.nearest(entry(3).key.partition, VECTORS[3], 1, 0.0)
    assert (candidate.key, candidate.prompt, candidate.found.answer) == (entry(3).key, "prompt 3", "answer 3")
    np.testing.assert_array_equal(candidate.vector, VECTORS[3])  # fp32, to the bit


def test_partitions_are_walls(store: Store) -> None:
    store.put([entry(number) for number in range(10)] + [entry(number, b"q") for number in range(10, 20)])
    for number in range(20):
        assert {exact[:1] for exact in nearest(store, number, b"p", 20)} == {b"p"}
        assert {exact[:1] for exact in nearest(store, number, b"q", 20)} == {b"q"}
        assert nearest(store, number, b"nobody's") == []


def test_an_entry_without_a_vector_is_found_by_its_key_only(store: Store) -> None:
    store.put([entry(1, vector=None), entry(2)])
    assert store.get(entry(1).key, 0.0)
    assert nearest(store, 1) == [entry(2).key.exact]


def test_an_entry_replaces_the_one_with_its_key(store: Store) -> None:
    store.put([entry(1), entry(2)])
    store.put([entry(1, answer="new", vector=VECTORS[9], tags=("t",))])
    found = store.get(entry(1).key, 0.0)
    assert found and found.answer == "new"
    assert nearest(store, 9, count=1) == [entry(1).key.exact]
    assert sorted(nearest(store, 1)) == sorted([entry(1).key.exact, entry(2).key.exact])
    assert store.usage().entries == 2


def test_what_expired_is_never_found_and_goes_with_a_purge(store: Store) -> None:
    store.put([entry(number, expires=10.0) for number in range(8)] + [entry(8)])
    assert store.get(entry(1).key, 9.9) and store.get(entry(1).key, 10.0) is None
    assert nearest(store, 1, now=9.9)[0] == entry(1).key.exact
    assert nearest(store, 1, now=10.0) == [entry(8).key.exact]  # the dead do not hide the living
    assert store.purge(9.9) == 0
    assert store.purge(10.0) == 8
    assert store.usage().entries == 1


@pytest.mark.parametrize(
    ("selector", "left"),
    [
        (Selector(exact=b"p 1"), {0, 2, 3}),
        (Selector(tag="red"), {1, 3}),
        (Selector(tenant=b"other"), {0, 1, 2}),
        (Selector(model="m:2"), {0, 1, 3}),
        (Selector(tag="red", model="m:2"), {0, 1, 3}),
        (Selector(tag="nobody's"), {0, 1, 2, 3}),
    ],
)
def test_invalidation_takes_what_matches_everywhere_at_once(
    make: Callable[[], Store], selector: Selector, left: set[int]
) -> None:
    here, there = make(), make()
    here.put(
        [
            entry(0, tags=("red", "blue")),
            entry(1, tags=("blue",)),
            entry(2, tags=("red",), model="m:2"),
            entry(3, tenant=b"other"),
        ]
    )
    assert len(nearest(there, 0)) == 4  # it has indexed what is about to go
    assert here.invalidate(selector) == 4 - len(left)
    for store in (here, there):
        assert {number for number in range(4) if store.get(entry(number).key, 0.0)} == left
        assert set(nearest(store, 0)) == {entry(number).key.exact for number in left}


def test_an_empty_selector_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="give a key, a tag, a tenant or a model"):
        store.invalidate(Selector())


def test_usage_counts_entries_and_bytes(store: Store) -> None:
    assert store.usage() == Usage(0, 0)
    entries = [entry(1), entry(2, answer="x" * 5000)]
    store.put(entries)
    store.put(entries)
    assert store.usage() == Usage(2, sum(made.bytes for made in entries))
    store.invalidate(Selector(tenant=b"tenant"))
    assert store.usage() == Usage(0, 0)


@pytest.mark.parametrize(
    ("order", "left"),
    [("lru", {0, 3}), ("lfu", {1, 3}), ("cost", {2, 3})],
)
def test_eviction_follows_its_order(store: Store, order: str, left: set[int]) -> None:
    store.put([entry(0), entry(1), entry(2, tokens=1000), entry(3, tokens=100)])
    for number, hits, when in ((1, 3, 1.0), (2, 1, 2.0), (0, 1, 3.0), (3, 9, 4.0)):
        store.touch({entry(number).key: hits, Key(b"no", b"one"): 1}, when)
    assert store.evict(order, Usage(4, ROOM)) == 0
    assert store.evict(order, Usage(2, ROOM)) == 2
    assert {number for number in range(4) if store.get(entry(number).key, 0.0)} == left


def test_eviction_makes_room_in_bytes(store: Store) -> None:
    store.put([entry(number, created=float(number), answer="x" * 1000) for number in range(10)])
    limit = Usage(ROOM, 4 * entry(0, answer="x" * 1000).bytes)
    assert store.evict("lru", limit) == 6
    assert store.usage().bytes <= limit.bytes
    assert store.get(entry(9).key, 0.0) and not store.get(entry(0).key, 0.0)


def test_observations_live_as_long_as_their_entry(make: Callable[[], Store]) -> None:
    store = make()
    store.put([entry(1), entry(2)])
    seen = [Observation(entry(1).key, 0.9, True, 1.0), Observation(entry(1).key, 0.8, False, 2.0)]
    store.observe(seen)
    store.observe([Observation(entry(7).key, 0.9, True, 1.0)])  # of nothing
    assert make().observations(entry(1).key) == seen
    assert store.observations(entry(2).key) == []
    store.put([entry(1)])
    assert store.observations(entry(1).key) == []


def test_checks_of_a_partition_are_counted_for_all_servers_and_fade(make: Callable[[], Store]) -> None:
    here, there = make(), make()
    assert here.checks() == {}
    expected = Checks(0.0, 0.0)
    for number in range(int(MEMORY) + 20):
        correct = number % 3 > 0
        (here, there)[number % 2].check(b"p" * 32, correct)
        expected = expected.plus(correct)
    here.check(b"q" * 32, True)
    for store in (here, there, make()):
        counted = store.checks()
        assert counted[b"p" * 32] == pytest.approx(expected)
        assert counted[b"q" * 32] == Checks(1.0, 0.0)


def test_export_returns_everything_once_in_pages(store: Store) -> None:
    entries = [entry(number, tags=("a", "b"), vector=None if number == 3 else VECTORS[number]) for number in range(7)]
    store.put(entries)
    found: list[Entry] = []
    while page := store.export(found[-1].key.exact if found else b"", 3):
        assert len(page) <= 3
        found += page
    assert [made._replace(vector=None) for made in found] == [made._replace(vector=None) for made in entries]
    assert found[3].vector is None
    np.testing.assert_array_equal(found[4].vector, entries[4].vector)


def test_the_secret_is_made_once_and_shared(make: Callable[[], Store]) -> None:
    secrets = {make().secret() for _ in range(3)}
    assert len(secrets) == 1 and len(secrets.pop()) == 32


def test_another_server_sees_entries_and_invalidations_at_once(make: Callable[[], Store]) -> None:
    here, there = make(), make()
    for number in range(5):
        here.put([entry(number)])
        assert there.get(entry(number).key, 0.0)
        assert nearest(there, number, count=1) == [entry(number).key.exact]
    there.invalidate(Selector(exact=entry(2).key.exact))
    assert here.get(entry(2).key, 0.0) is None
    assert entry(2).key.exact not in nearest(here, 2)


def test_a_large_partition_is_read_before_it_is_searched(make: Callable[[], Store]) -> None:
    writer = make()
    for at in range(0, 3000, 500):
        writer.put([entry(number) for number in range(at, at + 500)])
    store = make()
    store.warm()
    asked = range(0, 3000, 29)
    hits = [nearest(store, number, count=1) == [entry(number).key.exact] for number in asked]
    assert np.mean(hits) >= 0.99
    writer.put([entry(1, b"p", answer="new")])
    assert store.nearest(entry(1).key.partition, VECTORS[1], 1, 0.0)[0].found.answer == "new"


def test_threads_read_while_others_write(store: Store) -> None:
    store.put([entry(0)])
    missed: list[bool] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            missed.append(store.get(entry(0).key, 0.0) is None)

    def write(start: int) -> None:
        for number in range(start, start + 20):
            store.put([entry(number)])

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write, args=[start]) for start in (100, 200)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert missed and not any(missed)
    assert store.usage().entries == 41


def test_a_batch_is_stored_whole_or_not_at_all(store: Store) -> None:
    with pytest.raises(Exception):  # noqa: B017 - each database says it its own way
        store.put([entry(1), entry(2, answer=None)])
    assert store.usage().entries == 0


def test_sqlite_ids_never_return(tmp_path: Path) -> None:
    """An index that remembers the last id it has seen must not miss what comes after an entry was deleted."""
    store = SqliteStore(tmp_path / "store.sqlite")
    store.put([entry(1), entry(2)])
    assert nearest(store, 2, count=1) == [entry(2).key.exact]
    store.invalidate(Selector(exact=entry(2).key.exact))
    store.put([entry(3)])
    assert nearest(store, 3, count=1) == [entry(3).key.exact]
