"""Memory for blocks of keys and values, allocated once: an fp32 block takes a page, an int8 block a quarter of one."""

import mmap
from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np

from speculative_decoding.kv_layout import (
    FLOAT_BYTES,
    BlockLayout,
    Codes,
    Scales,
    SlotMemory,
    Values,
    dequantize,
    quantize,
)

QUARTERS = 4  # int8 blocks in a page
# Where the first page begins. Slots begin at, or shortly after, a multiple of 4 KiB: were pages to do so too, a
# processor that compares the last 12 bits of addresses would take reads for reads of what it has just written, and copy
# at half the speed (measured).
OFFSET = 2048


class Place(NamedTuple):
    """Where a block is in its pool: the number of its page or, of an int8 block, of its quarter of a page."""

    number: int
    int8: bool


class BlockPool:
    """Pages over one mapping of memory, which takes physical memory only where it has been written. Not thread-safe."""

    def __init__(self, layout: BlockLayout, pages: int, int8: bool, memory: mmap.mmap) -> None:
        """Lay `pages` pages over `memory`, which must have pool_bytes(layout, pages, int8) bytes."""
        self.pages = pages
        self._memory = memory
        self._block_bytes = layout.bytes
        self._page_bytes = page_bytes(layout, int8)
        rows = np.frombuffer(memory, np.float32, pages * layout.floats, OFFSET).reshape(pages, layout.floats)
        codes = rows.view(np.int8).reshape(pages * QUARTERS, layout.floats)
        scales = np.zeros((0, layout.scales), np.float32)
        if int8:
            scales = np.frombuffer(memory, np.float32, offset=OFFSET + pages * layout.bytes).reshape(-1, layout.scales)
        self._rows, self._code_rows, self._scale_rows = rows, codes, scales
        self._values = cast(list[Values], layout.split_values(rows))
        self._codes = cast(list[Codes], layout.split_values(codes))
        self._scales = cast(list[Scales], layout.split_scales(scales))
        self._free = list(reversed(range(pages)))  # the lowest first: memory never used is touched last
        self._quarters: dict[int, int] = {}  # pages that hold int8 blocks, and which of their quarters, as bits
        self._gaps: set[int] = set()  # those of them that have a free quarter

    @property
    def bytes_used(self) -> int:
        """Bytes of the pages that hold a block, or a quarter of one at least."""
        return OFFSET + (self.pages - len(self._free)) * self._page_bytes

    def take(self, int8: bool) -> Place | None:
        """Return room for a block, None when there is none."""
        if not int8:
            return Place(self._free.pop(), False) if self._free else None
        if not self._gaps:
            if not self._free:
                return None
            page = self._free.pop()
            self._quarters[page] = 0
            self._gaps.add(page)
        page = next(iter(self._gaps))
        used = self._quarters[page]
        quarter = next(number for number in range(QUARTERS) if not used >> number & 1)
        self._quarters[page] = used | 1 << quarter
        if self._quarters[page] == (1 << QUARTERS) - 1:
            self._gaps.remove(page)
        return Place(page * QUARTERS + quarter, True)

    def give(self, place: Place) -> None:
        """Take back the room of a block."""
        if not place.int8:
            self._free.append(place.number)
            return
        page, quarter = divmod(place.number, QUARTERS)
        self._quarters[page] &= ~(1 << quarter)
        self._gaps.add(page)
        if not self._quarters[page]:
            del self._quarters[page]
            self._gaps.remove(page)
            self._free.append(page)

    def compact(self, movable: Callable[[Place], bool]) -> list[tuple[Place, Place]]:
        """Empty one page by moving its int8 blocks to the gaps of others; return the moves (from, to), in order.

        The caller must tell the blocks' owners. No moves: there are not enough gaps, or what is in the way stays.
        """
        room = sum(QUARTERS - self._quarters[page].bit_count() for page in self._gaps)
        if room < QUARTERS:
            return []
        for page in sorted(self._gaps, key=lambda page: self._quarters[page].bit_count()):
            if all(movable(place) for place in self._blocks_of(page)):
                return self._empty(page)
        return []

    def taken(self) -> set[Place]:
        """Return the places that are in use."""
        int8 = {place for page in self._quarters for place in self._blocks_of(page)}
        return int8 | {Place(page, False) for page in set(range(self.pages)) - set(self._free) - self._quarters.keys()}

    def write(self, place: Place, model: int, slot: SlotMemory, begin: int) -> None:
        """Copy a block of one model, 0 for the target and 1 for the draft, out of a slot's tokens from `begin` on."""
        values = slot[:, :, begin : begin + self._values[model].shape[3]]
        if place.int8:
            quantize(values, self._codes[model][place.number], self._scales[model][place.number])
        else:
            self._values[model][place.number] = values

    def read(self, place: Place, model: int, slot: SlotMemory, begin: int) -> None:
        """Copy a block of one model into a slot's tokens from `begin` on."""
        values = slot[:, :, begin : begin + self._values[model].shape[3]]
        if place.int8:
            dequantize(self._codes[model][place.number], self._scales[model][place.number], values)
        else:
            values[...] = self._values[model][place.number]

    def quarter(self, page: Place) -> Place:
        """Make a page that holds an fp32 block one of quarters, and return the first, for the block itself."""
        self._quarters[page.number] = 1
        self._gaps.add(page.number)
        return Place(page.number * QUARTERS, True)

    def quantize(self, source: Place, target: Place, models: int) -> None:
        """Write the int8 form of a block's first `models` models to another place, or to the first quarter of its page.

        The latter destroys the fp32 form, but only where it has been read: codes are written behind what is read next.
        """
        for model in range(models):
            values = self._values[model][source.number]
            quantize(values, self._codes[model][target.number], self._scales[model][target.number])

    def copy(self, source: Place, other: "BlockPool", target: Place) -> None:
        """Copy a block, as it is, to another pool or another place; both are fp32, or both int8."""
        if source.int8:
            other._code_rows[target.number] = self._code_rows[source.number]
            other._scale_rows[target.number] = self._scale_rows[source.number]
        else:
            other._rows[target.number] = self._rows[source.number]

    def evict_from_memory(self, place: Place) -> None:
        """Have the process give up the physical memory under a block of a mapped file; the file keeps the block."""
        size = self._block_bytes // QUARTERS if place.int8 else self._block_bytes
        begin = (OFFSET + place.number * size) // mmap.PAGESIZE * mmap.PAGESIZE
        end = OFFSET + (place.number + 1) * size
        self._memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _blocks_of(self, page: int) -> list[Place]:
        used = self._quarters[page]
        return [Place(page * QUARTERS + number, True) for number in range(QUARTERS) if used >> number & 1]

    def _empty(self, page: int) -> list[tuple[Place, Place]]:
        self._gaps.remove(page)  # so that nothing is moved to it
        moves = []
        for source in self._blocks_of(page):
            target = self.take(int8=True)
            assert target is not None
            self.copy(source, self, target)
            self.give(source)
            self._gaps.discard(page)
            moves.append((source, target))
        return moves


def page_bytes(layout: BlockLayout, int8: bool) -> int:
    """Return what a page takes: an fp32 block and, with int8, the scales of the four blocks it may hold instead."""
    return layout.bytes + int8 * QUARTERS * layout.scales * FLOAT_BYTES


def pool_bytes(layout: BlockLayout, pages: int, int8: bool) -> int:
    """Return the memory that a pool needs."""
    return OFFSET + pages * page_bytes(layout, int8)
