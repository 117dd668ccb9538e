"""Nearest stored prompts by vector: one index per partition, caught up from the store."""

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from semantic_cache.partition_index import GraphIndex, MakeIndex, PartitionIndex, kept, kept_last_id
from semantic_cache.records import Candidate, Vector, Vectors
from semantic_cache.store import Loading

CHUNK = 1024  # vectors read from the store at a time, and the most that a search waits for
EXPIRE_INTERVAL_S = 60.0
WIDER, ROUNDS = 4, 5  # a search that meets the dead looks so much further, so often: thousands are passed in one search
KEPT = 1000  # entries of a partition from which on reading its index beats making it
MOST_DEAD = 1.5  # vectors for each entry that is left, beyond which a kept index is not worth reading
GROWTH = 0.1  # by which it is written anew: what is added after that is caught up from the store

Feed = Callable[[bytes, int, float, int, int], Vectors]
Fetch = Callable[[bytes, Sequence[int], float], dict[int, Candidate]]

logger = logging.getLogger(__name__)


class Indexes:
    """All partitions' indexes, each built from the store when first asked and caught up at every search.

    So entries that another server stored are found as well. A partition that lags by more than a chunk is read on a
    thread of its own: meanwhile its searches raise Loading. `feed` returns the live vectors of (partition, above this
    id, now, dimensions, at most so many). One thread searches; load() and keep() may be called on others.
    """

    def __init__(self, feed: Feed, folder: Path | None = None, make: MakeIndex = GraphIndex) -> None:
        """`folder`: where indexes of large partitions are kept over a restart; the store is still the truth."""
        self._make = make
        self._feed = feed
        self._folder = folder
        self._partitions: dict[bytes, PartitionIndex] = {}
        self._loading: dict[bytes, threading.Event] = {}
        self._lock = threading.Lock()
        self._searching = threading.RLock()  # held while indexes are used: what is being searched is not loaded
        self._next_expiry = 0.0

    def discard_beyond(self, last_id: int) -> None:
        """Delete kept indexes that know ids above the last one that the store has given.

        The store is then an older copy of itself: it will give those ids to other entries, which would not be read.
        """
        for path in kept(self._folder) if self._folder else ():
            if kept_last_id(path) > last_id:
                logger.warning("%s does not belong to this store: it is made anew", path.name)
                path.unlink(missing_ok=True)

    def candidates(self, partition: bytes, vector: Vector, count: int, now: float, fetch: Fetch) -> list[Candidate]:
        """Return the nearest entries as `fetch` reads them; those that it finds dead make room for others."""
        with self._searching:
            for wanted in (count * WIDER**round_ for round_ in range(ROUNDS)):
                ids = self.nearest(partition, vector, wanted, now)
                found = fetch(partition, ids, now) if ids else {}
                if dead := set(ids) - found.keys():
                    self._partitions[partition].remove(dead)
                if not dead or len(found) >= count:
                    break
            return [found[id_] for id_ in ids if id_ in found][:count]

    def nearest(self, partition: bytes, vector: Vector, count: int, now: float) -> list[int]:
        """Return the ids of about the `count` entries of `partition` nearest to `vector`, nearest first.

        Raises Loading, and what `feed` raises.
        """
        with self._searching:
            self._expire(now)
            with self._lock:
                if partition in self._loading:
                    raise Loading
                index = self._partitions.get(partition)
            index = index or self._make(vector.size)
            vectors = self._feed(partition, index.last_id, now, vector.size, CHUNK)
            if vectors.expiries:
                index.add(vectors)
                self._partitions[partition] = index
            if len(vectors.expiries) == CHUNK:
                self._start_loading(partition, vector.size, now)
                raise Loading
            return index.nearest(vector, count)

    def load(self, partition: bytes, dimensions: int, now: float, entries: int | None = None) -> None:
        """Read a whole partition, and return when it is done.

        entries: how many it has; a kept index with many more is mostly of the dead, and is made anew.
        """
        done, is_mine = self._reserve(partition)
        if is_mine:
            self._load(partition, dimensions, now, entries)
        done.wait()

    def keep(self, growth: float = GROWTH) -> None:
        """Write the indexes of large partitions that have grown by this share since they were written."""
        if not self._folder:
            return
        with self._searching:
            grown = [(name, index) for name, index in self._partitions.items() if _is_due(index, growth)]
        for partition, index in grown:
            self.load(partition, index.dimensions, 0.0)

    def holds(self, partition: bytes) -> bool:
        """Whether a partition has been read, or is being read."""
        return partition in self._partitions or partition in self._loading

    def _expire(self, now: float) -> None:
        """Forget what has expired in every partition now and then, and partitions that are left empty."""
        if now < self._next_expiry:
            return
        self._next_expiry = now + EXPIRE_INTERVAL_S
        with self._lock:
            ready = [(name, index) for name, index in self._partitions.items() if name not in self._loading]
        for partition, index in ready:
            index.expire(now)
            if not index.size:
                del self._partitions[partition]

    def _start_loading(self, partition: bytes, dimensions: int, now: float) -> None:
        _, is_mine = self._reserve(partition)
        if is_mine:
            arguments = (partition, dimensions, now, None)
            threading.Thread(target=self._load, args=arguments, name="load", daemon=True).start()

    def _reserve(self, partition: bytes) -> tuple[threading.Event, bool]:
        """Keep searches off a partition; return what is set when it is read, and whether the caller has to read it."""
        with self._searching, self._lock:
            is_mine = partition not in self._loading
            return self._loading.setdefault(partition, threading.Event()), is_mine

    def _restored(self, partition: bytes, dimensions: int, entries: int | None) -> PartitionIndex:
        for path in kept(self._folder, partition.hex()) if self._folder else ():
            index = self._make(dimensions)
            if not index.is_kept:
                return index
            restored = index.restore(path)
            if restored and (entries is None or index.size <= MOST_DEAD * entries):
                return index
            logger.warning("%s is %s: it is made anew", path.name, "mostly of the dead" if restored else "broken")
        return self._make(dimensions)

    def _load(self, partition: bytes, dimensions: int, now: float, entries: int | None) -> None:
        """Read until nothing new is there; nobody else touches an index that is loading."""
        try:
            index = self._partitions.get(partition) or self._restored(partition, dimensions, entries)
            while (vectors := self._feed(partition, index.last_id, now, dimensions, CHUNK)).expiries:
                index.add(vectors)
            self._partitions[partition] = index
            if self._folder and _is_due(index, 0.0):
                index.save(self._folder, partition.hex())
        except Exception:
            logger.exception("a partition could not be read; the next search tries again")
        finally:
            with self._lock:
                self._loading.pop(partition).set()


def _is_due(index: PartitionIndex, growth: float) -> bool:
    return index.is_kept and index.size >= KEPT and index.unsaved > growth * index.size
