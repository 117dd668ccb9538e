"""Who waits, who is being prefilled, who decodes, and in which slot."""

from collections import deque
from collections.abc import Callable

from speculative_decoding.sequence import Sequence


class QueueFullError(Exception):
    """No more requests can wait."""


class Scheduler:
    """First come, first served within a priority level, lower levels before higher ones.

    Decoding sequences have slots 0 to n - 1 and the one being prefilled has slot n: contiguous slots let one call serve
    all decoding sequences without gathering them. A sequence is let in when a slot is free and, with all others in
    slots, it cannot grow beyond `capacity`.
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
        self.prefilling: Sequence | None = None

    def add(self, *sequences: Sequence) -> None:
        """Let sequences wait, all or none. Raises QueueFullError."""
        free = self._slots - len(self.running) - bool(self.prefilling)
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

    def next_prefill(self) -> Sequence | None:
        """Return the sequence to prefill now, the next in line when there is room for it."""
        if self.prefilling is None and len(self.running) < self._slots:
            level = min((number for number, level in self._levels.items() if level), default=None)
            if level is not None and self._fits(self._levels[level][0]):
                self.prefilling = self._levels[level].popleft()
        return self.prefilling

    def start_decoding(self) -> None:
        """Say that the sequence being prefilled is done with it."""
        assert self.prefilling is not None
        self.running.append(self.prefilling)
        self.prefilling = None

    def remove(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Forget a sequence wherever it is, and return the slot moves (from, to), in order, that close the gap."""
        if sequence is self.prefilling:
            self.prefilling = None
            return []
        if sequence not in self.running:
            self._levels[sequence.options.priority].remove(sequence)
            return []
        slot, last = self.running.index(sequence), len(self.running) - 1
        self.running[slot] = self.running[last]
        self.running.pop()
        moves = [(last, slot)] if slot != last else []
        return [*moves, (last + 1, last)] if self.prefilling else moves

    def in_slots(self) -> list[Sequence]:
        """Return every sequence that has a slot, in order of slots."""
        return [*self.running, *([self.prefilling] if self.prefilling else [])]

    def everyone(self) -> list[Sequence]:
        """Return every sequence, wherever it is."""
        waiting = [sequence for _, level in sorted(self._levels.items()) for sequence in level]
        return [*self.in_slots(), *waiting]

    def clear(self) -> list[Sequence]:
        """Forget every sequence, and return them."""
        everyone = self.everyone()
        self.running, self.prefilling = [], None
        self._levels.clear()
        return everyone

    def _fits(self, sequence: Sequence) -> bool:
        if self._capacity is None:
            return True
        return self._size(sequence) + sum(self._size(other) for other in self.running) <= self._capacity
