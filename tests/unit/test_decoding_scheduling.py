"""Scheduling: nobody waits long for others' prompts, and timeouts, cancellations, levels and memory are honoured."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from speculative_decoding.engine import Engine
from speculative_decoding.language_model import Counts, LanguageModel, Logits, Tokens
from speculative_decoding.options import GenerationOptions
from speculative_decoding.prefill import LEAST_CHUNK
from speculative_decoding.scheduler import QueueFullError
from speculative_decoding.sequence import Sequence
from speculative_decoding.warm_up import measure_costs

from tests.decoding import Answer, decode_plainly
from tests.language_models import VOCABULARY
from tests.unit.conftest import LONG_CONTEXT, Export

SLOTS = 4
LONG_PROMPT = 2000
ENDLESS = 1500


class Watched(LanguageModel):
    """Writes down its calls: (first slot, rows, width, seconds)."""

    def __init__(self, folder: Path, slots: int) -> None:
        super().__init__(folder, slots, threads=1, spinning=False)
        self.calls: list[tuple[int, int, int, float]] = []
        self.slowdown_s = 0.0

    def forward(self, first: int, tokens: Tokens, counts: Counts) -> Logits:
        started = time.perf_counter()
        time.sleep(self.slowdown_s)
        logits = super().forward(first, tokens, counts)
        self.calls.append((first, *tokens.shape, time.perf_counter() - started))
        return logits


@pytest.fixture
def model(exported: Callable[[str], Export]) -> Watched:
    return Watched(exported("llama2k-row-int8").folder, SLOTS)


@pytest.fixture
def engine(model: Watched) -> Iterator[Engine]:
    costs = measure_costs(model, None, 4)
    model.calls.clear()
    made = Engine(model, None, 0, max_waiting=2, costs=costs)
    yield made
    made.stop()


def prompt(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(5, VOCABULARY, length).tolist()
    return tokens


def sequence(engine: Engine, tokens: list[int], max_tokens: int = 8, **options: int) -> tuple[Sequence, Answer]:
    answer = Answer()
    made = GenerationOptions(max_tokens=max_tokens, ignore_eos=True, **options)
    return Sequence(tokens, made, answer.listen, engine.end_tokens), answer


def ask(engine: Engine, tokens: list[int], max_tokens: int = 8, **options: int) -> tuple[Sequence, Answer]:
    made = sequence(engine, tokens, max_tokens, **options)
    engine.submit(made[0])
    return made


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> float:
    """Return the seconds until it holds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s"
        time.sleep(0.0005)
    return time.monotonic() - started


def test_a_long_prompt_comes_in_chunks_that_cost_about_a_round_each(model: Watched, engine: Engine) -> None:
    running = [ask(engine, prompt(20, seed), ENDLESS) for seed in range(2)]
    wait_until(lambda: all(answer.pieces > 100 for _, answer in running))
    model.calls.clear()
    arrived = ask(engine, prompt(LONG_PROMPT), 4)
    assert arrived[1].wait() == "length"
    calls = list(model.calls)
    for one, _ in running:
        engine.cancel(one)
    wait_until(lambda: engine.load() == (0, 0, 0))
    chunks = [call for call in calls if call[0] == 2]
    rounds = [call[3] for call in calls if call[:2] == (0, 2)]
    assert sum(width for _, _, width, _ in chunks) == LONG_PROMPT and len(chunks) > 4
    for before, after in itertools.pairwise(calls):
        assert not before[0] == after[0] == 2, "there is a round between any two chunks"
    seconds = [call[3] for call in chunks if call[2] > LEAST_CHUNK]
    assert statistics.median(seconds) < 3 * statistics.median(rounds)
    assert arrived[1].tokens == decode_plainly(model, prompt(LONG_PROMPT), arrived[0].options)[0]


def test_with_nobody_running_a_prompt_comes_in_few_chunks(model: Watched, engine: Engine) -> None:
    assert ask(engine, prompt(LONG_PROMPT), 1)[1].wait() == "length"
    assert len(model.calls) < 12


def test_short_prompts_share_the_time_between_two_rounds(model: Watched, engine: Engine) -> None:
    model.slowdown_s = 0.02  # so that all three wait when the engine comes to look
    asked = [ask(engine, prompt(4, seed), 3) for seed in range(3)]
    assert all(answer.wait() == "length" for _, answer in asked)
    assert max(rows for first, rows, _, _ in model.calls if first == 0) == 3


@pytest.mark.parametrize("stage", ["waiting", "prefilling", "decoding"])
def test_a_cancelled_sequence_frees_its_slot_within_a_tenth_of_a_second(
    model: Watched, engine: Engine, stage: str
) -> None:
    others = [ask(engine, prompt(8, seed), ENDLESS) for seed in range(SLOTS if stage == "waiting" else SLOTS - 1)]
    wait_until(lambda: all(answer.pieces for _, answer in others))
    model.slowdown_s = 0.005
    leaver = ask(engine, prompt(LONG_PROMPT if stage == "prefilling" else 8), ENDLESS)
    if stage == "decoding":
        wait_until(lambda: leaver[1].pieces > 0)
    elif stage == "prefilling":
        wait_until(lambda: leaver[0].admitted > 0)
    before = engine.load()
    engine.cancel(leaver[0])
    assert wait_until(lambda: leaver[0].finished > 0) < 0.1
    assert leaver[1].wait() == "cancelled"
    after = engine.load()
    assert (after.running, after.waiting) == (before.running - (stage != "waiting"), 0)
    for one, _ in others:
        engine.cancel(one)
    wait_until(lambda: engine.load() == (0, 0, 0))


def test_cancelling_before_submitting_ends_it_all_the_same(engine: Engine) -> None:
    early, answer = sequence(engine, prompt(5), ENDLESS)
    engine.cancel(early)
    engine.submit(early)
    assert answer.wait() == "cancelled"


@pytest.mark.parametrize("waiting", [False, True])
def test_a_timeout_ends_a_sequence_wherever_it_is(model: Watched, engine: Engine, waiting: bool) -> None:
    others = [ask(engine, prompt(8, seed), ENDLESS) for seed in range(SLOTS if waiting else 1)]
    wait_until(lambda: all(answer.pieces for _, answer in others))
    model.slowdown_s = 0.002
    timed, answer = ask(engine, prompt(8), ENDLESS, timeout=60_000)
    patient, _ = ask(engine, prompt(8), ENDLESS, timeout=10**9)
    assert answer.wait() == "timeout"
    assert 0.06 <= timed.finished - timed.arrived < 0.5
    assert bool(answer.tokens) != waiting
    assert not patient.finished and not any(one.finished for one, _ in others)


def test_a_full_queue_refuses_at_once_and_several_answers_wait_together_or_not_at_all(
    model: Watched, engine: Engine
) -> None:
    model.slowdown_s = 0.005
    running = [ask(engine, prompt(8, seed), ENDLESS) for seed in range(SLOTS)]
    wait_until(lambda: engine.load().waiting == 0)
    ask(engine, prompt(8))
    three = [sequence(engine, prompt(8))[0] for _ in range(2)]
    started = time.monotonic()
    with pytest.raises(QueueFullError, match="2 requests are waiting already"):
        engine.submit(*three)
    assert time.monotonic() - started < 0.1 and engine.load().waiting == 1
    engine.submit(three[0])
    for one, _ in running:
        engine.cancel(one)


def test_a_lower_level_overtakes_who_waits_but_not_who_runs(model: Watched, engine: Engine) -> None:
    model.slowdown_s = 0.002
    running = [ask(engine, prompt(8, seed), 40 + 10 * seed) for seed in range(SLOTS)]
    wait_until(lambda: engine.load().waiting == 0)
    late, early = ask(engine, prompt(8), priority=3)[0], ask(engine, prompt(8), priority=1)[0]
    wait_until(lambda: late.finished > 0)
    assert early.admitted < late.admitted
    assert all(answer.wait() == "length" for _, answer in running)


def test_sequences_in_slots_never_need_more_memory_than_there_is(model: Watched) -> None:
    engine = Engine(model, None, 0, max_waiting=10, kv_tokens=100)
    try:
        assert engine.most_tokens(sequence(engine, prompt(10), 10**6)[0]) == engine.context_length == LONG_CONTEXT - 1
        asked = [ask(engine, prompt(10, seed), 30) for seed in range(6)]
        most = 0
        while any(not one.finished for one, _ in asked):
            load = engine.load()
            most = max(most, load.running)
            assert load.tokens <= 100
        assert most == 2
        assert [answer.wait() for _, answer in asked] == ["length"] * 6
    finally:
        engine.stop()
