"""Who leaves the engine before the answer is done: clients that have gone, and those that wait no longer."""

import math

from speculative_decoding.sequence import FinishReason, Sequence


class Departures:
    """Cancellations and deadlines of the sequences in the engine. Not thread-safe."""

    def __init__(self) -> None:
        self._due: list[tuple[Sequence, FinishReason]] = []
        self._timed: set[Sequence] = set()
        self._next_deadline = math.inf

    def watch(self, sequence: Sequence) -> None:
        """Take in a sequence that has been submitted."""
        sequence.submitted = True
        if sequence.cancelled:
            self._due.append((sequence, "cancelled"))
        if sequence.deadline < math.inf:
            self._timed.add(sequence)
            self._next_deadline = min(self._next_deadline, sequence.deadline)

    def cancel(self, sequence: Sequence) -> None:
        """Have a sequence leave, now or as soon as it is submitted."""
        if sequence.submitted and not sequence.cancelled:
            self._due.append((sequence, "cancelled"))
        sequence.cancelled = True

    def any(self, now: float) -> bool:
        """Whether somebody leaves; cheap enough to ask before every step, on any thread."""
        return bool(self._due) or now >= self._next_deadline

    def take(self, now: float) -> list[tuple[Sequence, FinishReason]]:
        """Return who leaves, and why, and think of them no more."""
        due, self._due = self._due, []
        due += [(sequence, "timeout") for sequence in self._timed if sequence.deadline <= now]
        self._next_deadline = min((one.deadline for one in self._timed if one.deadline > now), default=math.inf)
        return due

    def forget(self, sequence: Sequence) -> None:
        """Say that a sequence has ended."""
        self._timed.discard(sequence)

    def clear(self) -> None:
        """Forget everyone."""
        self._due.clear()
        self._timed.clear()
