"""Prefixes whose keys and values are in blocks of a paged cache: a hit is entries of a block table, not a copy.

As in vLLM's automatic prefix caching (Kwon et al. 2023), but the last block may be partly the same: its sharer copies
it when it first writes to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from speculative_decoding.paged_blocks import BlockAllocator


@dataclass(eq=False)
class _Node:
    """A block and the tokens in it, fewer than fit in a leaf alone; `parent` is None in a tenant's root."""

    tokens: tuple[int, ...]
    block: int
    parent: "_Node | None"
    children: list["_Node"] = field(default_factory=list)
    used: int = 0


class Hit(NamedTuple):
    """Blocks whose first `tokens` tokens are those of a prompt; the caller has a reference to each."""

    blocks: list[int]
    tokens: int


class PagedPrefixes:
    """One tree of blocks for each tenant, least recently used leaves first to go. Not thread-safe."""

    def __init__(self, block_tokens: int, most: int) -> None:
        """`most`: blocks that may be kept."""
        self._size = block_tokens
        self._most = most
        self._roots: dict[str, _Node] = {}
        self._nodes: set[_Node] = set()
        self._tick = 0
        self.allocator: BlockAllocator | None = None

    @property
    def blocks(self) -> int:
        """How many blocks are kept."""
        return len(self._nodes)

    def match(self, tenant: str, tokens: Sequence[int]) -> Hit:
        """Return the longest known prefix of a prompt, short of its last token, whose logits are wanted."""
        assert self.allocator
        wanted = tuple(tokens[:-1])
        node, blocks, length = self._roots.get(tenant), list[int](), 0
        self._tick += 1
        while node and length < len(wanted):
            child, same = self._closest(node, wanted[length : length + self._size])
            if not child or not same:
                break
            child.used = self._tick
            blocks.append(child.block)
            length += same
            node = child if same == self._size else None
        self.allocator.share(blocks)
        return Hit(blocks, length)

    def insert(self, tenant: str, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """Keep what is missing of the committed `tokens`, which are in `blocks`."""
        if not self._most:
            return
        node = self._roots.setdefault(tenant, _Node((), -1, None))
        self._tick += 1
        for number, begin in enumerate(range(0, len(tokens), self._size)):
            chunk = tuple(tokens[begin : begin + self._size])
            child, same = self._closest(node, chunk)
            if child and same == len(chunk):
                child.used = self._tick
            elif child and same == len(child.tokens):  # what was there ends within this block
                self._replace(child, chunk, blocks[number])
            else:
                child = self._add(node, chunk, blocks[number])
            if child is None:
                break
            node = child
        self._drop_root(tenant)

    def evict(self) -> bool:
        """Let go of the least recently used block that none follows; False when there is none."""
        assert self.allocator
        leaf = min((node for node in self._nodes if not node.children), key=lambda node: node.used, default=None)
        if leaf is None:
            return False
        assert leaf.parent
        leaf.parent.children.remove(leaf)
        self._nodes.remove(leaf)
        self.allocator.release([leaf.block])
        for tenant in [name for name, root in self._roots.items() if root is leaf.parent]:
            self._drop_root(tenant)
        return True

    def held(self) -> list[int]:
        """Return the blocks that are kept."""
        return [node.block for node in self._nodes]

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
        while len(self._nodes) >= self._most:
            parent.used = self._tick  # not the one that is about to be followed
            if not self._evict_other(parent):
                return None
        node = _Node(chunk, block, parent, used=self._tick)
        self.allocator.share([block])
        parent.children.append(node)
        self._nodes.add(node)
        return node

    def _evict_other(self, kept: _Node) -> bool:
        leaves = [node for node in self._nodes if not node.children and node is not kept]
        return bool(leaves) and self.evict()

    def _replace(self, node: _Node, chunk: tuple[int, ...], block: int) -> None:
        assert self.allocator
        self.allocator.share([block])
        self.allocator.release([node.block])
        node.tokens, node.block, node.used = chunk, block, self._tick

    def _drop_root(self, tenant: str) -> None:
        if tenant in self._roots and not self._roots[tenant].children:
            del self._roots[tenant]


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many first tokens two blocks share."""
    if one == other:
        return len(one)
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
