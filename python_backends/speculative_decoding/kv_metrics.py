"""What the key/value cache and the sessions have done, in numbers."""

from dataclasses import dataclass


@dataclass
class KVCacheCounters:
    """Counts since the start.

    tokens_reused and tokens_computed: of the prompts looked up, those found and those not. blocks_evicted: pushed out
    of the pool, to the tier or for good. blocks_quantized: turned to int8. blocks_refused: not stored, since the pool
    was full of blocks in use. pins_refused: blocks not pinned, since as many as may be are. tier_hits: blocks that came
    back from the tier. tier_evicted: pushed out of the tier. hash_collisions: blocks not stored because of one.
    integrity_checks, integrity_errors: checks made, and those of them that found the cache to contradict itself.
    """

    tokens_reused: int = 0
    tokens_computed: int = 0
    blocks_evicted: int = 0
    blocks_quantized: int = 0
    blocks_refused: int = 0
    pins_refused: int = 0
    tier_hits: int = 0
    tier_evicted: int = 0
    hash_collisions: int = 0
    integrity_checks: int = 0
    integrity_errors: int = 0


@dataclass(frozen=True)
class KVCacheMetrics:
    """The cache at one moment; bytes include what keeping track of blocks takes."""

    counters: KVCacheCounters
    blocks: int  # in the pool
    blocks_int8: int
    blocks_in_use: int
    blocks_pinned: int
    bytes_used: int
    bytes_budget: int
    tier_blocks: int
    tier_bytes_used: int
    tier_bytes_budget: int


@dataclass(frozen=True)
class SessionMetrics:
    """The sessions at one moment: how many are open, held by a request, and waited for by another."""

    open: int
    busy: int
    waiting: int
