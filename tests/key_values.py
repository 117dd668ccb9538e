"""Keys and values that say which tokens they are of, for caches whose contents must never be mixed up."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from speculative_decoding.block_pool import OFFSET, QUARTERS, page_bytes
from speculative_decoding.kv_cache import KVCache
from speculative_decoding.kv_layout import BlockLayout, KeyValueShape, SlotMemory
from speculative_decoding.kv_memory import KVCacheSettings, bookkeeping_bytes

TARGET = KeyValueShape(layers=2, kv_heads=2, head_size=4)
DRAFT = KeyValueShape(layers=1, kv_heads=2, head_size=2)
CONTEXT = 64


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def empty_slot(model: KeyValueShape, context: int = CONTEXT) -> SlotMemory:
    """Return one slot of a model's working memory, a view with strides as the engine's are, full of nonsense."""
    memory = np.full((model.planes, 3, model.kv_heads, context, model.head_size), np.nan, np.float32)
    return memory[:, 1]


def filled_slot(model: KeyValueShape, tokens: Sequence[int], context: int = CONTEXT) -> SlotMemory:
    """Return a slot with the keys and values of `tokens`: each depends on all tokens up to its own."""
    slot = empty_slot(model, context)
    for position in range(len(tokens)):
        slot[:, :, position] = values(model, tokens[: position + 1])
    return slot


def values(model: KeyValueShape, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Return what the last of `tokens` adds, float32 [planes, kv_heads, head_size]."""
    seed = zlib.crc32(np.array([model.layers, *tokens], np.int64).tobytes())
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((model.planes, model.kv_heads, model.head_size))
    return drawn.astype(np.float32) * np.exp2(np.arange(model.kv_heads, dtype=np.float32))[:, None]


def make_cache(
    pages: int,
    draft: bool = True,
    int8: bool = False,
    tier_pages: int = 0,
    tier_folder: Path | None = None,
    block_tokens: int = 4,
    clock: Clock | None = None,
) -> KVCache:
    """Return a cache with room for that many fp32 blocks."""
    layout = BlockLayout(TARGET, DRAFT if draft else None, block_tokens)
    size = page_bytes(layout, int8)
    tracking = bookkeeping_bytes(QUARTERS if int8 else 1)
    budget = OFFSET + pages * (size + tracking) + tier_pages * tracking
    tier_bytes = OFFSET + tier_pages * size if tier_pages else 0
    return KVCache(layout, KVCacheSettings(budget, int8, tier_bytes, tier_folder), clock or Clock())


def insert(cache: KVCache, tenant: str, tokens: Sequence[int], draft: bool = True) -> int:
    """Store all of `tokens`, of both models or of the target alone."""
    target = filled_slot(TARGET, tokens)
    if not draft:
        return cache.insert(tenant, tokens, target)
    return cache.insert(tenant, tokens, target, filled_slot(DRAFT, tokens), len(tokens))


def found(cache: KVCache, tenant: str, tokens: Sequence[int], tolerance: float = 0.0, draft: bool = True) -> int:
    """Look `tokens` up, check every number that is found, and return how many tokens are."""
    prefix = cache.match(tenant, tokens)
    slots = [empty_slot(TARGET), empty_slot(DRAFT)][: 1 + draft]
    cache.copy_into(prefix, *slots)
    cache.release(prefix)
    for model, slot, count in zip((TARGET, DRAFT), slots, (prefix.tokens, prefix.draft_tokens), strict=False):
        expected = filled_slot(model, tokens[:count])
        error = np.abs(slot[:, :, :count] - expected[:, :, :count]).max(initial=0.0)
        assert error <= tolerance, f"keys and values of other tokens: off by {error}"
        assert np.isnan(slot[:, :, count:]).all(), "more was written than was promised"
    return prefix.tokens
