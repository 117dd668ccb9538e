"""Which tokens a sequence has, and how often its answer has them: what penalties look at."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GROWTH = 256


class TokenCounts:
    """The distinct tokens of a prompt and its answer, with the answer's counts, in arrays ready for arithmetic."""

    def __init__(self, prompt: list[int]) -> None:
        distinct = list(dict.fromkeys(prompt))
        self._size = len(distinct)
        self._places = {token: place for place, token in enumerate(distinct)}
        self._tokens = np.zeros(self._size + GROWTH, np.int64)
        self._tokens[: self._size] = distinct
        self._counts = np.zeros(self._size + GROWTH, np.int32)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The distinct tokens so far."""
        return self._tokens[: self._size]

    @property
    def counts(self) -> NDArray[np.int32]:
        """How often the answer has each of `tokens`."""
        return self._counts[: self._size]

    def add(self, token: int) -> None:
        """Count one more token of the answer."""
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = self._size
            if place == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, np.zeros(GROWTH, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(GROWTH, np.int32)])
            self._tokens[place] = token
            self._size += 1
        self._counts[place] += 1

    def looking_ahead(self, ahead: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return `tokens` and `counts` as they would be after adding the tokens `ahead`."""
        if not ahead:
            return self.tokens, self.counts
        new = [token for token in dict.fromkeys(ahead) if token not in self._places]
        tokens = np.concatenate([self.tokens, np.array(new, np.int64)])
        counts = np.concatenate([self.counts, np.zeros(len(new), np.int32)])
        places = {token: self._size + place for place, token in enumerate(new)}
        for token in ahead:
            counts[places[token] if token in places else self._places[token]] += 1
        return tokens, counts
