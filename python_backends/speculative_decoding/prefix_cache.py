"""What sessions, metrics and upkeep ask of whatever keeps prefixes: KVCache on a CPU, PagedReuse on a GPU."""

from collections.abc import Hashable, Sequence
from typing import Protocol

from speculative_decoding.kv_metrics import KVCacheMetrics


class PrefixCache(Protocol):
    """Keys and values of prefixes already seen. Thread-safe."""

    def pin(self, owner: Hashable, tenant: str, tokens: Sequence[int], ttl_s: float) -> int:
        """Keep what there is of `tokens` in memory for a time, in place of what `owner` pinned before.

        Returns how many tokens are pinned: fewer where blocks are missing, or half of the room is pinned already.
        """

    def unpin(self, owner: Hashable) -> None:
        """Let go what `owner` pinned, if anything."""

    def snapshot(self) -> KVCacheMetrics:
        """Return what it holds and has done."""

    def check_integrity(self) -> None:
        """Raise IntegrityError when blocks, references, pins or bytes do not add up. Takes time with many blocks."""
