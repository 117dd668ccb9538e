"""What drafting and verifying cost on this machine: measured when a model is loaded, kept fresh by every round."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from speculative_decoding.options import MAX_SPECULATION_LENGTH

OWN_WEIGHT = 0.15  # of a new observation, for its cell of the table
SHARED_WEIGHT = 0.03  # and for all others: the machine as a whole became slower or faster
LARGEST_CHANGE = 2.0  # an observation further off than this is an accident

Seconds = NDArray[np.float64]


class CostTable:
    """Seconds of a call by rows and length: [rows, MAX_SPECULATION_LENGTH + 1], rows counted from 1."""

    def __init__(self, seconds: Seconds) -> None:
        self._seconds = seconds

    @classmethod
    def interpolate(cls, slots: int, measured: dict[tuple[int, int], float]) -> "CostTable":
        """Fill a table from seconds measured at some (rows, length), with straight lines between and beyond them."""
        lengths = np.arange(MAX_SPECULATION_LENGTH + 1)
        rows = sorted({row for row, _ in measured})
        lines = []
        for row in rows:
            known = sorted((length, seconds) for (at, length), seconds in measured.items() if at == row)
            lines.append(_line(lengths, *zip(*known, strict=True)))
        table = np.array(lines)
        every = np.arange(1, slots + 1)
        return cls(np.stack([_line(every, tuple(rows), tuple(column)) for column in table.T], axis=1))

    def row(self, rows: int) -> Seconds:
        """Return the seconds for so many rows, by length."""
        line: Seconds = self._seconds[rows - 1]
        return line

    def observe(self, rows: int, length: int, seconds: float) -> None:
        """Take in what a call took."""
        expected = self._seconds[rows - 1, length]
        if expected <= 0:
            return
        ratio = clipped(seconds / expected)
        self._seconds *= ratio**SHARED_WEIGHT
        self._seconds[rows - 1, length] *= ratio ** (OWN_WEIGHT - SHARED_WEIGHT)


class PrefillCost:
    """Seconds of feeding a chunk of a prompt: so many for the call, so many for each token."""

    def __init__(self, call_s: float, token_s: float) -> None:
        self._call_s = call_s
        self._token_s = token_s

    @classmethod
    def through(cls, one: tuple[int, float], other: tuple[int, float]) -> "PrefillCost":
        """Return the line through two measured (tokens, seconds), the second of more tokens."""
        token_s = max((other[1] - one[1]) / (other[0] - one[0]), other[1] / other[0] / LARGEST_CHANGE)
        return cls(max(0.0, one[1] - one[0] * token_s), token_s)

    def seconds(self, tokens: int) -> float:
        """Return what a chunk of so many tokens costs."""
        return self._call_s + self._token_s * tokens

    def tokens(self, seconds: float, along: bool = False) -> int:
        """Return how many tokens a chunk of so many seconds has, none when the call alone takes longer.

        along: it is taken along by a call that is made anyway.
        """
        return max(0, int((seconds - (0.0 if along else self._call_s)) / self._token_s))

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in what a chunk took."""
        change = clipped(seconds / self.seconds(tokens)) ** OWN_WEIGHT
        self._call_s *= change
        self._token_s *= change


class StepCosts(NamedTuple):
    """What the calls of one pair of models cost."""

    draft: CostTable
    verify: CostTable
    prefill: PrefillCost


def clipped(ratio: float) -> float:
    """Return how far an observation is off, but no further than is believed."""
    return min(max(ratio, 1 / LARGEST_CHANGE), LARGEST_CHANGE)


def _line(at: NDArray[np.int64], known: tuple[int, ...], seconds: tuple[float, ...]) -> Seconds:
    """Return seconds `at` these places; beyond the last known one the line goes on as between the last two."""
    line: Seconds = np.interp(at, known, seconds)
    if len(known) > 1:
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (known[-1] - known[-2]))
        line += np.maximum(0, at - known[-1]) * slope
    return line
