"""Prefixes whose keys and values are in blocks of a paged cache: a hit is entries of a block table, not a copy.

As in vLLM's automatic prefix caching (Kwon et al. 2023), but the last block may be partly the same: its sharer copies
it when it first writes to it. What is pushed off the device goes to page-locked memory of the host, and comes back.
"""

import threading
import time
from bisect import bisect_left
from collections import Counter, OrderedDict
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

    place: the block's number on the device or, `in_tier`, on the host, where all that follow it are too. children: in
    the order of their tokens, none of which begins another's; `followers`: how many of them are on the device. tenant:
    a root's.
    """

    tokens: tuple[int, ...]
    place: int
    parent: "_Node | None"
    tenant: str = ""
    children: list["_Node"] = field(default_factory=list)
    followers: int = 0
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
        self._nodes: OrderedDict[_Node, None] = OrderedDict()  # on the device, least recently used first
        self._in_tier: OrderedDict[_Node, None] = OrderedDict()
        self._pins: Pins[_Node] = Pins(int(most * PINNED_SHARE), lambda node: None)
        self._counters = KVCacheCounters()
        self.allocator: BlockAllocator | None = None

    def match(self, tenant: str, tokens: Sequence[int]) -> Hit:
        """Return the longest known prefix of a prompt, short of its last token, whose logits are wanted."""
        assert self.allocator
        with self._lock:
            self._pins.expire(self._clock())
            blocks, length = list[int](), 0
            path = list(self._path(tenant, tokens[:-1]))
            nodes = [node for node, _ in path]
            with _staying(*nodes):
                for node, same in path:
                    if node.in_tier and not self._fetch(node):
                        break
                    self.allocator.share([node.place])
                    blocks.append(node.place)
                    length += same
            self._use(nodes)
            self._counters.tokens_reused += length
            self._counters.tokens_computed += len(tokens) - length
            return Hit(blocks, length)

    def insert(self, tenant: str, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """Keep what is missing of the committed `tokens`, which are in `blocks`."""
        if not self._most:
            return
        with self._lock:
            self._pins.expire(self._clock())
            root = node = self._roots.setdefault(tenant, _Node((), -1, None, tenant))
            path = list[_Node]()
            for number, begin in enumerate(range(0, len(tokens), self._size)):
                chunk = tuple(tokens[begin : begin + self._size])
                child, same = self._closest(node, chunk)
                if child and same in (len(chunk), len(child.tokens)):
                    child = child if self._renew(child, chunk, blocks[number]) else None
                else:
                    child = self._add(node, chunk, blocks[number])
                if child is None:
                    self._counters.blocks_refused += -(-(len(tokens) - begin) // self._size)
                    break
                node = child
                path.append(node)
            self._use(path)
            self._drop_root(root)

    def evict(self) -> bool:
        """Push the least recently used block off the device that only the cache has; False when there is none."""
        assert self.allocator
        with self._lock:
            is_shared = self.allocator.is_shared
            leaf = _oldest(self._nodes, lambda node: _may_leave(node) and not is_shared(node.place))
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
        known, roots = {*self._nodes, *self._in_tier}, set(self._roots.values())
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
        for node in known | roots:
            texts = [child.tokens for child in node.children]
            require(texts == sorted(texts), "the blocks that follow one are out of order")
            followers = sum(not child.in_tier for child in node.children)
            require(node.followers == followers, "a block counts other followers than there are")
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
        """Return the child that begins most like `chunk`, which would stand beside it, and how many tokens are so."""
        at = bisect_left(node.children, chunk, key=_tokens)
        beside = [(child, _common(child.tokens, chunk)) for child in node.children[max(0, at - 1) : at + 1]]
        return max(beside, key=lambda one: one[1], default=(None, 0))

    def _use(self, path: Sequence[_Node]) -> None:
        """Say that blocks, each of which follows the one before, have just been used; the last one is to go first."""
        for node in reversed(path):
            (self._in_tier if node.in_tier else self._nodes).move_to_end(node)

    def _add(self, parent: _Node, chunk: tuple[int, ...], block: int) -> _Node | None:
        assert self.allocator
        with _staying(parent):
            if not self._make_room(1):
                return None
        node = _Node(chunk, block, parent)
        self.allocator.share([block])
        parent.children.insert(bisect_left(parent.children, chunk, key=_tokens), node)
        parent.followers += 1
        self._nodes[node] = None
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
        if len(self._nodes) >= self._most and not _oldest(self._nodes, _may_leave):
            return False
        block = self.allocator.take()
        self._tier.load(node.place, block, len(node.tokens))
        self._leave_tier(node)  # whose place may be what the next one needs
        node.place = block
        self._make_room(0)
        self._counters.tier_hits += 1
        return True

    def _leave_tier(self, node: _Node) -> None:
        assert self._tier and node.parent
        self._tier.give(node.place)
        del self._in_tier[node]
        self._nodes[node] = None
        node.in_tier = False
        node.parent.followers += 1

    def _make_room(self, blocks: int) -> bool:
        """Have room for so many more blocks on the device; return whether there is."""
        while len(self._nodes) + blocks > self._most:
            leaf = _oldest(self._nodes, _may_leave)
            if leaf is None:
                return False
            self._push_out(leaf)
        return True

    def _push_out(self, leaf: _Node) -> None:
        """Move a block to the host or, where there is no room that its least recently used ones could make, drop it."""
        assert self.allocator and leaf.parent
        self._counters.blocks_evicted += 1
        place = self._room_in_tier()
        if place is None:
            self._drop(leaf)
            return
        assert self._tier
        self._tier.save(leaf.place, place, len(leaf.tokens))
        self.allocator.release([leaf.place])
        del self._nodes[leaf]
        self._in_tier[leaf] = None
        leaf.place, leaf.in_tier = place, True
        leaf.parent.followers -= 1

    def _room_in_tier(self) -> int | None:
        if self._tier is None:
            return None
        while (place := self._tier.take()) is None:
            leaf = _oldest(self._in_tier, lambda node: not (node.children or node.pins))
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
            del self._in_tier[node]
            self._tier.give(node.place)
        else:
            del self._nodes[node]
            self.allocator.release([node.place])
            node.parent.followers -= 1
        del node.parent.children[bisect_left(node.parent.children, node.tokens, key=_tokens)]
        self._drop_root(node.parent)

    def _drop_root(self, node: _Node) -> None:
        """Forget a tenant's root that has no blocks; other nodes are no roots."""
        if node.parent is None and not (node.children or node.pins):
            del self._roots[node.tenant]


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


def _oldest(nodes: OrderedDict[_Node, None], may_go: Callable[[_Node], bool]) -> _Node | None:
    """Return the first node that may go; those before it count as used now, so that it is not searched for again."""
    for _ in range(len(nodes)):
        node = next(iter(nodes))
        if may_go(node):
            return node
        nodes.move_to_end(node)
    return None


def _may_leave(node: _Node) -> bool:
    """Return whether a block may leave the device: nothing on it follows, and nobody pins it."""
    return not (node.pins or node.followers)


def _tokens(node: _Node) -> tuple[int, ...]:
    return node.tokens


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many first tokens two blocks share."""
    same, beyond = 0, min(len(one), len(other)) + 1  # so many are shared, so many are not
    while beyond - same > 1:
        middle = (same + beyond) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            beyond = middle
    return same
