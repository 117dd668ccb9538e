"""The speculation length: the lengths of the greatest goodput, and costs that follow what is measured."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from speculative_decoding.acceptance_rate import AcceptanceRate
from speculative_decoding.options import MAX_SPECULATION_LENGTH
from speculative_decoding.speculation_length import MAX_RATE, STEPS, expected_tokens, goodputs_alone, plan_lengths
from speculative_decoding.step_costs import CostTable, PrefillCost

Row = tuple[float, int, bool]  # acceptance rate, longest draft, by the model

LENGTHS = np.arange(MAX_SPECULATION_LENGTH + 1)
ROWS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.booleans()), min_size=1, max_size=4)


@st.composite
def costs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of drafting and of verifying by length: both grow."""
    growth = st.lists(st.floats(0.01, 2), min_size=MAX_SPECULATION_LENGTH, max_size=MAX_SPECULATION_LENGTH)
    draft, verify = np.cumsum([0.0, *draw(growth)]), np.cumsum([draw(st.floats(0.1, 5)), *draw(growth)])
    return draft, verify


def goodput(rows: list[Row], lengths: tuple[int, ...], draft: np.ndarray, verify: np.ndarray) -> float:
    rates = [min(int(rate * STEPS + 0.5) / STEPS, MAX_RATE) for rate, _, _ in rows]
    tokens = sum(expected_tokens(rate, length) for rate, length in zip(rates, lengths, strict=True))
    drafted = max((length for length, row in zip(lengths, rows, strict=True) if row[2]), default=0)
    return tokens / float(draft[drafted] + verify[max(lengths)])


@given(ROWS, costs())
def test_no_other_lengths_give_more_tokens_per_second(rows: list[Row], seconds: tuple[np.ndarray, np.ndarray]) -> None:
    rates, most, by_model = map(list, zip(*rows, strict=True))
    plan = plan_lengths(rates, most, by_model, *seconds)
    lengths = tuple(plan.lengths.tolist())
    assert all(0 <= length <= limit for length, limit in zip(lengths, most, strict=True))
    best = max(goodput(rows, other, *seconds) for other in itertools.product(*(range(limit + 1) for limit in most)))
    assert goodput(rows, lengths, *seconds) == pytest.approx(best)


@given(ROWS, costs(), st.floats(0.01, 100))
def test_a_machine_that_is_slower_altogether_changes_nothing(
    rows: list[Row], seconds: tuple[np.ndarray, np.ndarray], factor: float
) -> None:
    rates, most, by_model = map(list, zip(*rows, strict=True))
    plan = plan_lengths(rates, most, by_model, *seconds)
    slower = plan_lengths(rates, most, by_model, seconds[0] * factor, seconds[1] * factor)
    assert goodput(rows, tuple(plan.lengths), *seconds) == pytest.approx(goodput(rows, tuple(slower.lengths), *seconds))


def test_a_verify_that_costs_nothing_more_is_used_and_one_that_costs_a_step_per_token_is_not() -> None:
    free, dear = np.ones(17), np.arange(1.0, 18)
    assert plan_lengths([0.8], [8], [True], LENGTHS * 0.01, free).lengths.tolist() == [8]
    assert plan_lengths([0.8], [8], [True], LENGTHS * 0.01, dear).lengths.tolist() == [0]
    assert plan_lengths([0.8], [8], [True], LENGTHS * 1.0, free).lengths.tolist() == [0]
    assert plan_lengths([0.8], [8], [False], LENGTHS * 1.0, free).lengths.tolist() == [8]
    assert plan_lengths([0.0, 0.0], [8, 8], [True, False], LENGTHS * 0.01, dear).lengths.tolist() == [0, 0]


def test_a_probe_drafts_even_where_it_does_not_pay() -> None:
    dear = np.arange(1.0, 18)
    assert plan_lengths([0.5, 0.5], [8, 0], [True, True], LENGTHS * 1.0, dear, probe=True).lengths.tolist() == [1, 0]
    assert plan_lengths([0.5], [0], [True], LENGTHS * 1.0, dear, probe=True).lengths.tolist() == [0]


def test_rows_that_are_not_drafted_for_make_the_others_draft_less() -> None:
    draft, verify = LENGTHS * 0.1, 1 + LENGTHS * 0.4
    alone = plan_lengths([0.8], [8], [True], draft, verify)
    beside = plan_lengths([0.8], [8], [True], draft, verify, idle=7)
    assert alone.lengths[0] > beside.lengths[0]


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), max_size=40), st.floats(0, 1))
def test_an_acceptance_rate_stays_between_0_and_1_and_follows_what_it_sees(
    rounds: list[tuple[int, int]], prior: float
) -> None:
    rate = AcceptanceRate(prior)
    assert rate.value == pytest.approx(prior)
    for drafted, accepted in rounds:
        rate.update(drafted, min(drafted, accepted))
        assert 0 <= rate.value <= 1 + 1e-9
    for _ in range(60):
        rate.update(4, 4)
    assert rate.value > 0.98
    for _ in range(60):
        rate.update(4, 0)
    assert rate.value < 0.05


def test_a_cost_table_goes_through_what_was_measured_and_on_in_straight_lines() -> None:
    table = CostTable.interpolate(8, {(1, 0): 1.0, (1, 4): 3.0, (8, 0): 8.0, (8, 4): 24.0})
    assert table.row(1)[[0, 2, 4, 8]].tolist() == [1, 2, 3, 5]
    assert table.row(8)[4] == 24 and 1 < table.row(3)[0] < table.row(5)[0] < 8


def test_a_cost_table_follows_its_own_cell_quickly_all_others_slowly_and_accidents_hardly() -> None:
    table = CostTable.interpolate(2, {(1, 0): 1.0, (1, 16): 1.0, (2, 0): 1.0, (2, 16): 1.0})
    for _ in range(12):
        table.observe(1, 4, 1.5)
    assert table.row(1)[4] == pytest.approx(1.5, rel=0.1) and 1.0 < table.row(2)[0] < 1.25
    before = float(table.row(1)[4])
    table.observe(1, 4, 600.0)
    assert table.row(1)[4] < before * 1.2


def test_prefill_costs_follow_what_is_measured() -> None:
    made = PrefillCost.through((10, 0.030), (110, 0.130))
    assert (made.seconds(60), made.tokens(0.080)) == (pytest.approx(0.080), 60)
    assert made.tokens(0.001) == 0
    for _ in range(50):
        made.observe(8, 2 * 0.028)
    assert (made.seconds(60), made.tokens(0.161)) == (pytest.approx(0.160, rel=0.01), 60)


def test_a_measurement_that_says_more_tokens_cost_less_is_not_believed() -> None:
    made = PrefillCost.through((10, 0.030), (110, 0.020))
    assert 0 < made.seconds(1) < made.seconds(100)


def test_alone_copying_wins_where_it_is_right_as_often_and_loses_where_it_is_seldom() -> None:
    draft, verify = LENGTHS * 0.1, 1 + LENGTHS * 0.02
    copied, drafted = goodputs_alone(draft, verify, 8, 16)
    assert copied == sorted(copied) and drafted == sorted(drafted)
    half, most = STEPS // 2, int(0.9 * STEPS)
    assert copied[most] > drafted[most] > copied[half]
    for rate in (half, most):
        tokens = [expected_tokens(rate / STEPS, length) for length in range(17)]
        assert copied[rate] == pytest.approx(max(np.array(tokens) / verify))
        assert drafted[rate] == pytest.approx(max(np.array(tokens[:9]) / (draft + verify)[:9]))
