"""PagedModel: the logits of transformers and shared blocks, with PagedAttention made of ONNX's own operators."""

import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from speculative_decoding.burst import MOST_S, MOST_STEPS
from speculative_decoding.decoder import DecoderSettings, load_decoder
from speculative_decoding.device import HostDevice
from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.engine import Engine
from speculative_decoding.execution_provider import CPU
from speculative_decoding.options import MAX_SPECULATION_LENGTH, GenerationOptions
from speculative_decoding.paged_call import KEPT_WIDTH, PROMPTS, CallShape, PagedCall
from speculative_decoding.paged_independence import limit_tokens
from speculative_decoding.paged_model import CHUNKS, MIXED_WIDTHS, WIDTHS, PagedModel
from speculative_decoding.prefix_reuse import open_prefix_cache
from speculative_decoding.reuse_settings import ReuseSettings
from speculative_decoding.sequence import Sequence
from speculative_decoding.step_costs import CostTable, PrefillCost, StepCosts
from speculative_decoding.warm_up import measure_costs
from transformers import PreTrainedModel

from scripts.export_model import export_for_cuda
from tests.decoding import (
    PENALTIES,
    check_adjusted_choices,
    check_drafts_on_device,
    check_mixed_calls,
    check_prefixes_come_back_from_the_host,
    decode_all,
    decode_plainly,
)
from tests.language_models import VOCABULARY, save_random
from tests.paged_attention import decompose
from tests.unit.conftest import Export

SLOTS, BLOCK, CACHED = 4, 16, 12
TOLERANCE = 0.02  # of half precision, on logits of standard deviation 0.8


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp("paged")
    source = save_random(folder / "source", "llama", tied=False)
    export_for_cuda(folder / "source", folder / "exported")
    decompose(folder / "exported", BLOCK)
    return source, folder / "exported"


def load(folder: Path, slots: int = SLOTS, cached: int = CACHED, tier: int = 0) -> PagedModel:
    size = PagedModel(folder, slots, 1, False, block_tokens=BLOCK).block_bytes
    kept = {"cached_bytes": cached * size, "tier_bytes": tier * size}
    return PagedModel(folder, slots, 1, False, **kept, block_tokens=BLOCK)


class Bench:
    """A paged model, beside what each of its slots has been fed."""

    def __init__(self, paged: tuple[PreTrainedModel, Path]) -> None:
        self.source, folder = paged
        self.model = load(folder)
        self.history: list[list[int]] = [[] for _ in range(SLOTS)]
        self.rng = np.random.default_rng(0)

    def tokens(self, count: int) -> list[int]:
        return self.rng.integers(0, VOCABULARY, count).tolist()

    def check(self, first: int, rows: list[list[int]]) -> None:
        """Feed rows, and compare the logits there are with those of transformers, computed from nothing."""
        counts = np.array([len(row) for row in rows], np.int32)
        padded = np.zeros((len(rows), counts.max()), np.int64)
        for row, tokens in enumerate(rows):
            padded[row, : len(tokens)] = tokens
            self.history[first + row] += tokens
        logits = self.model.forward(first, padded, counts)
        best = logits.argmax(-1)
        assert self.model.lengths.tolist() == [len(tokens) for tokens in self.history]
        for row, count in enumerate(counts.tolist()):
            expected = self.expected(first + row, count)
            for place in range(count) if padded.shape[1] <= KEPT_WIDTH else [padded.shape[1] - 1]:
                got = logits[row, place]
                np.testing.assert_allclose(got, expected[place], rtol=0, atol=TOLERANCE)
                assert best[row, place] == got.argmax()
        self.model.check_integrity()

    def expected(self, slot: int, count: int) -> np.ndarray:
        with torch.no_grad():
            logits = self.source(input_ids=torch.tensor([self.history[slot]])).logits
        return logits[0, len(self.history[slot]) - count :].numpy()

    def truncate(self, slot: int, length: int) -> None:
        self.model.truncate(slot, length)
        del self.history[slot][length:]


def test_logits_are_those_of_transformers_through_prefill_ragged_batch_rollback_and_move(
    paged: tuple[PreTrainedModel, Path],
) -> None:
    bench = Bench(paged)
    for slot, length in enumerate((12, 5, 30, 1)):
        bench.check(slot, [bench.tokens(length)])
    bench.check(0, [bench.tokens(count) for count in (3, 5, 0, 1)])  # different pasts and counts
    bench.check(1, [bench.tokens(count) for count in (1, 1, 1)])  # not from the first slot on
    bench.truncate(0, 13)  # rejected drafts, and a sequence begun anew
    bench.truncate(2, 0)
    bench.check(0, [bench.tokens(count) for count in (4, 2, 9, 2)])
    bench.model.move(3, 1)
    bench.history[1], bench.history[3] = bench.history[3], []
    bench.check(0, [bench.tokens(count) for count in (1, 3, 2)])
    bench.truncate(2, 3)
    bench.check(2, [bench.tokens(bench.model.context_length - 3)])  # all that fits


def test_rows_and_chunks_of_prompts_in_one_call_have_the_bits_that_they_have_alone(
    paged: tuple[PreTrainedModel, Path],
) -> None:
    check_mixed_calls(load(paged[1]), load(paged[1]))


def test_prompts_fed_together_are_not_padded_beyond_what_a_slot_can_hold(paged: tuple[PreTrainedModel, Path]) -> None:
    bench = Bench(paged)
    bench.history[:2] = [bench.tokens(140), bench.tokens(139)]
    logits = bench.model.forward_prompts(0, bench.history[:2])
    for slot in range(2):
        np.testing.assert_allclose(logits[slot, 0], bench.expected(slot, 1)[0], rtol=0, atol=TOLERANCE)


def test_slots_that_share_a_prefix_share_its_blocks_until_one_writes(paged: tuple[PreTrainedModel, Path]) -> None:
    bench, model = Bench(paged), load(paged[1])
    bench.model = model
    prompt = bench.tokens(40)
    bench.check(0, [list(prompt)])
    model.keep(0, "a", prompt)
    before = model._allocator.free
    for slot, common in ((1, 40), (2, 35)):  # the same prompt, and one that differs within the last block
        other = prompt[:common] + bench.tokens(9)
        assert model.reuse(slot, "a", other) == common
        bench.history[slot] = other[:common]
        assert model._allocator.free == before  # nothing was copied yet
        model.check_integrity()
        bench.check(slot, [other[common:]])
        before = model._allocator.free
    bench.check(0, [bench.tokens(5)])  # the first goes on as if nobody shared
    assert model._tables[0][:2] == model._tables[1][:2] == model._tables[2][:2]
    assert len({table[2] for table in model._tables[:3]}) == 3


def test_a_prefix_is_found_by_its_own_tenant_only_and_never_whole(paged: tuple[PreTrainedModel, Path]) -> None:
    model = load(paged[1])
    prompt = Bench(paged).tokens(32)
    model.forward(0, np.array([prompt]), np.array([32], np.int32))
    model.keep(0, "a", prompt)
    assert model.reuse(1, "b", prompt) == 0
    assert model.reuse(1, "a", prompt) == 31  # the last token's logits are wanted


def test_least_recently_used_prefixes_go_first_and_slots_always_get_blocks(paged: tuple[PreTrainedModel, Path]) -> None:
    model, bench = load(paged[1], cached=4), Bench(paged)
    prompts = [bench.tokens(33) for _ in range(6)]
    for prompt in prompts:
        model.truncate(0, 0)
        model.forward(0, np.array([prompt]), np.array([33], np.int32))
        model.keep(0, "a", prompt)
        model.check_integrity()
    assert len(model.prefixes.held()) <= 4
    assert model.reuse(1, "a", prompts[0]) == 0
    assert model.reuse(1, "a", prompts[-1]) == 32
    for slot in range(SLOTS):
        model.truncate(slot, 0)
        model.forward(slot, np.zeros((1, model.context_length), np.int64), np.array([model.context_length], np.int32))
    model.check_integrity()


def test_prefixes_pushed_off_the_device_come_back_from_the_host(paged: tuple[PreTrainedModel, Path]) -> None:
    check_prefixes_come_back_from_the_host(load(paged[1], cached=2, tier=6), BLOCK)


def test_a_session_pins_what_both_models_keep_of_it(paged: tuple[PreTrainedModel, Path]) -> None:
    target, draft = load(paged[1], cached=8), load(paged[1], cached=8)
    cache = open_prefix_cache(target, draft, ReuseSettings(), "unused")
    assert cache
    prompt = Bench(paged).tokens(40)
    for model, known in ((target, 40), (draft, 20)):
        model.forward(0, np.array([prompt[:known]]), np.array([known], np.int32))
        model.keep(0, "a", prompt[:known])
    assert cache.pin("session", "a", prompt, 100) == 40
    seen = cache.snapshot()
    assert (seen.blocks, seen.blocks_pinned, seen.bytes_used) == (5, 5, 5 * target.block_bytes)
    assert seen.bytes_budget == 16 * target.block_bytes
    cache.check_integrity()
    cache.unpin("session")
    assert cache.snapshot().blocks_pinned == 0


def count_prompts(model: PagedModel, calls: list[str]) -> None:
    """Have a model write down which calls it gets with how many prompts."""
    forward_mixed, forward_prompts = model.forward_mixed, model.forward_prompts

    def mixed(*given: Any) -> object:
        calls.append(f"forward_mixed of {len(given[2])}")
        return forward_mixed(*given)

    def prompts(*given: Any) -> object:
        calls.append(f"forward_prompts of {len(given[-1])}")
        return forward_prompts(*given)

    model.forward_mixed, model.forward_prompts = mixed, prompts


def propose(drafter: ModelDrafter, sequences: list[Sequence], length: int) -> list[list[int]]:
    """Return so many proposed tokens for each sequence."""
    followed = drafter.propose(sequences, np.full(len(sequences), length, np.int32)).followed
    assert followed
    return followed.tokens().tolist()


def test_drafts_are_taken_and_accepted_where_they_are() -> None:
    check_drafts_on_device(HostDevice(CPU))


@pytest.mark.parametrize("speculation_length", [0, 4])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.8, "top_p": 0.95, "seed": 7},
        {"temperature": 0.8, "seed": 7, "logit_bias": ((3, 1.5),), "min_tokens": 5, **PENALTIES},
    ],
    ids=["greedy", "seeded", "adjusted"],
)
def test_the_engine_decodes_on_pages_what_the_target_decodes_alone(
    paged: tuple[PreTrainedModel, Path], speculation_length: int, sampling: dict[str, float]
) -> None:
    """Prompts that share prefixes, more of them than slots, and a draft that is always right."""
    alone, target, draft = load(paged[1], 1, 0), load(paged[1]), load(paged[1])
    assert limit_tokens(target)
    assert target.most_tokens >= SLOTS * WIDTHS[1] and not target.lengths.any()
    bench = Bench(paged)
    shared = bench.tokens(37)
    prompts = [shared[:length] + bench.tokens(3) for length in (0, 5, 16, 20, 37, 37, 32)] * 2
    options = [GenerationOptions(max_tokens=14 + 3 * row, ignore_eos=True, **sampling) for row in range(len(prompts))]
    expected = [decode_plainly(alone, prompt, wish)[0] for prompt, wish in zip(prompts, options, strict=True)]
    drafter, calls = ModelDrafter(draft), list[str]()
    count_prompts(target, calls)
    engine = Engine(target, drafter, speculation_length, 100, measure_costs(target, drafter, 4))
    waits, download = list[object](), draft._device.download
    draft._device.download = lambda array: waits.append(array) or download(array)
    try:
        answers, _ = decode_all(engine, prompts, options)
    finally:
        engine.stop()
    assert answers == expected
    assert bool(waits) == (speculation_length > 0 and "logit_bias" in sampling)  # only adjustments look at drafts
    assert "forward_mixed of 1" in calls and set(calls) & {"forward_prompts of 2", "forward_prompts of 4"}
    for model in (target, draft):
        model.check_integrity()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.95}], ids=["greedy", "seeded"])
def test_a_burst_of_plain_steps_gives_what_they_give_one_by_one(
    paged: tuple[PreTrainedModel, Path], sampling: dict[str, float]
) -> None:
    alone, target, bench = load(paged[1], 1, 0), load(paged[1]), Bench(paged)
    room = target.context_length - 6
    prompts = [bench.tokens(count) for count in (5, 30, room, 12, 3, 40, 8)]
    wishes = [{"max_tokens": count} for count in (1, 2, 30, 17, 14, 3, 21)]
    wishes[3] |= {"logprobs": 2}
    wishes[4] |= {"min_tokens": 6, **PENALTIES}
    options = [GenerationOptions(seed=row, **wish, **sampling) for row, wish in enumerate(wishes)]
    expected = [decode_plainly(alone, prompt, wish)[0] for prompt, wish in zip(prompts, options, strict=True)]
    cost = CostTable(np.full((SLOTS, MAX_SPECULATION_LENGTH + 1), MOST_S / MOST_STEPS))
    cost.observe = lambda *_: None  # this machine is not as fast
    steps, follow = list[int](), target.follow
    target.follow = lambda *given: steps.append(given[2]) or follow(*given)
    engine = Engine(target, None, 0, 100, StepCosts(cost, cost, PrefillCost(0.0, 1e-4)))
    try:
        answers, _ = decode_all(engine, prompts, options)
    finally:
        engine.stop()
    assert answers == expected
    assert max(steps) == MOST_STEPS and min(steps) > 1
    assert engine.statistics.plain_rounds == engine.statistics.rounds > sum(steps) > len(steps)
    target.check_integrity()


def test_drafts_on_pages_may_be_judged_by_rejection_beside_others(paged: tuple[PreTrainedModel, Path]) -> None:
    engine = Engine(load(paged[1]), ModelDrafter(load(paged[1])), 4, 100)
    sampling = {"max_tokens": 20, "ignore_eos": True, "drafter": "model", "temperature": 0.8}
    options = [GenerationOptions(acceptance=kind, seed=1, **sampling) for kind in ("rejection", "exact", "rejection")]
    try:
        answers, sequences = decode_all(engine, [Bench(paged).tokens(30)] * 3, options)
    finally:
        engine.stop()
    assert [len(answer) for answer in answers] == [20] * 3
    assert all(sequence.accepted == sequence.drafted > 0 for sequence in sequences)  # the draft is the target


@pytest.mark.parametrize("speculation_length", [0, 4])
def test_a_device_has_work_while_listeners_are_told_and_drafts_take_in_prompts(
    paged: tuple[PreTrainedModel, Path], speculation_length: int
) -> None:
    target, draft, bench, events = load(paged[1]), load(paged[1]), Bench(paged), list[str]()

    def note(where: Any, name: str, event: str) -> None:
        call = getattr(where, name)
        setattr(where, name, lambda *given, **named: events.append(event) or call(*given, **named))

    for name in ("forward", "forward_mixed", "follow"):
        note(target, name, "asked")
    note(draft, "forward_prompts", "draft asked")
    note(target._device, "download", "waited")
    ended = threading.Semaphore(0)

    def listen(sequence: Sequence, tokens: list[int], reason: str | None) -> None:
        events.append("ended" if reason else "told")
        if reason:
            ended.release()

    engine = Engine(target, ModelDrafter(draft), 4, 100)
    wish = GenerationOptions(max_tokens=20, ignore_eos=True, speculation_length=speculation_length, drafter="model")
    try:
        for count in (1, 5):
            engine.submit(*[Sequence(bench.tokens(30), wish, listen, frozenset()) for _ in range(count)])
            assert all(ended.acquire(timeout=60) for _ in range(count))
    finally:
        engine.stop()
    order = [event for event in events if event != "draft asked"]
    assert all(before != "waited" for before, event in pairwise(order) if event == "told")
    assert events.count("draft asked") == (3 if speculation_length else 0)  # one alone, four at once, the fifth
    if speculation_length:
        assert events.index("draft asked") < events.index("waited")


def test_a_draft_takes_in_several_prompts_in_one_call_and_no_more_than_a_round_can_wait_for(
    paged: tuple[PreTrainedModel, Path],
) -> None:
    drafters, bench = [ModelDrafter(load(paged[1])) for _ in range(2)], Bench(paged)
    sequences = [Sequence(bench.tokens(40), GenerationOptions(), lambda *_: None, frozenset()) for _ in range(SLOTS)]
    committed = {slot: sequence.tokens for slot, sequence in enumerate(sequences)}
    together, one_by_one = drafters
    calls = list[str]()
    count_prompts(together.model, calls)
    for slot, tokens in committed.items():
        assert one_by_one.fill({slot: tokens}) == {slot}
    assert together.fill({1: committed[1]}) == {1}
    assert together.fill(committed) == {0, 1, 2, 3}
    assert calls == ["forward_prompts of 1", "forward_prompts of 1", "forward_prompts of 2"]
    proposed = [propose(drafter, sequences, 5) for drafter in drafters]
    assert proposed[0] == proposed[1]
    for slot in range(SLOTS):
        together.model.truncate(slot, 0)
    calls.clear()
    assert together.fill(committed) == {0, 1, 2}
    assert together.fill(committed) == {0, 1, 2, 3}
    assert calls == ["forward_prompts of 4", "forward_prompts of 1"]
    assert together.model.lengths.tolist() == [39] * SLOTS


def test_a_draft_keeps_up_with_rows_that_others_draft_for(paged: tuple[PreTrainedModel, Path]) -> None:
    keeping, late, bench = ModelDrafter(load(paged[1])), ModelDrafter(load(paged[1])), Bench(paged)
    sequences = [Sequence(bench.tokens(40), GenerationOptions(), lambda *_: None, frozenset()) for _ in range(3)]
    keeping.fill({slot: sequence.tokens for slot, sequence in enumerate(sequences)})
    calls = list[str]()
    count_prompts(keeping.model, calls)
    for copied in (1, 3, 2):  # the first row is drafted for; the second and third have tokens of somebody else's
        keeping.propose(sequences, np.array([4, 0, 0], np.int32))
        assert keeping.model.lengths[:3].tolist() == [len(sequences[0].tokens) + 3, *[len(sequences[1].tokens)] * 2]
        for row, sequence in enumerate(sequences):
            sequence.commit(bench.tokens(1 if row == 0 else copied + 1))
            keeping.commit(row, len(sequence.tokens))
    committed = {slot: sequence.tokens for slot, sequence in enumerate(sequences)}
    assert keeping.fill(committed) == {0, 1, 2} and not calls
    for _ in range(2):  # nothing yet, and more than it may take in between two rounds
        able = late.fill(committed)
    assert able == {0, 1, 2}
    assert propose(keeping, sequences, 4) == propose(late, sequences, 4)
    keeping.model.check_integrity()


def test_a_request_waits_for_no_call_to_be_captured(paged: tuple[PreTrainedModel, Path]) -> None:
    target, draft = load(paged[1]), load(paged[1])
    assert limit_tokens(target)
    drafter = ModelDrafter(draft)
    measure_costs(target, drafter, 4)
    captured = [set(model._calls) for model in (target, draft)]
    assert not draft.lengths.any()
    prompts = [Bench(paged).tokens(length) for length in (2, 7, 40, 12, 90, 3, 17, 60)]
    engine = Engine(target, drafter, 4, 100)  # without costs it always drafts
    try:
        decode_all(engine, prompts, [GenerationOptions(max_tokens=14, ignore_eos=True)] * len(prompts))
    finally:
        engine.stop()
    assert engine.statistics.drafts
    assert [set(model._calls) for model in (target, draft)] == captured


def test_a_model_whose_rows_are_independent_is_fed_as_much_as_there_is_room_for(
    paged: tuple[PreTrainedModel, Path],
) -> None:
    model = load(paged[1])
    longest = max(chunk for chunk in CHUNKS if chunk + KEPT_WIDTH <= model.context_length)
    assert limit_tokens(model)
    assert model.most_tokens == SLOTS * MIXED_WIDTHS[-1] + longest
    assert not model.lengths.any()
    assert (model.longest_chunk, model.prompts_at_once) == (longest, PROMPTS)


def test_biased_penalized_and_too_early_tokens_are_chosen_where_the_logits_are(
    paged: tuple[PreTrainedModel, Path],
) -> None:
    check_adjusted_choices(load(paged[1]))


class Dependent(PagedModel):
    """A model whose last row comes out differently when more than so many tokens are fed at once."""

    good = 0
    most_fed = 0

    def _bind(self, shape: CallShape) -> PagedCall:
        self.most_fed = max(self.most_fed, shape.tokens)
        call = super()._bind(shape)
        if shape.tokens > self.good:
            call.run = lambda: self._spoil(call)
        return call

    def _spoil(self, call: PagedCall) -> None:
        PagedCall.run(call)
        used = call.shape.logits if not call.shape.chunk else call.shape.logits - PROMPTS + 1
        call.logits[used - 1] += 1


@pytest.mark.parametrize("good", [SLOTS * WIDTHS[1], 3])
def test_no_more_tokens_are_fed_at_once_than_keep_their_bits(paged: tuple[PreTrainedModel, Path], good: int) -> None:
    target, draft = Dependent(paged[1], SLOTS, 1, False, block_tokens=BLOCK), load(paged[1])
    target.good = good
    assert limit_tokens(target) == (good >= SLOTS * WIDTHS[0])
    assert target.most_tokens <= good
    if target.most_tokens < SLOTS * WIDTHS[0]:
        return
    assert target.widest(SLOTS) == WIDTHS[1]
    prompts = [Bench(paged).tokens(count) for count in (50, 3, 20, 9)]
    options = GenerationOptions(max_tokens=20, ignore_eos=True)
    target.most_fed = 0
    engine = Engine(target, ModelDrafter(draft), 8, 100)
    decode_all(engine, prompts, [options] * len(prompts))
    engine.stop()
    assert 0 < target.most_fed <= good


def test_prompts_fed_at_once_leave_room_for_the_least_that_one_takes(paged: tuple[PreTrainedModel, Path]) -> None:
    target = Dependent(paged[1], SLOTS, 1, False, block_tokens=BLOCK)
    target.good = min(CHUNKS)
    assert limit_tokens(target)
    assert target.longest_chunk == target.good
    prompts = [Bench(paged).tokens(count) for count in (target.good - 1, 5, 1, 1)]
    target.most_fed = 0
    engine = Engine(target, None, 0, 100)
    decode_all(engine, prompts, [GenerationOptions(max_tokens=4, ignore_eos=True)] * len(prompts))
    engine.stop()
    assert target.most_fed == target.good


def test_what_is_fed_ends_where_the_tile_begins_in_which_bits_differ(paged: tuple[PreTrainedModel, Path]) -> None:
    target = Dependent(paged[1], SLOTS, 1, False, block_tokens=BLOCK)
    target.good = 150
    assert limit_tokens(target)
    assert target.most_tokens == 128


def test_a_folder_for_gpus_is_refused_on_the_cpu_and_the_reverse(
    paged: tuple[PreTrainedModel, Path], exported: Callable[[str], Export]
) -> None:
    settings = DecoderSettings(1, 1, False)
    with pytest.raises(ValueError, match="has PagedAttention, for GPUs: export it without --device cuda"):
        load_decoder(paged[1], settings, CPU)
    with pytest.raises(ValueError, match="is for CPUs: export it with --device cuda"):
        load_decoder(exported("llama-fp32").folder, settings, ("CUDAExecutionProvider", {"device_id": "0"}))
    with pytest.raises(ValueError, match=r"has no input .*: export it with scripts\.export_model --device cuda"):
        PagedModel(exported("llama-fp32").folder, 1, 1, False)


@pytest.mark.parametrize("settings", [ReuseSettings(kv_cache_int8=True), ReuseSettings(kv_tier_folder="/tier")])
def test_what_a_gpu_cannot_keep_is_refused_by_name(settings: ReuseSettings) -> None:
    with pytest.raises(ValueError, match=r"parameter kv_(cache_int8|tier_folder) is .*; on a GPU it must be left out"):
        settings.device_bytes(1 << 30)
    assert ReuseSettings().device_bytes(1 << 30) == (1 << 28, 0)
    assert ReuseSettings(kv_cache_bytes=5, kv_tier_bytes=7).device_bytes(1 << 30) == (5, 7)
