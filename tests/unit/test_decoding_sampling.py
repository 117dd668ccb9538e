"""Sampler and noise: choices distributed as they should be, the same whoever asks, for draft and target."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from speculative_decoding.adjustments import adjust
from speculative_decoding.logprobs import token_logprobs
from speculative_decoding.noise import MAX_GUMBEL, Stream, gumbel, key_of, keys_of, uniform
from speculative_decoding.options import GenerationOptions
from speculative_decoding.sampling import Filters, Sampler, choose, wishes_of

VOCABULARY = 24
ENDS = frozenset({3, 5})
DRAWS = 4000
CRITICAL = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 23: 49.73}  # chi-squared at 0.001

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=VOCABULARY, max_size=VOCABULARY)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)
OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 0.8, 1.5]),
        "top_p": st.sampled_from([0.1, 0.5, 0.95, 1.0]),
        "top_k": st.sampled_from([0, 1, 3, 10, 50]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "min_tokens": st.sampled_from([0, 3]),
        "logit_bias": st.sampled_from([{}, {"2": 5.0, "7": -100}]),
    }
)


def sampler(prompt: list[int], **options: Any) -> Sampler:
    return Sampler(GenerationOptions.parse({"seed": 1, "max_tokens": 99, **options}, VOCABULARY), prompt, ENDS)


def logits_of(values: list[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def expected(values: list[float], options: GenerationOptions, prompt: list[int], answer: list[int]) -> dict[int, float]:
    """The filtered distribution, written down the slow way."""
    logits = [float(value) for value in values]
    for token, bias in options.logit_bias:
        logits[token] += bias
    if len(answer) < options.min_tokens:
        for token in ENDS:
            logits[token] = -np.inf
    for token in {*prompt, *answer}:
        factor = options.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        logits[token] -= options.frequency_penalty * answer.count(token)
        logits[token] -= options.presence_penalty * (token in answer)
    if not options.temperature:
        return {int(np.argmax(logits)): 1.0}
    ranked = sorted(range(len(logits)), key=lambda token: (-np.float32(logits[token]), token))
    if options.top_k:
        ranked = ranked[: options.top_k]
    weights = {token: np.exp((logits[token] - logits[ranked[0]]) / options.temperature) for token in ranked}
    weights = {token: weight for token, weight in weights.items() if weight >= options.min_p}
    kept, total, mass = {}, sum(weights.values()), 0.0
    for token, weight in weights.items():
        if mass < options.top_p * total or not kept:
            kept[token] = weight
        mass += weight
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@given(LOGITS, OPTIONS, TOKENS, TOKENS)
def test_the_filters_are_the_documented_ones(
    values: list[float], options: dict[str, Any], prompt: list[int], answer: list[int]
) -> None:
    made = sampler(prompt, **options)
    made.commit(answer)
    given_ = made.distribution(logits_of(values))
    wanted = expected(values, GenerationOptions.parse(options, VOCABULARY), prompt, answer)
    assert given_.probabilities.sum() == pytest.approx(1)
    for token in range(VOCABULARY):  # a token on the brink of a filter may fall on either side by rounding
        brink = len(wanted) != np.count_nonzero(given_.probabilities > 1e-12)
        assert given_.of(token) == pytest.approx(wanted.get(token, 0.0), abs=0.6 if brink else 2e-4)


@given(LOGITS, OPTIONS, TOKENS, TOKENS, TOKENS)
def test_tokens_ahead_count_as_if_they_were_committed(
    values: list[float], options: dict[str, Any], prompt: list[int], answer: list[int], ahead: list[int]
) -> None:
    before, after = sampler(prompt, **options), sampler(prompt, **options)
    before.commit(answer)
    after.commit(answer + ahead)
    logits = logits_of(values)
    assert before.choose(logits, ahead) == after.choose(logits)
    assert before.choose(logits, ahead) == after.choose(logits), "asking changes nothing"
    assert before.position(ahead) == after.position([])


@given(LOGITS, OPTIONS, TOKENS, TOKENS, st.lists(st.integers(0, VOCABULARY - 1), max_size=16))
def test_what_is_done_to_all_places_at_once_is_what_is_done_to_each(
    values: list[float], options: dict[str, Any], prompt: list[int], answer: list[int], drafted: list[int]
) -> None:
    made = sampler(prompt, **options)
    made.commit(answer)
    entries, places = made.adjustments(drafted)
    for count, place in enumerate(places):
        logits = logits_of(values)
        adjust(logits, entries, place)
        assert np.array_equal(logits, made._adjusted(logits_of(values), drafted[:count]))


@given(LOGITS, OPTIONS, TOKENS)
def test_a_row_within_others_gives_the_choice_of_the_row_alone(
    values: list[float], options: dict[str, Any], prompt: list[int]
) -> None:
    made = sampler(prompt, **options)
    many = np.random.default_rng(0).normal(size=(3, 5, VOCABULARY)).astype(np.float32)
    many[1, 2] = values
    assert made.choose(many[1, 2]) == made.choose(logits_of(values))


@given(LOGITS, OPTIONS, st.integers(0, 2**63 - 1))
def test_what_is_chosen_is_possible(values: list[float], options: dict[str, Any], seed: int) -> None:
    made = sampler([1], **{**options, "seed": seed})
    assert made.distribution(logits_of(values)).of(made.choose(logits_of(values))) > 0


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 4}, {"min_p": 0.1}], ids=str)
def test_choices_over_many_positions_are_distributed_as_the_filters_say(options: dict[str, float]) -> None:
    logits = np.random.default_rng(3).normal(size=8).astype(np.float32) * 0.6
    made = sampler([1], temperature=0.8, **options)
    wanted = made.distribution(logits)
    counts = np.zeros(8)
    for _ in range(DRAWS):
        counts[made.choose(logits)] += 1
        made.commit([0])
    mass = np.zeros(8)
    mass[wanted.tokens] = wanted.probabilities
    assert counts[mass == 0].sum() == 0
    likely = mass > 0
    statistic = ((counts[likely] - DRAWS * mass[likely]) ** 2 / (DRAWS * mass[likely])).sum()
    assert statistic < CRITICAL[int(likely.sum()) - 1]


def test_the_noise_is_gumbels_and_differs_by_seed_position_token_and_purpose() -> None:
    tokens = np.arange(20_000)
    choice = Stream.CHOICE
    noise = gumbel(key_of(7, 3, choice), tokens)
    assert noise.mean() == pytest.approx(0.5772, abs=0.03) and noise.std() == pytest.approx(np.pi / 6**0.5, abs=0.03)
    assert noise.max() <= MAX_GUMBEL and len(np.unique(noise)) > 19_990
    others = [gumbel(key_of(*of), tokens) for of in ((8, 3, choice), (7, 4, choice), (7, 3, Stream.DRAFT))]
    for other in [*others, gumbel(key_of(7, 3, choice), tokens + 1)]:
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.03
    assert np.array_equal(gumbel(key_of(7, 3, choice), tokens[5:9]), noise[5:9])
    numbers = [uniform(key_of(7, position, Stream.ACCEPT)) for position in range(5000)]
    assert np.mean(numbers) == pytest.approx(0.5, abs=0.02) and 0 < min(numbers) < max(numbers) < 1


def test_the_keys_of_many_positions_are_those_of_each() -> None:
    for seed in (0, 7, 2**63 - 1):
        expected = [key_of(seed, position, Stream.DRAFT) for position in range(90, 120)]
        assert keys_of([seed], np.arange(90, 120)[None], Stream.DRAFT).tolist() == [expected]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 5}, {"temperature": 1.2, "min_p": 0.1}])
def test_wishes_are_choices_that_do_not_depend_on_the_tokens_before(options: dict[str, float]) -> None:
    made = Sampler(GenerationOptions(seed=5, **options), [1, 2], ENDS)
    [wishes] = wishes_of([made], 3)
    assert not made.looks_back
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    for place in range(3):
        key, temperature, top_p, least, top_k = wishes[place].item()
        assert choose(logits[place], Filters(temperature, top_k, top_p, least), key) == made.choose(
            logits[place], [7] * place
        )


def test_bias_penalties_and_a_least_length_look_back_and_filters_do_not() -> None:
    for options in ({"repetition_penalty": 1.1}, {"logit_bias": ((3, 1.0),)}, {"min_tokens": 2}):
        assert Sampler(GenerationOptions(**options), [1], ENDS).looks_back
    begun = Sampler(GenerationOptions(min_tokens=2), [1], ENDS)
    begun.commit([4, 4])
    assert not begun.looks_back


def test_without_a_seed_one_is_drawn() -> None:
    options = GenerationOptions(temperature=1.0)
    assert len({Sampler(options, [1], ENDS).seed for _ in range(5)}) == 5


def test_a_draft_of_fewer_logits_is_filtered_alike() -> None:
    made = sampler([1, 20], temperature=1, repetition_penalty=1.5, logit_bias={"21": 3}, min_tokens=2)
    assert 0 <= made.choose(np.zeros(10, np.float32)) < 10


@given(LOGITS, st.integers(0, VOCABULARY - 1), st.integers(0, 5))
def test_logprobs_are_those_of_the_model_with_the_likeliest_in_order(
    values: list[float], chosen: int, count: int
) -> None:
    logits = logits_of(values)
    log = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    described = token_logprobs(logits, chosen, count)
    assert described[0].token == chosen and described[0].rank == 1 + int((log > log[chosen]).sum())
    assert all(one.logprob == pytest.approx(log[one.token], abs=1e-9) for one in described)
    others = [one.logprob for one in described[1:]]
    assert others == sorted(others, reverse=True)
    best = np.sort(log)[::-1][:count]
    assert len({one.token for one in described}) == len(described) >= count
    assert all(one.logprob >= best[-1] - 1e-12 for one in described[1:])
