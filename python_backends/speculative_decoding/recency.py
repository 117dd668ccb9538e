"""Which block has not been used for longest."""

import heapq
from collections.abc import Callable

from speculative_decoding.prefix_tree import Node

SLACK = 1024  # entries out of date that are let be, so that small heaps are not rebuilt all the time


class Recency:
    """Blocks in the order of their last use, of equal ones the deeper first: a block never comes before one after it.

    A block is pushed when it becomes eligible or is used; its older entries are passed over.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Node]] = []
        self._rebuild_at = SLACK

    def push(self, node: Node) -> None:
        """Enter a block at its last use."""
        heapq.heappush(self._heap, (node.used, -node.depth, id(node), node))
        if len(self._heap) > self._rebuild_at:
            latest = {id(entry[3]): entry for entry in self._heap if entry[0] == entry[3].used and entry[3].place}
            self._heap = sorted(latest.values())
            self._rebuild_at = 2 * len(self._heap) + SLACK

    def pop(self, eligible: Callable[[Node], bool]) -> Node | None:
        """Remove and return the least recently used eligible block. Ineligible ones are dropped until pushed again."""
        while self._heap:
            used, _, _, node = heapq.heappop(self._heap)
            if used == node.used and eligible(node):
                return node
        return None
