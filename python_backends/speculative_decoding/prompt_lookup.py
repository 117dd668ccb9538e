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
    """An index over one sequence's tokens, prompt included, that grows as they do. A step takes microseconds.

    It holds nothing but integers, which Python's garbage collector has no work with.
    """

    def __init__(self, tokens: list[int]) -> None:
        """`tokens` may grow at its end."""
        self._tokens = tokens
        self._latest: dict[int, int] = {}  # by pair of tokens, the place after it
        self._earlier = [0] * SHORTEST_MATCH  # by place, that after the same pair before, 0 for none

    def find(self) -> Match:
        """Return the longest match, the latest of equally long ones."""
        tokens = self._tokens
        if len(tokens) <= SHORTEST_MATCH:
            return NO_MATCH
        for place in range(len(self._earlier), len(tokens)):
            pair = _pair(tokens[place - 2], tokens[place - 1])
            self._earlier.append(self._latest.get(pair, 0))
            self._latest[pair] = place
        longest, best, end = 0, 0, len(tokens)
        place = self._latest.get(_pair(tokens[-2], tokens[-1]), 0)
        for _ in range(OCCURRENCES):
            if not place or longest == LONGEST_MATCH:
                break
            if place > longest and tokens[place - longest - 1] == tokens[end - longest - 1]:  # else it is no longer
                length = self._length(place)
                if length > longest:
                    longest, best = length, place
            place = self._earlier[place]
        return Match(longest, best)

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


def _pair(first: int, second: int) -> int:
    return first << 32 | second
