"""The vectors of one partition, to be searched by nearness."""

import heapq
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path

from usearch.index import Index

from semantic_cache.records import Vector, Vectors

# A million vectors made from those of real prompts: the nearest is among five found in .996 of searches, 0.9 ms each.
# With 128 candidates for each insertion, a third of the time to build, in .965, and a wider search did not help (512:
# .978 in 1.3 ms); with 16 neighbours and 32 candidates, in .83 of 200,000.
NEIGHBOURS = 48
EXPANSION_ADD = 320
EXPANSION_SEARCH = 256
FIRST = 256  # added by one thread: several that begin an empty graph at once can leave parts of it unreachable
SUFFIX = ".usearch"


class PartitionIndex(ABC):
    """The vectors of one partition: near enough to choose candidates, not to judge them."""

    is_kept = False  # whether it can be written to a file and read again

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self._expiries: list[tuple[float, int]] = []
        self.last_id = 0
        self.unsaved = 0  # vectors added since it was read from a file or written to one

    @property
    @abstractmethod
    def size(self) -> int:
        """How many vectors it holds."""

    @abstractmethod
    def nearest(self, vector: Vector, count: int) -> list[int]:
        """Return the ids of about the `count` nearest vectors, nearest first."""

    @abstractmethod
    def remove(self, ids: Iterable[int]) -> None:
        """Forget these ids; unknown ones are ignored."""

    @abstractmethod
    def _add(self, vectors: Vectors) -> None:
        """Take in vectors."""

    def restore(self, path: Path) -> bool:
        """Take in what save() wrote, and return whether that could be done."""
        return False

    def save(self, folder: Path, name: str) -> None:  # noqa: B027
        """Write an index that is kept, whole or not at all; not its times of expiry: the store knows them."""

    def add(self, vectors: Vectors) -> None:
        """Add vectors whose ids are above `last_id`, in ascending order."""
        self._add(vectors)
        self.last_id = int(vectors.ids[-1])
        self.unsaved += len(vectors.expiries)
        for expiry, id_ in zip(vectors.expiries, vectors.ids.tolist(), strict=True):
            heapq.heappush(self._expiries, (expiry, id_))

    def expire(self, now: float) -> None:
        """Forget what has expired, so that the index does not outgrow the store."""
        expired = []
        while self._expiries and self._expiries[0][0] <= now:
            expired.append(heapq.heappop(self._expiries)[1])
        self.remove(expired)


MakeIndex = Callable[[int], PartitionIndex]  # an empty index of vectors of so many dimensions


class GraphIndex(PartitionIndex):
    """A graph of vectors in int8 (HNSW, usearch), for the CPU. What it finds is approximate."""

    is_kept = True

    def __init__(self, dimensions: int) -> None:
        super().__init__(dimensions)
        self._graph = Index(
            ndim=dimensions,
            metric="cos",
            dtype="i8",
            connectivity=NEIGHBOURS,
            expansion_add=EXPANSION_ADD,
            expansion_search=EXPANSION_SEARCH,
        )

    @property
    def size(self) -> int:
        return len(self._graph)

    def restore(self, path: Path) -> bool:
        try:
            self._graph.load(str(path))
            self.last_id = kept_last_id(path)
        except (OSError, RuntimeError, ValueError):
            return False
        return int(self._graph.ndim) == self.dimensions

    def save(self, folder: Path, name: str) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The last id is part of the file's name, so that no crash can part the two.
        partial, target = folder / f".{name}.{os.getpid()}", folder / f"{name}.{self.last_id}{SUFFIX}"
        self._graph.save(str(partial))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        older = [path for path in kept(folder, name) if path != target]
        partial.replace(target)
        for path in older:
            path.unlink(missing_ok=True)
        self.unsaved = 0

    def nearest(self, vector: Vector, count: int) -> list[int]:
        return [int(key) for key in self._graph.search(vector, count).keys] if self.size else []

    def remove(self, ids: Iterable[int]) -> None:
        for id_ in ids:
            if id_ in self._graph:
                self._graph.remove(id_)

    def _add(self, vectors: Vectors) -> None:
        alone = 0 if self.size else FIRST
        self._graph.add(vectors.ids[:alone], vectors.matrix[:alone], threads=1)
        self._graph.add(vectors.ids[alone:], vectors.matrix[alone:])


def kept(folder: Path, name: str = "*") -> list[Path]:
    """Return the kept indexes of a partition, or of all, the newest first."""
    found = [path for path in folder.glob(f"{name}.*{SUFFIX}") if path.name.split(".")[-2].isdecimal()]
    return sorted(found, key=kept_last_id, reverse=True)


def kept_last_id(path: Path) -> int:
    """Return the last id that a kept index knows."""
    return int(path.name.split(".")[-2])
