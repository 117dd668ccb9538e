"""Who waits, who is being prefilled, who decodes, and in which slot."""

from collections import deque
from collections.abc import Callable

from speculative_decoding.sequence import Sequence


class QueueFullError(Exception):
    """No more requests can wait."""


class Scheduler:
    """First come, first served within a priority level, lower levels before higher ones.

    Decoding sequences have slots 0 to n - 1 and those being prefilled the next ones, in the order in which they came:
    contiguous slots let one call serve all decoding sequences without gathering them. A sequence is let in when a slot
    is free and, with all others in slots, it cannot grow beyond `capacity`.
    """

    def __init__(
        self, slots: int, max_waiting: int, capacity: int | None = None, size: Callable[[Sequence], int] = lambda _: 0
    ) -> None:
        """`size` is how much of `capacity` (None: there is enough) a sequence can come to need."""
        self._slots = slots
        self._max_waiting = max_waiting
        self._capacity = capacity
        self._size = size
        self._levels: dict[int, deque[Sequence]] = {}
        self.running: list[Sequence] = []
        self.prefilling: list[Sequence] = []

    def add(self, *sequences: Sequence) -> None:
        """Let sequences wait, all or none. Raises QueueFullError."""
        free = self._slots - len(self.in_slots())
        if self.waiting + len(sequences) - free > self._max_waiting:
            raise QueueFullError(f"{self._max_waiting} requests are waiting already; try again later")
        for sequence in sequences:
            self._levels.setdefault(sequence.options.priority, deque()).append(sequence)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(len(level) for level in self._levels.values())

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.running or self.prefilling or self.waiting)

    def next_prefills(self, most: int) -> list[Sequence]:
        """Return the sequences to prefill now, so many at most: those begun, and the next in line that have room."""
        while len(self.prefilling) < most and len(self.in_slots()) < self._slots:
            level = min((number for number, level in self._levels.items() if level), default=None)
            if level is None or not self._fits(self._levels[level][0]):
                break
            self.prefilling.append(self._levels[level].popleft())
        return self.prefilling[:most]

    def start_decoding(self, count: int) -> None:
        """Say that the first so many of those being prefilled are done with it."""
        assert count <= len(self.prefilling)
        self.running += self.prefilling[:count]
        del self.prefilling[:count]

    def remove(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Forget a sequence wherever it is, and return the slot moves (from, to), in order, that close the gap."""
        if sequence in self.prefilling:
            gap = self.in_slots().index(sequence)
            self.prefilling.remove(sequence)
            return self._closing(gap)
        if sequence not in self.running:
            self._levels[sequence.options.priority].remove(sequence)
            return []
        slot, last = self.running.index(sequence), len(self.running) - 1
        self.running[slot] = self.running[last]
        self.running.pop()
        return [*([(last, slot)] if slot != last else []), *self._closing(last)]

    def in_slots(self) -> list[Sequence]:
        """Return every sequence that has a slot, in order of slots."""
        return [*self.running, *self.prefilling]

    def _closing(self, gap: int) -> list[tuple[int, int]]:
        """Return the moves of those being prefilled after an empty slot."""
        return [(slot + 1, slot) for slot in range(gap, len(self.in_slots()))]

    def everyone(self) -> list[Sequence]:
        """Return every sequence, wherever it is."""
        waiting = [sequence for _, level in sorted(self._levels.items()) for sequence in level]
        return [*self.in_slots(), *waiting]

    def clear(self) -> list[Sequence]:
        """Forget every sequence, and return them."""
        everyone = self.everyone()
        self.running, self.prefilling = [], []
        self._levels.clear()
        return everyone

    def _fits(self, sequence: Sequence) -> bool:
        if self._capacity is None:
            return True
        return self._size(sequence) + sum(self._size(other) for other in self.in_slots()) <= self._capacity
