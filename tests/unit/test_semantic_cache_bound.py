"""The adaptive bound: the promised share of wrong answers holds, and something is served."""

import math

import numpy as np
import pytest
from semantic_cache.bound import FalseHits, exploration_probability, wilson_bounds
from semantic_cache.records import MEMORY, Key, Observation

KEY = Key(b"p", b"e")


def observed(similarity: float, correct: bool) -> Observation:
    return Observation(KEY, similarity, correct, 0.0)


@pytest.mark.parametrize("error_target", [0.02, 0.1])
def test_at_most_the_promised_share_is_served_wrongly(error_target: float) -> None:
    """Entries whose true thresholds differ, asked 150 times each: answers given over all, explored ones right."""
    random = np.random.default_rng(0)
    asked = wrong = served = 0
    for _ in range(15):
        threshold, slope = random.uniform(0.7, 0.9), 60.0
        seen: list[Observation] = []
        for _ in range(150):
            similarity = float(random.uniform(0.6, 1.0))
            correct = bool(random.random() < 1 / (1 + math.exp(-slope * (similarity - threshold))))
            asked += 1
            if random.random() < exploration_probability(seen, similarity, error_target):
                seen.append(observed(similarity, correct))
            else:
                served += 1
                wrong += not correct
    assert wrong / asked <= error_target
    assert served / asked > 0.2


def test_an_entry_of_which_little_is_known_explores() -> None:
    assert exploration_probability([observed(0.9, True)] * 5, 0.99, 0.05) == 1.0


def test_an_entry_that_was_mostly_wrong_explores() -> None:
    assert exploration_probability([observed(0.9, False)] * 20, 0.9, 0.05) > 0.9


def test_more_likeness_and_a_looser_target_explore_less() -> None:
    seen = [observed(0.95, True)] * 30 + [observed(0.7, False)] * 10
    by_likeness = [exploration_probability(seen, similarity, 0.05) for similarity in (0.7, 0.8, 0.9, 0.97)]
    assert by_likeness == sorted(by_likeness, reverse=True) and by_likeness[-1] < 0.5
    assert exploration_probability(seen, 0.9, 0.2) <= exploration_probability(seen, 0.9, 0.05)


def test_bounds_of_a_share() -> None:
    """Wilson's one-sided 95% bounds of 1 in 10, worked out by hand."""
    lower, upper = wilson_bounds(1, 10)
    assert (lower, upper) == (pytest.approx(0.0227, abs=5e-4), pytest.approx(0.3476, abs=5e-4))
    assert wilson_bounds(0, 0) == (0.0, 1.0)


def test_a_partition_is_over_its_budget_only_beyond_doubt_and_recovers() -> None:
    hits = FalseHits(budget=0.05)
    assert not hits.is_over(b"p")
    hits.add(b"p", correct=False)
    assert not hits.is_over(b"q")
    for _ in range(9):
        hits.add(b"p", correct=False)
    assert hits.is_over(b"p")
    for _ in range(6 * int(MEMORY)):
        hits.add(b"p", correct=True)
    assert not hits.is_over(b"p")
    assert hits.bounds()[b"p"] < 0.05
