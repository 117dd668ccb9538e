"""Prefixes whose keys and values are in blocks of a paged cache: a hit is entries of a block table, not a copy.

As in vLLM's automatic prefix caching (Kwon et al. 2023), but the last block may be partly the same: its sharer copies
it when it first writes to it. What is pushed off the device goes to page-locked memory of the host, and comes back.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from speculative_decoding.host_tier import HostTier
from speculative_decoding.kv_integrity import counting, require
from speculative_decoding.kv_metrics import KVCacheCounters, KVCacheMetrics
from speculative_decoding.paged_blocks import BlockAllocator
from speculative_decoding.pins import PINNED_SHARE, Pins


@dataclass(eq=False)
class _Node:
    """A block and the tokens in it, fewer than fit in a leaf alone; `parent` is None in a tenant's root.

    place: the block's number on the device or, `in_tier`, on the host, where all that follow it are too.
    """

    tokens: tuple[int, ...]
    place: int
    parent: "_Node | None"
    children: list["_Node"] = field(default_factory=list)
    used: int = 0
    pins: int = 0
    in_tier: bool = False


class Hit(NamedTuple):
    """Blocks whose first `tokens` tokens are those of a prompt; the caller has a reference to each."""

    blocks: list[int]
    tokens: int


class PagedPrefixes:
    """One tree of blocks for each tenant, least recently used leaves first to go. Thread-safe.

    A pinned block stays on the device. What needs blocks of `allocator` is called by the thread alone that decodes.
    """

    def __init__(
        self,
        block_tokens: int,
        most: int,
        block_bytes: int,
        tier: HostTier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`most`: blocks that may be kept on the device. `tier`: takes those pushed off it."""
        self._size = block_tokens
        self._most = most
        self._block_bytes = block_bytes
        self._tier = tier
        self._clock = clock
        self._lock = threading.RLock()
        self._roots: dict[str, _Node] = {}
        self._nodes: set[_Node] = set()  # on the device
        self._in_tier: set[_Node] = set()
        self._pins: Pins[_Node] = Pins(int(most * PINNED_SHARE), lambda node: None)
        self._counters = KVCacheCounters()
        self._tick = 0
        self.allocator: BlockAllocator | None = None

    def match(self, tenant: str, tokens: Sequence[int]) -> Hit:
        """Return the longest known prefix of a prompt, short of its last token, whose logits are wanted."""
        assert self.allocator
        with self._lock:
            self._pins.expire(self._clock())
            blocks, length = list[int](), 0
            self._tick += 1
            path = list(self._path(tenant, tokens[:-1]))
            with _staying(*[node for node, _ in path]):
                for node, same in path:
                    node.used = self._tick
                    if node.in_tier and not self._fetch(node):
                        break
                    self.allocator.share([node.place])
                    blocks.append(node.place)
                    length += same
            self._counters.tokens_reused += length
            self._counters.tokens_computed += len(tokens) - length
            return Hit(blocks, length)

    def insert(self, tenant: str, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """Keep what is missing of the committed `tokens`, which are in `blocks`."""
        if not self._most:
            return
        with self._lock:
            self._pins.expire(self._clock())
            node = self._roots.setdefault(tenant, _Node((), -1, None))
            self._tick += 1
            for number, begin in enumerate(range(0, len(tokens), self._size)):
                chunk = tuple(tokens[begin : begin + self._size])
                child, same = self._closest(node, chunk)
                if child and same in (len(chunk), len(child.tokens)):
                    child.used = self._tick
                    child = child if self._renew(child, chunk, blocks[number]) else None
                else:
                    child = self._add(node, chunk, blocks[number])
                if child is None:
                    self._counters.blocks_refused += -(-(len(tokens) - begin) // self._size)
                    break
                node = child
            self._drop_root(tenant)

    def evict(self) -> bool:
        """Push the least recently used block off the device that only the cache has; False when there is none."""
        assert self.allocator
        with self._lock:
            leaves = (node for node in self._leaves() if not self.allocator.is_shared(node.place))
            leaf = min(leaves, key=lambda node: node.used, default=None)
            if leaf:
                self._push_out(leaf)
            return leaf is not None

    def pin(self, owner: Hashable, tenant: str, tokens: Sequence[int], ttl_s: float) -> int:
        """Keep the blocks of `tokens` on the device for a time, in place of what `owner` pinned before.

        Returns how many tokens are pinned: fewer where blocks are missing, or half of the room is pinned already.
        """
        with self._lock:
            now = self._clock()
            self._pins.expire(now)
            known = [(node, same) for node, same in self._path(tenant, tokens) if not node.in_tier]
            pinned = self._pins.put(owner, [node for node, _ in known], now + ttl_s)
            self._counters.pins_refused += len(known) - pinned
            return sum(same for _, same in known[:pinned])

    def unpin(self, owner: Hashable) -> None:
        """Let go what `owner` pinned, if anything."""
        with self._lock:
            self._pins.remove(owner)

    def held(self) -> list[int]:
        """Return the blocks that are kept on the device."""
        with self._lock:
            return [node.place for node in self._nodes]

    def snapshot(self) -> KVCacheMetrics:
        """Return what is kept and was done."""
        with self._lock:
            self._pins.expire(self._clock())
            return KVCacheMetrics(
                counters=replace(self._counters),
                blocks=len(self._nodes),
                blocks_int8=0,
                blocks_in_use=0,
                blocks_pinned=self._pins.blocks,
                bytes_used=len(self._nodes) * self._block_bytes,
                bytes_budget=self._most * self._block_bytes,
                tier_blocks=len(self._in_tier),
                tier_bytes_used=len(self._in_tier) * self._block_bytes,
                tier_bytes_budget=self._tier.blocks * self._block_bytes if self._tier else 0,
            )

    def check_integrity(self) -> None:
        """Raise IntegrityError when blocks, places or pins do not add up."""
        with self._lock, counting(self._counters):
            self._check()

    def _check(self) -> None:
        assert self.allocator
        known, roots = self._nodes | self._in_tier, set(self._roots.values())
        for node in known:
            parent = node.parent
            require(parent is not None and node in parent.children, "a block's parent does not know it")
            require(parent in roots or parent in known, "a block follows one that is unknown")
            assert parent
            require(node.in_tier or not parent.in_tier, "a block is on the device, its parent is not")
            require(not node.children or len(node.tokens) == self._size, "a block follows one that is not full")
            require(node.in_tier == (node in self._in_tier), "a block believes to be elsewhere")
            require(not (node.in_tier and node.pins), "a pinned block is on the host")
            require(node.in_tier or self.allocator.references(node.place) > 0, "a kept block is free")
        require(sum(len(node.children) for node in known | roots) == len(known), "a block is followed by a stranger")
        require(len({(node.in_tier, node.place) for node in known}) == len(known), "two blocks have one place")
        require(len(self._nodes) <= self._most, f"{len(self._nodes)} blocks are kept, {self._most} may be")
        taken = self._tier.taken() if self._tier else set()
        require({node.place for node in self._in_tier} == taken, "the places taken are not those that blocks have")
        pins = Counter(node for nodes in self._pins.held() for node in nodes)
        require(pins.keys() <= known, "a pinned block is unknown")
        require(all(node.pins == pins[node] for node in known), "a block counts other pins than there are")

    def _path(self, tenant: str, tokens: Sequence[int]) -> Iterator[tuple[_Node, int]]:
        """Yield the blocks that begin like `tokens`, and how many tokens of each are the same."""
        node, length = self._roots.get(tenant), 0
        while node and length < len(tokens):
            child, same = self._closest(node, tuple(tokens[length : length + self._size]))
            if not child or not same:
                return
            yield child, same
            length += same
            node = child if same == self._size else None

    def _closest(self, node: _Node, chunk: tuple[int, ...]) -> tuple[_Node | None, int]:
        """Return the child that begins most like `chunk`, and how many tokens are the same."""
        best, most = None, 0
        for child in node.children:
            same = _common(child.tokens, chunk)
            if same > most:
                best, most = child, same
        return best, most

    def _add(self, parent: _Node, chunk: tuple[int, ...], block: int) -> _Node | None:
        assert self.allocator
        with _staying(parent):
            if not self._make_room(1):
                return None
        node = _Node(chunk, block, parent, used=self._tick)
        self.allocator.share([block])
        parent.children.append(node)
        self._nodes.add(node)
        return node

    def _renew(self, node: _Node, chunk: tuple[int, ...], block: int) -> bool:
        """Have `block`, which has `chunk`, in place of one that ends before or is on the host; False without room."""
        assert self.allocator and node.parent
        have = len(node.tokens)
        if have > len(chunk) or (have == len(chunk) and not node.in_tier):
            return True
        if node.in_tier:
            with _staying(node, node.parent):
                if not self._make_room(1):
                    return False
            self._leave_tier(node)
        else:
            self.allocator.release([node.place])
        self.allocator.share([block])
        node.tokens, node.place = chunk, block
        return True

    def _fetch(self, node: _Node) -> bool:
        """Bring a block, whose parent is on the device, back from the host; False when there is no room."""
        assert self.allocator and self._tier
        if len(self._nodes) >= self._most and not any(self._leaves()):
            return False
        block = self.allocator.take()
        self._tier.load(node.place, block, len(node.tokens))
        self._leave_tier(node)  # whose place may be what the next one needs
        node.place = block
        self._make_room(0)
        self._counters.tier_hits += 1
        return True

    def _leave_tier(self, node: _Node) -> None:
        assert self._tier
        self._tier.give(node.place)
        self._in_tier.remove(node)
        self._nodes.add(node)
        node.in_tier = False

    def _make_room(self, blocks: int) -> bool:
        """Have room for so many more blocks on the device; return whether there is."""
        while len(self._nodes) + blocks > self._most:
            leaf = min(self._leaves(), key=lambda node: node.used, default=None)
            if leaf is None:
                return False
            self._push_out(leaf)
        return True

    def _leaves(self) -> Iterator[_Node]:
        """Yield the blocks that may leave the device: those that nothing on it follows, and nobody pins."""
        for node in self._nodes:
            if not node.pins and all(child.in_tier for child in node.children):
                yield node

    def _push_out(self, leaf: _Node) -> None:
        """Move a block to the host or, where there is no room that its least recently used ones could make, drop it."""
        assert self.allocator
        self._counters.blocks_evicted += 1
        place = self._room_in_tier()
        if place is None:
            self._drop(leaf)
            return
        assert self._tier
        self._tier.save(leaf.place, place, len(leaf.tokens))
        self.allocator.release([leaf.place])
        self._nodes.remove(leaf)
        self._in_tier.add(leaf)
        leaf.place, leaf.in_tier = place, True

    def _room_in_tier(self) -> int | None:
        if self._tier is None:
            return None
        while (place := self._tier.take()) is None:
            leaves = (node for node in self._in_tier if not (node.children or node.pins))
            leaf = min(leaves, key=lambda node: node.used, default=None)
            if leaf is None:
                return None
            self._drop(leaf)
            self._counters.tier_evicted += 1
        return place

    def _drop(self, node: _Node) -> None:
        """Forget a block, and those on the host that follow it."""
        assert self.allocator and node.parent
        for child in list(node.children):
            self._drop(child)
        if node.in_tier:
            assert self._tier
            self._in_tier.remove(node)
            self._tier.give(node.place)
        else:
            self._nodes.remove(node)
            self.allocator.release([node.place])
        node.parent.children.remove(node)
        for tenant in [name for name, root in self._roots.items() if root is node.parent]:
            self._drop_root(tenant)

    def _drop_root(self, tenant: str) -> None:
        root = self._roots.get(tenant)
        if root and not (root.children or root.pins):
            del self._roots[tenant]


@contextmanager
def _staying(*nodes: _Node) -> Iterator[None]:
    """Have blocks stay where they are for a time."""
    for node in nodes:
        node.pins += 1
    try:
        yield
    finally:
        for node in nodes:
            node.pins -= 1


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many first tokens two blocks share."""
    if one == other:
        return len(one)
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
