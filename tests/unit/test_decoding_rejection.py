"""Rejection sampling: whatever was drafted, what is committed is distributed as the target's own samples."""

import itertools

import numpy as np
import pytest
from speculative_decoding.acceptance import accept_by_rejection
from speculative_decoding.noise import Stream
from speculative_decoding.options import GenerationOptions
from speculative_decoding.sampling import Distribution, Sampler

VOCABULARY, LENGTH, ROUNDS = 4, 2, 6000
CRITICAL = 103.4  # chi-squared of 63 degrees of freedom at 0.001
RNG = np.random.default_rng(11)


def noise(scale: float) -> np.ndarray:
    return RNG.normal(size=VOCABULARY).astype(np.float32) * scale


# The logits after each possible beginning: a little language model of each role.
TARGET = {before: noise(1.2) for size in range(3) for before in itertools.product(range(VOCABULARY), repeat=size)}
DRAFTS = {
    "near": {before: logits + noise(0.4) for before, logits in TARGET.items()},
    "far": {before: noise(2) for before in TARGET},
    "copy": {before: np.eye(VOCABULARY, dtype=np.float32)[sum(before) % VOCABULARY] * 80 for before in TARGET},
}


def decode(draft: dict[tuple[int, ...], np.ndarray], seed: int) -> tuple[tuple[int, ...], int]:
    """Return three tokens decoded in rounds of at most LENGTH drafted ones, and how many drafts were accepted."""
    options = GenerationOptions(temperature=1.0, seed=seed, acceptance="rejection")
    sampler, committed, accepted = Sampler(options, [0], frozenset()), [], 0
    while len(committed) < 3:
        drafted: list[int] = []
        proposed: list[Distribution] = []
        for _ in range(min(LENGTH, 2 - len(committed))):
            logits = draft[tuple(committed + drafted)]
            proposed.append(sampler.distribution(logits, drafted))
            drafted.append(sampler.choose(logits, drafted, Stream.DRAFT))
        beginning = list(committed)
        new = accept_by_rejection(
            drafted,
            proposed,
            lambda place, beginning=beginning, drafted=drafted: sampler.distribution(
                TARGET[tuple(beginning + drafted[:place])], drafted[:place]
            ),
            sampler.seed,
            sampler.position([]),
        )
        accepted += len(new) - 1
        committed += new
        sampler.commit(new)
    return tuple(committed[:3]), accepted


@pytest.mark.parametrize("name", DRAFTS)
def test_three_tokens_are_distributed_as_the_targets_own(name: str) -> None:
    results = [decode(DRAFTS[name], seed) for seed in range(ROUNDS)]
    counts = dict.fromkeys(itertools.product(range(VOCABULARY), repeat=3), 0)
    for tokens, _ in results:
        counts[tokens] += 1
    statistic = 0.0
    for tokens, count in counts.items():
        mass = 1.0
        for place in range(3):
            weights = np.exp(TARGET[tokens[:place]].astype(np.float64))
            mass *= weights[tokens[place]] / weights.sum()
        statistic += (count - ROUNDS * mass) ** 2 / (ROUNDS * mass)
    assert statistic < CRITICAL
    rate = sum(accepted for _, accepted in results) / ROUNDS
    assert rate > {"near": 1.2, "far": 0.4, "copy": 0.15}[name]
    if name == "near":
        assert rate > sum(decode(DRAFTS["far"], seed)[1] for seed in range(1000)) / 1000


def test_without_a_draft_it_is_plain_sampling() -> None:
    sampler = Sampler(GenerationOptions(temperature=1.0, seed=5), [0], frozenset())
    wanted = sampler.distribution(TARGET[()])
    assert accept_by_rejection([], [], lambda _: wanted, 5, 1) == [sampler.choose(TARGET[()])]
