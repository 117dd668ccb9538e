"""Keys and values of prefixes already seen, kept so that attention over them is not computed again.

Blocks of committed tokens, of target and draft together, are found by a hash chain over their tokens (as in vLLM's
automatic prefix caching, Kwon et al. 2023, with the leaves-first eviction of SGLang, Zheng et al. 2023), one tree per
tenant, under one budget of bytes.
"""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from speculative_decoding.block_pool import QUARTERS, BlockPool, pool_bytes
from speculative_decoding.kv_integrity import check_counts, check_places, check_tree, counting, require
from speculative_decoding.kv_layout import BlockLayout, SlotMemory
from speculative_decoding.kv_memory import (
    KVCacheSettings,
    anonymous_memory,
    bookkeeping_bytes,
    page_counts,
    tier_memory,
)
from speculative_decoding.kv_metrics import KVCacheCounters, KVCacheMetrics
from speculative_decoding.pins import PINNED_SHARE, Pins
from speculative_decoding.prefix_tree import Node, PrefixTree
from speculative_decoding.residency import Residency


@dataclass(eq=False)
class Prefix:
    """Blocks found for a prompt, in use until they are released.

    tokens: how many tokens of the prompt the target need not compute. draft_tokens: the same for the draft, fewer where
    blocks were stored by requests that did not use it.
    """

    nodes: tuple[Node, ...]
    tokens: int
    draft_tokens: int


class KVCache:
    """Thread-safe. A full cache finds and stores less; it raises for wrong arguments only."""

    def __init__(
        self, layout: BlockLayout, settings: KVCacheSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Reserve the budget's address space, and the tier's file. Raises ValueError when no block fits, or OSError."""
        pages, tier_pages = page_counts(layout, settings)
        self._layout = layout
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._counters = KVCacheCounters()
        self._tree = PrefixTree(layout.block_tokens)
        self._pool = BlockPool(layout, pages, settings.int8, anonymous_memory(pool_bytes(layout, pages, settings.int8)))
        self._tier = None
        if tier_pages and settings.tier_folder:
            file = tier_memory(settings.tier_folder, pool_bytes(layout, tier_pages, settings.int8))
            self._tier = BlockPool(layout, tier_pages, settings.int8, file)
        self._residency = Residency(self._tree, self._pool, self._tier, settings.int8, self._counters)
        self._tick = 0
        self._prefixes: set[Prefix] = set()
        capacity = pages * (QUARTERS if settings.int8 else 1)
        self._pins: Pins[Node] = Pins(int(capacity * PINNED_SHARE), self._unpinned)

    def match(self, tenant: str, tokens: Sequence[int]) -> Prefix:
        """Return the longest known prefix of a prompt, short of its last token, whose logits are wanted.

        Its blocks stay where they are until `release`, which must follow.
        """
        with self._lock:
            self._pins.expire(self._clock())
            path = self._tree.find(tenant, self._tree.split(tokens[:-1]))
            self._use(path)
            present = path
            for number, node in enumerate(path):
                if not self._residency.fetch(node):
                    present = path[:number]
                    break
            self._disuse(path[len(present) :])
            prefix = self._prefix(present)
            self._prefixes.add(prefix)
            self._counters.tokens_reused += prefix.tokens
            self._counters.tokens_computed += len(tokens) - prefix.tokens
            return prefix

    def copy_into(self, prefix: Prefix, target: SlotMemory, draft: SlotMemory | None = None) -> None:
        """Write a prefix's keys and values to the first tokens of a slot of each model.

        The target's slot then has prefix.tokens tokens, the draft's prefix.draft_tokens.
        """
        slots = self._slots(target, draft)
        if prefix not in self._prefixes:
            raise ValueError("this prefix was released: its blocks may be gone")
        size = self._layout.block_tokens
        for model, slot in enumerate(slots):
            count = (prefix.tokens, prefix.draft_tokens)[model] // size
            for number, node in enumerate(prefix.nodes[:count]):
                assert node.place and not node.in_tier
                self._pool.read(node.place, model, slot, number * size)

    def release(self, prefix: Prefix) -> None:
        """Say that a prefix is not in use any more. Raises ValueError when it was said before."""
        with self._lock:
            if prefix not in self._prefixes:
                raise ValueError("this prefix is not in use: it was released before, or is another cache's")
            self._prefixes.remove(prefix)
            self._disuse(prefix.nodes)

    def insert(
        self,
        tenant: str,
        tokens: Sequence[int],
        target: SlotMemory,
        draft: SlotMemory | None = None,
        draft_tokens: int = 0,
    ) -> int:
        """Store what is missing of the whole blocks of `tokens`, and return how many tokens are stored now.

        `tokens` must be committed, and the target's slot have the keys and values of all of them; the draft's slot
        those of the first `draft_tokens`.
        """
        slots = self._slots(target, draft)
        with self._lock:
            self._pins.expire(self._clock())
            blocks = self._tree.split(tokens)
            path = self._tree.find(tenant, blocks)
            self._use(path)
            stored: list[Node] = []
            for number, block in enumerate(blocks):
                models = 2 if len(slots) == 2 and (number + 1) * self._layout.block_tokens <= draft_tokens else 1
                node = path[number] if number < len(path) else self._new(tenant, stored[-1:], block)
                if node is None or not self._residency.fetch(node):
                    self._counters.blocks_refused += len(blocks) - number
                    break
                self._fill(node, slots[:models], number * self._layout.block_tokens)
                stored.append(node)
            self._disuse([*path, *stored[len(path) :]])
            return len(stored) * self._layout.block_tokens

    def pin(self, owner: Hashable, tenant: str, tokens: Sequence[int], ttl_s: float) -> int:
        """Keep the blocks of `tokens` in the pool for a time, in place of what `owner` pinned before.

        Returns how many tokens are pinned: fewer where blocks are missing, or half of the pool is pinned already.
        """
        with self._lock:
            now = self._clock()
            self._pins.expire(now)
            known = [node for node in self._tree.find(tenant, self._tree.split(tokens)) if not node.in_tier]
            pinned = self._pins.put(owner, known, now + ttl_s)
            self._counters.pins_refused += len(known) - pinned
            return pinned * self._layout.block_tokens

    def unpin(self, owner: Hashable) -> None:
        """Let go what `owner` pinned, if anything."""
        with self._lock:
            self._pins.remove(owner)

    def snapshot(self) -> KVCacheMetrics:
        """Return what the cache holds and has done."""
        with self._lock:
            self._pins.expire(self._clock())
            return KVCacheMetrics(
                counters=replace(self._counters),
                blocks=self._residency.blocks,
                blocks_int8=self._residency.blocks_int8,
                blocks_in_use=len({node for prefix in self._prefixes for node in prefix.nodes}),
                blocks_pinned=self._pins.blocks,
                bytes_used=self._pool.bytes_used + bookkeeping_bytes(len(self._tree)),
                bytes_budget=self._settings.kv_cache_bytes,
                tier_blocks=self._residency.blocks_in_tier,
                tier_bytes_used=self._tier.bytes_used if self._tier else 0,
                tier_bytes_budget=self._settings.tier_bytes,
            )

    def check_integrity(self) -> None:
        """Raise IntegrityError when blocks, references, pins or bytes do not add up. Takes time with many blocks."""
        with counting(self._counters):
            self._check()

    def _check(self) -> None:
        metrics = self.snapshot()
        require(metrics.bytes_used <= metrics.bytes_budget, f"{metrics.bytes_used} bytes exceed the budget")
        require(metrics.tier_bytes_used <= metrics.tier_bytes_budget, "the tier exceeds its budget")
        with self._lock:
            check_tree(self._tree, len(self._layout.models))
            check_places(self._residency.owners(), self._tree, self._pool, self._tier)
            uses = [prefix.nodes for prefix in self._prefixes]
            check_counts(self._tree, uses, self._pins.held())
            pinned = sum(node.pins > 0 for node in self._tree)
            require(pinned == self._pins.blocks, f"{pinned} blocks are pinned, not {self._pins.blocks}")

    def _new(self, tenant: str, parent: Sequence[Node], tokens: bytes) -> Node | None:
        """Return a new block, in use and with room in the pool, after the one in `parent`; None without room."""
        node = self._tree.add(tenant, parent[0] if parent else None, tokens)
        if node is None:
            self._counters.hash_collisions += 1
            return None
        node.refs, node.used = 1, self._tick
        if not self._residency.add(node):
            self._tree.remove(node)
            return None
        return node

    def _fill(self, node: Node, slots: Sequence[SlotMemory], begin: int) -> None:
        """Write what a block lacks; what it has is never written again, for others may be reading it."""
        assert node.place
        for model in range(node.models, len(slots)):
            self._pool.write(node.place, model, slots[model], begin)
            node.models = model + 1

    def _prefix(self, path: Sequence[Node]) -> Prefix:
        size = self._layout.block_tokens
        drafted = next((number for number, node in enumerate(path) if node.models < 2), len(path))
        return Prefix(tuple(path), len(path) * size, drafted * size)

    def _slots(self, target: SlotMemory, draft: SlotMemory | None) -> list[SlotMemory]:
        slots = [target] if draft is None else [target, draft]
        if len(slots) > len(self._layout.models):
            raise ValueError("a draft's slot was given; this cache is for a target alone")
        for name, model, slot in zip(("target", "draft"), self._layout.models, slots, strict=False):
            model.require_slot(name, slot)
        return slots

    def _use(self, path: Sequence[Node]) -> None:
        self._tick += 1
        for node in path:
            node.refs += 1
            node.used = self._tick

    def _unpinned(self, node: Node) -> None:
        if not node.refs:
            self._residency.idle(node)

    def _disuse(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            node.refs -= 1
            if not node.refs:
                self._residency.idle(node)
