"""Drafts copied from what a sequence already says: prompt lookup, by the longest suffix that occurred before."""

from typing import NamedTuple

SHORTEST_MATCH = 2
LONGEST_MATCH = 16  # longer ones are not told apart
OCCURRENCES = 8  # of the last tokens, the latest ones, that are compared


class Match(NamedTuple):
    """How many tokens before `place` equal the last ones of the sequence, 0 when none do."""

    length: int
    place: int


NO_MATCH = Match(0, 0)


class PromptLookup:
    """An index over one sequence's tokens, prompt included, that grows as they do. A step takes microseconds."""

    def __init__(self, tokens: list[int]) -> None:
        """`tokens` may grow at its end."""
        self._tokens = tokens
        self._indexed = SHORTEST_MATCH  # tokens whose ending pair is in the index, but for the last
        self._places: dict[tuple[int, int], list[int]] = {}

    def find(self) -> Match:
        """Return the longest match, the latest of equally long ones."""
        tokens = self._tokens
        if len(tokens) <= SHORTEST_MATCH:
            return NO_MATCH
        for place in range(self._indexed, len(tokens)):
            self._places.setdefault((tokens[place - 2], tokens[place - 1]), []).append(place)
        self._indexed = max(self._indexed, len(tokens))
        best = NO_MATCH
        for place in reversed(self._places.get((tokens[-2], tokens[-1]), [])[-OCCURRENCES:]):
            length = self._length(place)
            if length > best.length:
                best = Match(length, place)
        return best

    def propose(self, match: Match, count: int) -> list[int]:
        """Return the `count` tokens after a match; past the end it goes on with what it proposed."""
        known = self._tokens[match.place : match.place + count]
        period = len(known)
        return [known[place % period] for place in range(count)]

    def agreement(self, match: Match, tokens: list[int]) -> int:
        """Return how many of the next `tokens`, which are not in the sequence yet, a match would have proposed."""
        proposed = self.propose(match, len(tokens))
        return next((place for place, token in enumerate(tokens) if proposed[place] != token), len(tokens))

    def _length(self, place: int) -> int:
        tokens, end = self._tokens, len(self._tokens)
        length = SHORTEST_MATCH
        while length < min(LONGEST_MATCH, place) and tokens[place - length - 1] == tokens[end - length - 1]:
            length += 1
        return length
