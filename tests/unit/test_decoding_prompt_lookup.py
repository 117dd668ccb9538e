"""Prompt lookup: the longest earlier occurrence of the end, found as the sequence grows, and what followed it."""

import time

from hypothesis import given
from hypothesis import strategies as st
from speculative_decoding.prompt_lookup import LONGEST_MATCH, NO_MATCH, OCCURRENCES, SHORTEST_MATCH, PromptLookup

SEQUENCES = st.lists(st.integers(0, 2), max_size=40)


def longest_suffix(tokens: list[int]) -> tuple[int, int]:
    """Length and place of the longest match by comparing everything with everything."""
    best, places = (0, 0), 0
    for place in range(len(tokens) - 1, 1, -1):
        length = 0
        while length < min(LONGEST_MATCH, place) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= SHORTEST_MATCH and places < OCCURRENCES:
            places += 1
            best = max(best, (length, place), key=lambda match: match[0])
    return best


@given(SEQUENCES, st.lists(SEQUENCES, max_size=5))
def test_it_finds_the_longest_suffix_that_occurred_before_however_the_sequence_grew(
    prompt: list[int], pieces: list[list[int]]
) -> None:
    tokens = list(prompt)
    lookup = PromptLookup(tokens)
    for piece in pieces:
        tokens += piece
        assert tuple(lookup.find()) == longest_suffix(tokens)
    assert lookup.find() == lookup.find()


@given(SEQUENCES, st.integers(1, 20))
def test_it_proposes_what_followed_and_past_the_end_what_it_proposed(tokens: list[int], count: int) -> None:
    lookup = PromptLookup(list(tokens))
    match = lookup.find()
    if match == NO_MATCH:
        return
    grown = list(tokens)
    for place in range(count):
        grown.append(grown[match.place + place])
    assert lookup.propose(match, count) == grown[len(tokens) :]


def test_a_copy_is_found_within_the_prompt() -> None:
    text = [*range(100, 140), 7, *range(105, 110)]
    lookup = PromptLookup(text)
    assert lookup.propose(lookup.find(), 4) == [110, 111, 112, 113]
    assert PromptLookup([1, 2]).find() == PromptLookup([]).find() == PromptLookup([1, 2, 3, 4]).find() == NO_MATCH


def test_a_step_over_a_long_sequence_takes_no_longer_than_over_a_short_one() -> None:
    """Otherwise 20,000 steps over a growing sequence would take minutes."""
    tokens = [1, 2, 3] * 10
    lookup = PromptLookup(tokens)
    started = time.process_time()
    for step in range(20_000):
        tokens.append(step % 7)
        lookup.find()
    assert time.process_time() - started < 10
