"""What is done to logits before a choice, token by token: bias, penalties, and no end of an answer too early."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from speculative_decoding.options import GenerationOptions

GROWTH = 256
SEEN, END = 1 << 31, 1 << 30  # flags of an entry; bit i below them: the token is the drafted one number i
# A token, how often the answer has it, and its bias. What a GPU reads (kernels.cu has both, field by field).
ENTRY = np.dtype([("token", np.int32), ("times", np.int32), ("flags", np.uint32), ("bias", np.float32)])
# One position's entries, how many drafted tokens are before it, whether the answer may not end there, and penalties.
PLACE = np.dtype(
    [
        ("begin", np.int32),
        ("end", np.int32),
        ("drafted", np.int32),
        ("is_early", np.int32),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
    ]
)


class Adjustments(NamedTuple):
    """Entries ENTRY, and places PLACE of any shape, each of which says which entries are its own."""

    entries: NDArray[np.void]
    places: NDArray[np.void]

    @classmethod
    def together(cls, rows: Sequence["Adjustments | None"], width: int) -> "Adjustments":
        """Return all of them with places [rows, width], those that a row lacks without entries."""
        places, entries, begin = np.zeros((len(rows), width), PLACE), [np.zeros(0, ENTRY)], 0
        for row, one in enumerate(rows):
            if one is not None:
                places[row, : len(one.places)] = one.places
                places["begin"][row, : len(one.places)] += begin
                places["end"][row, : len(one.places)] += begin
                entries.append(one.entries)
                begin += len(one.entries)
        return cls(np.concatenate(entries), places)


class Adjuster:
    """The tokens of one sequence whose logits are adjusted, in arrays ready for arithmetic. None of them is twice."""

    def __init__(self, options: GenerationOptions, prompt: list[int], ends: frozenset[int]) -> None:
        """Penalties are for what `prompt` has, bias for what the options name, and `ends` for answers too short."""
        self._penalties = options.repetition_penalty, options.frequency_penalty, options.presence_penalty
        self._has_penalties = options.has_penalties
        biases = dict(options.logit_bias)
        suppressed = ends if options.min_tokens else frozenset[int]()
        seen = set(prompt) if options.has_penalties else set[int]()
        distinct = sorted(seen | suppressed | biases.keys())
        self._size = len(distinct)
        self._at = {token: at for at, token in enumerate(distinct)}
        self._entries = np.zeros(self._size + GROWTH, ENTRY)
        known = self._entries[: self._size]
        known["token"] = distinct
        known["flags"] = [SEEN * (token in seen) | END * (token in suppressed) for token in distinct]
        known["bias"] = [biases.get(token, 0.0) for token in distinct]

    def add(self, token: int) -> None:
        """Count one more token of the answer."""
        if not self._has_penalties:
            return
        at = self._at.setdefault(token, self._size)
        if at == self._size:
            if at == len(self._entries):
                self._entries = np.concatenate([self._entries, np.zeros(GROWTH, ENTRY)])
            self._entries["token"][at] = token
            self._size += 1
        self._entries["flags"][at] |= SEEN
        self._entries["times"][at] += 1

    def entries(self, ahead: Sequence[int] = (), drafted: Sequence[int] = ()) -> NDArray[np.void]:
        """Return what there is as ENTRY [tokens], as if `ahead` had been added.

        Tokens drafted, MAX_SPECULATION_LENGTH at most, count from the place after each on.
        """
        entries = self._entries[: self._size]
        if not (self._has_penalties and (ahead or drafted)):
            return entries
        new = [token for token in dict.fromkeys((*ahead, *drafted)) if token not in self._at]
        if new:
            entries = np.concatenate([entries, np.zeros(len(new), ENTRY)])
            entries["token"][self._size :] = new
        else:
            entries = entries.copy()
        at = {token: self._size + place for place, token in enumerate(new)}
        flags, times = entries["flags"], entries["times"]
        for token in ahead:
            place = at[token] if token in at else self._at[token]
            flags[place] |= SEEN
            times[place] += 1
        for number, token in enumerate(drafted):
            flags[at[token] if token in at else self._at[token]] |= 1 << number
        return entries

    def places(self, entries: int, count: int, early: int) -> NDArray[np.void]:
        """Return PLACE [count], of a next position and those after it; the first `early` may not end the answer."""
        return np.array([(0, entries, drafted, drafted < early, *self._penalties) for drafted in range(count)], PLACE)


def adjust(logits: NDArray[np.float32], entries: NDArray[np.void], place: np.void) -> None:
    """Change the logits [vocabulary] of one place; tokens beyond them are left out: a draft may have fewer.

    All is float32, but for what the frequency takes off. kernels.cu does the same, to the last bit.
    """
    _, _, drafted, is_early, *penalties = place.item()
    own = entries[place["begin"] : place["end"]]
    tokens, flags = own["token"], own["flags"]
    if tokens.max(initial=0) >= len(logits):
        own = own[tokens < len(logits)]
        tokens, flags = own["token"], own["flags"]
    values = logits[tokens] + own["bias"]
    if is_early:
        values[flags & np.uint32(END) != 0] = -np.inf
    if penalties != [1, 0, 0]:
        ahead = _times_drafted(flags, drafted)
        seen = (flags >= SEEN) | (ahead > 0)
        values = np.where(seen, _penalized(values, own["times"] + ahead, place), values)
    logits[tokens] = values


def _times_drafted(flags: NDArray[np.uint32], drafted: int) -> NDArray[np.int32]:
    """Return how often each token is among the first `drafted` drafted ones."""
    times = np.zeros(len(flags), np.int32)
    for number in range(drafted):
        times += (flags >> np.uint32(number) & np.uint32(1)).astype(np.int32)
    return times


def _penalized(values: NDArray[np.float32], times: NDArray[np.int32], place: np.void) -> NDArray[np.float32]:
    """Return the logits of tokens that have been seen, and so many times in the answer."""
    factor = place["repetition"]
    penalized: NDArray[np.float32] = np.where(values > 0, values / factor, values * factor)
    penalized -= place["frequency"] * times
    penalized -= place["presence"] * (times > 0)
    return penalized
