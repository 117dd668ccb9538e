"""Who waits, who is being prefilled, who decodes, and in which slot."""

from collections import deque

from speculative_decoding.sequence import Sequence


class QueueFullError(Exception):
    """No more requests can wait."""


class Scheduler:
    """First come, first served. Decoding sequences have slots 0 to n - 1 and the one being prefilled has slot n.

    Contiguous slots let one call serve all decoding sequences without gathering them.
    """

    def __init__(self, slots: int, max_waiting: int) -> None:
        self._slots = slots
        self._max_waiting = max_waiting
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prefilling: Sequence | None = None

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait. Raises QueueFullError."""
        if len(self.waiting) >= self._max_waiting:
            raise QueueFullError(f"{self._max_waiting} requests are waiting already; try again later")
        self.waiting.append(sequence)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.running or self.prefilling)

    def next_prefill(self) -> Sequence | None:
        """Return the sequence to prefill now, the next in line when a slot is free."""
        if self.prefilling is None and self.waiting and len(self.running) < self._slots:
            self.prefilling = self.waiting.popleft()
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
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return []
        slot, last = self.running.index(sequence), len(self.running) - 1
        self.running[slot] = self.running[last]
        self.running.pop()
        moves = [(last, slot)] if slot != last else []
        return [*moves, (last + 1, last)] if self.prefilling else moves

    def everyone(self) -> list[Sequence]:
        """Return every sequence, wherever it is."""
        return [*self.running, *([self.prefilling] if self.prefilling else []), *self.waiting]

    def clear(self) -> list[Sequence]:
        """Forget every sequence, and return them."""
        everyone = self.everyone()
        self.running, self.prefilling = [], None
        self.waiting.clear()
        return everyone
