"""Whether the parts of the key/value cache agree with each other."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from speculative_decoding.block_pool import QUARTERS, BlockPool, Place
from speculative_decoding.kv_metrics import KVCacheCounters
from speculative_decoding.prefix_tree import Node, PrefixTree, chain


class IntegrityError(RuntimeError):
    """The key/value cache contradicts itself: a defect of this code, not of a request."""


def require(condition: bool, message: str) -> None:
    """Raise IntegrityError unless the condition holds."""
    if not condition:
        raise IntegrityError(message)


@contextmanager
def counting(counters: KVCacheCounters) -> Iterator[None]:
    """Count what is done within as a check, and an IntegrityError of it."""
    counters.integrity_checks += 1
    try:
        yield
    except IntegrityError:
        counters.integrity_errors += 1
        raise


def check_tree(tree: PrefixTree, models: int) -> None:
    """Check that every block follows from its parent, in tokens and in time, and has been written."""
    nodes = set(tree)
    roots = set(tree.roots())
    children = Counter(node.parent for node in nodes)
    for node in nodes:
        parent = node.parent
        require(parent is not None and (parent in nodes or parent in roots), "a block follows one that is unknown")
        assert parent
        require(node.digest == chain(parent.digest, node.tokens), "a block's digest is not that of its tokens")
        require(node.depth == parent.depth + 1, "a block's depth is not its parent's and one")
        require(parent in roots or node.used <= parent.used, "a block was used after the one it follows")
        require(1 <= node.models <= models, f"a block has the keys and values of {node.models} models")
        require(parent in roots or node.in_tier or not parent.in_tier, "a block is in the pool, its parent is not")
    for node in nodes | roots:
        require(node.children == children[node], f"a block counts {node.children} children of {children[node]}")
    require(all(root.children for root in roots), "a tree without blocks is kept")


def check_places(
    owners: Mapping[tuple[bool, Place], Node], tree: PrefixTree, pool: BlockPool, tier: BlockPool | None
) -> None:
    """Check that every block has a place of its own, and every place taken is a block's."""
    taken = {(False, place) for place in pool.taken()} | {(True, place) for place in (tier.taken() if tier else ())}
    require(owners.keys() == taken, "the places taken are not those that blocks have")
    require(set(owners.values()) == set(tree) and len(owners) == len(tree), "a block has no place, or two")
    for (in_tier, place), node in owners.items():
        require((node.in_tier, node.place) == (in_tier, place), "a block believes to be elsewhere")
    quartered = {(in_tier, place.number // QUARTERS) for in_tier, place in owners if place.int8}
    whole = {(in_tier, place.number) for in_tier, place in owners if not place.int8}
    require(not quartered & whole, "an int8 block and an fp32 block share a page")


def check_counts(tree: PrefixTree, uses: Iterable[tuple[Node, ...]], pins: Iterable[tuple[Node, ...]]) -> None:
    """Check that references and pins are those of the handles and sessions there are, and hold blocks in the pool."""
    used = Counter(node for nodes in uses for node in nodes)
    pinned = Counter(node for nodes in pins for node in nodes)
    require(set(used) | set(pinned) <= set(tree), "a block in use or pinned is unknown")
    for node in tree:
        require(node.refs == used[node], f"a block has {node.refs} references, {used[node]} are held")
        require(node.pins == pinned[node], f"a block has {node.pins} pins, {pinned[node]} are held")
        require(not (node.in_tier and (node.refs or node.pins)), "a block in use or pinned is in the tier")
