"""Where the key/value cache's memory comes from, and how much of it there is."""

import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from speculative_decoding.block_pool import OFFSET, QUARTERS, page_bytes
from speculative_decoding.kv_layout import BlockLayout

FREE_SHARE = 0.25  # of the memory that is free at the start: the default budget
BOOKKEEPING_BYTES = 1024  # what Python takes to keep track of a block
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class KVCacheSettings:
    """kv_cache_bytes: memory that blocks, and keeping track of them, may take. int8: store cold blocks in int8.

    tier_bytes: size of the file in `tier_folder` that takes what is pushed out of memory, 0 for none.
    """

    kv_cache_bytes: int
    int8: bool = False
    tier_bytes: int = 0
    tier_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.tier_bytes and self.tier_folder is None:
            raise ValueError(f"tier_bytes is {self.tier_bytes}, but tier_folder is not set")


def default_kv_cache_bytes() -> int:
    """Return a quarter of the memory that is free now, to this process' control group if it is in one."""
    lines = MEMINFO.read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return int(max(free, 0) * FREE_SHARE)


def bookkeeping_bytes(blocks: int) -> int:
    """Return what keeping track of so many blocks takes, wherever they are."""
    return blocks * BOOKKEEPING_BYTES


def page_counts(layout: BlockLayout, settings: KVCacheSettings) -> tuple[int, int]:
    """Return how many pages the budgets allow in memory and in the tier. Raises ValueError when not one fits."""
    size = page_bytes(layout, settings.int8)
    tracking = bookkeeping_bytes(QUARTERS if settings.int8 else 1)
    tier_pages = (settings.tier_bytes - OFFSET) // size if settings.tier_bytes else 0
    if settings.tier_bytes and tier_pages < 1:
        raise ValueError(f"tier_bytes is {settings.tier_bytes}; one block of this model needs {OFFSET + size}")
    pages = (settings.kv_cache_bytes - OFFSET - tier_pages * tracking) // (size + tracking)
    if pages < 1:
        needed = OFFSET + size + (tier_pages + 1) * tracking
        raise ValueError(f"kv_cache_bytes is {settings.kv_cache_bytes}; one block of this model needs {needed}")
    return pages, tier_pages


def anonymous_memory(size: int) -> mmap.mmap:
    """Return zeroed memory that is taken from the system where it is first written."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def tier_memory(folder: Path, size: int) -> mmap.mmap:
    """Map a file in `folder` that only this process can reach, and that goes with it. Raises OSError without space.

    The space is reserved now: a mapped file that cannot grow when it is written ends the process.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(
                error.errno, f"tier_folder has no room for {size} bytes: {error.strerror}", str(folder)
            ) from error
        return mmap.mmap(file.fileno(), size)
