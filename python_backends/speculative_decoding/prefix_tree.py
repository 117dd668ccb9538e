"""Which prefixes are known: blocks of tokens chained by hashes, one tree per tenant."""

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from speculative_decoding.block_pool import Place

DIGEST_BYTES = 16


def chain(previous: bytes, tokens: bytes) -> bytes:
    """Return the digest of a block of tokens that follows the block of digest `previous`."""
    return hashlib.blake2b(previous + tokens, digest_size=DIGEST_BYTES).digest()


@dataclass(eq=False, slots=True)
class Node:
    """A block of tokens after the blocks that lead to it; the root of a tenant's tree has no tokens.

    refs: handles that use it now. pins: sessions that keep it. used: the tick of its last use, never before one of a
    block that follows it. models: how many models' keys and values it has, the target's first. place: where they are,
    in the pool or, with `in_tier`, in the tier.
    """

    parent: "Node | None"
    tokens: bytes
    digest: bytes
    depth: int
    children: int = 0
    refs: int = 0
    pins: int = 0
    used: int = 0
    models: int = 0
    in_tier: bool = False
    place: Place | None = field(default=None)


class PrefixTree:
    """Finds the blocks that a sequence of tokens begins with. A digest is a hint: tokens and parents are compared too.

    The roots' digests depend on the tenant and a secret of this object, so that no tenant's tokens find another's
    blocks, and nobody can prepare tokens whose digests collide.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_bytes = block_tokens * np.dtype(np.int32).itemsize
        self._secret = secrets.token_bytes(32)
        self._roots: dict[bytes, Node] = {}
        self._nodes: dict[bytes, Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def split(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the whole blocks of `tokens`."""
        data = np.array(tokens, np.int32).tobytes()
        size = self._block_bytes
        return [data[begin : begin + size] for begin in range(0, len(data) - size + 1, size)]

    def find(self, tenant: str, blocks: Sequence[bytes]) -> list[Node]:
        """Return the nodes of the longest known prefix."""
        path: list[Node] = []
        node = self._roots.get(self._salt(tenant))
        for tokens in blocks if node else ():
            assert node is not None
            node = self._child(node, tokens)
            if node is None:
                break
            path.append(node)
        return path

    def add(self, tenant: str, parent: Node | None, tokens: bytes) -> Node | None:
        """Add a block after `parent`, or as a first one; None when its digest is another block's."""
        parent = parent or self._root(tenant)
        digest = chain(parent.digest, tokens)
        if digest in self._nodes:
            self._drop_root(parent)
            return None
        node = self._nodes[digest] = Node(parent, tokens, digest, parent.depth + 1)
        parent.children += 1
        return node

    def remove(self, node: Node) -> None:
        """Forget a block, which must be the last one of every prefix it is in."""
        assert not node.children and node.parent, "a block is removed before those that follow it are"
        del self._nodes[node.digest]
        node.parent.children -= 1
        self._drop_root(node.parent)

    def roots(self) -> list[Node]:
        """Return the root of each tenant that has blocks."""
        return list(self._roots.values())

    def _child(self, parent: Node, tokens: bytes) -> Node | None:
        node = self._nodes.get(chain(parent.digest, tokens))
        return node if node and node.parent is parent and node.tokens == tokens else None

    def _root(self, tenant: str) -> Node:
        salt = self._salt(tenant)
        if salt not in self._roots:
            self._roots[salt] = Node(None, b"", salt, 0)
        return self._roots[salt]

    def _salt(self, tenant: str) -> bytes:
        name = tenant.encode(errors="surrogatepass")
        return hashlib.blake2b(name, key=self._secret, digest_size=DIGEST_BYTES).digest()

    def _drop_root(self, node: Node) -> None:
        if node.parent is None and not node.children:
            del self._roots[node.digest]
