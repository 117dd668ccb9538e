"""Nearest stored prompts by vector: one approximate index per partition, caught up from the store."""

import heapq
from collections.abc import Iterable

from usearch.index import Index

from semantic_cache.embedder import Vector
from semantic_cache.store import Store, Vectors

CHUNK = 4096  # vectors read from the store at a time
EXPANSION_ADD = 32  # candidates per insertion: builds several times faster than usearch's 128, at equal recall


class PartitionIndex:
    """The vectors of one partition, in int8: near enough to choose candidates, not to judge them."""

    def __init__(self, dimensions: int) -> None:
        self._graph = Index(ndim=dimensions, metric="cos", dtype="i8", expansion_add=EXPANSION_ADD)
        self._expiries: list[tuple[float, int]] = []
        self.last_id = 0

    @property
    def size(self) -> int:
        """How many vectors it holds."""
        return len(self._graph)

    def add(self, vectors: Vectors) -> None:
        """Add vectors whose ids are above `last_id`, in ascending order."""
        self._graph.add(vectors.ids, vectors.matrix)
        self.last_id = int(vectors.ids[-1])
        for expiry, id_ in zip(vectors.expiries, vectors.ids.tolist(), strict=True):
            heapq.heappush(self._expiries, (expiry, id_))

    def nearest(self, vector: Vector, count: int) -> list[int]:
        """Return the ids of about the `count` nearest vectors, nearest first."""
        return [int(key) for key in self._graph.search(vector, count).keys] if self.size else []

    def remove(self, ids: Iterable[int]) -> None:
        """Forget these ids; unknown ones are ignored."""
        for id_ in ids:
            if id_ in self._graph:
                self._graph.remove(id_)

    def expire(self, now: float) -> None:
        """Forget what has expired, so that the index does not outgrow the store."""
        expired = []
        while self._expiries and self._expiries[0][0] <= now:
            expired.append(heapq.heappop(self._expiries)[1])
        self.remove(expired)


class Indexes:
    """All partitions' indexes, each built from the store when first asked and caught up at every search.

    So entries that another server stored are found as well. Not thread-safe. Methods raise sqlite3.Error.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._partitions: dict[bytes, PartitionIndex] = {}

    def nearest(self, partition: bytes, vector: Vector, count: int, now: float) -> list[int]:
        """Return the ids of about the `count` entries of `partition` nearest to `vector`, nearest first."""
        index = self._partitions.get(partition)
        if index is None:
            index = PartitionIndex(vector.size)
        while (vectors := self._store.after(partition, index.last_id, now, vector.size, CHUNK)).expiries:
            index.add(vectors)
            self._partitions[partition] = index
        return index.nearest(vector, count)

    def remove(self, partition: bytes, ids: Iterable[int]) -> None:
        """Forget entries that the store has no longer."""
        self._partitions[partition].remove(ids)

    def expire(self, now: float) -> None:
        """Forget what has expired in every partition, and partitions that are left empty."""
        for partition, index in list(self._partitions.items()):
            index.expire(now)
            if not index.size:
                del self._partitions[partition]
