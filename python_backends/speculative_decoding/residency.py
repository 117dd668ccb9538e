"""Where blocks are: in the pool, in the tier behind it, or nowhere any more."""

from speculative_decoding.block_pool import BlockPool, Place
from speculative_decoding.kv_metrics import KVCacheCounters
from speculative_decoding.prefix_tree import Node, PrefixTree
from speculative_decoding.recency import Recency

HOT_SHARE = 16  # with int8, one page in so many stays fp32: what is used most is then exact, and twice as fast to copy


class Residency:
    """Makes room for blocks: quantizes cold ones, moves the coldest to the tier, and forgets the tier's coldest.

    Nothing happens to a block in use, and a pinned one stays in the pool. A block whose successor is in the pool is in
    the pool itself. Not thread-safe.
    """

    def __init__(
        self, tree: PrefixTree, pool: BlockPool, tier: BlockPool | None, int8: bool, counters: KVCacheCounters
    ) -> None:
        self._tree = tree
        self._pool = pool
        self._tier = tier
        self._int8 = int8
        self._counters = counters
        self._evictable = Recency()
        self._fp32 = Recency()
        self._in_tier = Recency()
        self._owners: dict[tuple[bool, Place], Node] = {}  # (in the tier, place)
        self.blocks_int8 = 0  # in the pool
        self.blocks_in_tier = 0

    @property
    def blocks(self) -> int:
        """How many blocks are in the pool."""
        return len(self._owners) - self.blocks_in_tier

    def owners(self) -> dict[tuple[bool, Place], Node]:
        """Return whose each place is, by (in the tier, place)."""
        return dict(self._owners)

    def idle(self, node: Node) -> None:
        """Say that a block has just come out of use, or lost its last pin."""
        if node.in_tier:
            self._in_tier.push(node)
            return
        self._evictable.push(node)
        if self._int8 and is_fp32(node):
            self._fp32.push(node)

    def add(self, node: Node) -> bool:
        """Give a new block, in use, fp32 room in the pool; False when there is none."""
        place = self._room(int8=False)
        if place:
            self._enter(node, False, place)
        return place is not None

    def fetch(self, node: Node) -> bool:
        """Have a block, in use as all before it, in the pool; False when there is no room."""
        if not node.in_tier:
            return True
        assert self._tier and node.place
        place = self._room(node.place.int8)
        if place is None:
            return False
        self._tier.copy(node.place, self._pool, place)
        self._tier.evict_from_memory(node.place)
        self._leave(node)
        self._enter(node, False, place)
        self._counters.tier_hits += 1
        return True

    def _room(self, int8: bool) -> Place | None:
        while (place := self._pool.take(int8)) is None:
            freed = self._compact(in_tier=False) or self._quantize_cold() or self._evict() or self._quantize()
            if not freed:
                return None
        return place

    def _quantize_cold(self) -> bool:
        """Quantize a block unless too few would remain fp32."""
        return self.blocks - self.blocks_int8 > self._pool.pages // HOT_SHARE and self._quantize()

    def _quantize(self) -> bool:
        """Turn the least recently used fp32 block that is not in use into an int8 one."""
        node = self._fp32.pop(lambda node: not node.refs and not node.in_tier and is_fp32(node))
        if node is None:
            return False
        assert node.place
        source, target = node.place, self._pool.take(int8=True)
        if target is None:
            target = self._pool.quarter(source)
            self._pool.quantize(source, target, node.models)
            self._relocate(False, source, target)
            self.blocks_int8 += 1
        else:
            self._pool.quantize(source, target, node.models)
            self._leave(node)
            self._enter(node, False, target)
        self._counters.blocks_quantized += 1
        return True

    def _evict(self) -> bool:
        """Push the least recently used block out of the pool."""
        node = self._evictable.pop(lambda node: not (node.refs or node.pins or node.in_tier) and node.place is not None)
        if node is None:
            return False
        assert node.place
        self._counters.blocks_evicted += 1
        place = self._room_in_tier(node.place.int8)
        if place is None:
            self._drop(node)
            return True
        assert self._tier
        self._pool.copy(node.place, self._tier, place)
        self._tier.evict_from_memory(place)
        self._leave(node)
        self._enter(node, True, place)
        self._in_tier.push(node)
        return True

    def _room_in_tier(self, int8: bool) -> Place | None:
        if self._tier is None:
            return None
        while (place := self._tier.take(int8)) is None:
            if self._compact(in_tier=True):
                continue
            node = self._in_tier.pop(lambda node: node.in_tier and not node.refs)
            if node is None:
                return None
            self._drop(node)
            self._counters.tier_evicted += 1
        return place

    def _compact(self, in_tier: bool) -> bool:
        """Empty a page of a pool whose int8 blocks leave enough gaps; a block in use may be being read."""
        pool = self._tier if in_tier else self._pool
        assert pool
        moves = pool.compact(lambda place: in_tier or not self._owners[in_tier, place].refs)
        for source, target in moves:
            self._relocate(in_tier, source, target)
        return bool(moves)

    def _drop(self, node: Node) -> None:
        self._leave(node)
        self._tree.remove(node)

    def _enter(self, node: Node, in_tier: bool, place: Place) -> None:
        node.in_tier, node.place = in_tier, place
        self._owners[in_tier, place] = node
        self._count(in_tier, place, 1)

    def _leave(self, node: Node) -> None:
        assert node.place
        pool = self._tier if node.in_tier else self._pool
        assert pool
        pool.give(node.place)
        del self._owners[node.in_tier, node.place]
        self._count(node.in_tier, node.place, -1)
        node.in_tier, node.place = False, None

    def _relocate(self, in_tier: bool, source: Place, target: Place) -> None:
        node = self._owners.pop((in_tier, source))
        node.place = target
        self._owners[in_tier, target] = node

    def _count(self, in_tier: bool, place: Place, change: int) -> None:
        if in_tier:
            self.blocks_in_tier += change
        elif place.int8:
            self.blocks_int8 += change


def is_fp32(node: Node) -> bool:
    """Whether a block is stored in full precision."""
    return node.place is not None and not node.place.int8
