"""Which blocks are kept for whom, and until when."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

PINNED_SHARE = 0.5  # of a cache at most: open sessions must not keep all others' prefixes out


class Pinned(Protocol):
    """A block; `pins`: how many keep it."""

    pins: int


Block = TypeVar("Block", bound=Pinned)


@dataclass(frozen=True)
class _Pin(Generic[Block]):
    nodes: tuple[Block, ...]
    until: float


class Pins(Generic[Block]):
    """Keeps blocks for their owners, at most `limit` blocks in all. Not thread-safe."""

    def __init__(self, limit: int, unpinned: Callable[[Block], None]) -> None:
        """`unpinned` is called with each block that nobody pins any more."""
        self._limit = limit
        self._unpinned = unpinned
        self._pins: dict[Hashable, _Pin[Block]] = {}
        self._next_expiry = math.inf
        self.blocks = 0  # however many pin them

    def put(self, owner: Hashable, path: Sequence[Block], until: float) -> int:
        """Pin the first blocks of a path, as many as may be, in place of what `owner` has; return how many."""
        before = self._pins.pop(owner, None)
        nodes = tuple(path[: self._affordable(path)])
        for node in nodes:
            self.blocks += not node.pins
            node.pins += 1
        if before:
            self._let_go(before)
        if nodes:
            self._pins[owner] = _Pin(nodes, until)
            self._next_expiry = min(self._next_expiry, until)
        return len(nodes)

    def remove(self, owner: Hashable) -> None:
        """Let go what `owner` has, if anything."""
        if pin := self._pins.pop(owner, None):
            self._let_go(pin)

    def expire(self, now: float) -> None:
        """Let go what was pinned until `now` or before."""
        if now < self._next_expiry:
            return
        for owner in [owner for owner, pin in self._pins.items() if pin.until <= now]:
            self.remove(owner)
        self._next_expiry = min((pin.until for pin in self._pins.values()), default=math.inf)

    def held(self) -> list[tuple[Block, ...]]:
        """Return the blocks of each owner."""
        return [pin.nodes for pin in self._pins.values()]

    def _affordable(self, path: Sequence[Block]) -> int:
        room = self._limit - self.blocks
        for number, node in enumerate(path):
            room -= not node.pins
            if room < 0:
                return number
        return len(path)

    def _let_go(self, pin: _Pin[Block]) -> None:
        for node in pin.nodes:
            node.pins -= 1
            if not node.pins:
                self.blocks -= 1
                self._unpinned(node)
