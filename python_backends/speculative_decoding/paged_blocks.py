"""Blocks of a paged key/value cache: which are free, and how many sequences and prefixes share the others."""

from collections.abc import Callable, Iterable

SCRATCH = 0  # the block that rows without a sequence write to; it is never given out


class BlockAllocator:
    """Counts references to blocks 1 to `blocks` - 1. Not thread-safe."""

    def __init__(self, blocks: int, make_room: Callable[[], bool]) -> None:
        """`make_room` is asked to let go of a block when none is free; it says whether it could."""
        self._refs = [0] * blocks
        self._refs[SCRATCH] = 1
        self._free = list(reversed(range(SCRATCH + 1, blocks)))
        self._make_room = make_room

    @property
    def free(self) -> int:
        """How many blocks nobody refers to."""
        return len(self._free)

    def take(self) -> int:
        """Return a block that only the caller refers to. Raises MemoryError when all are in use."""
        while not self._free:
            if not self._make_room():
                raise MemoryError(f"all {len(self._refs) - 1} blocks of keys and values are in use")
        block = self._free.pop()
        self._refs[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Refer to blocks once more."""
        for block in blocks:
            assert self._refs[block], "a free block is shared"
            self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Refer to blocks once less; a block that nobody refers to is free."""
        for block in blocks:
            self._refs[block] -= 1
            assert self._refs[block] >= 0, "a block is released twice"
            if not self._refs[block]:
                self._free.append(block)

    def is_shared(self, block: int) -> bool:
        """Return whether others refer to a block too: it must not be written then."""
        return self._refs[block] > 1

    def references(self, block: int) -> int:
        """Return how many refer to a block."""
        return self._refs[block]
