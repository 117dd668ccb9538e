"""The promise: what is decoded with the key/value cache is what is decoded without it, token for token.

With room for everything or for almost nothing, greedily or with a seed, with any drafter, whoever shares a prefix or
leaves meanwhile.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from speculative_decoding.block_pool import OFFSET, page_bytes
from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.engine import Engine
from speculative_decoding.kv_cache import KVCache
from speculative_decoding.kv_layout import BlockLayout
from speculative_decoding.kv_memory import KVCacheSettings, bookkeeping_bytes
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.options import DrafterName, GenerationOptions
from speculative_decoding.sequence import Sequence

from tests import language_models
from tests.decoding import TIMEOUT_S, Answer, decode_plainly
from tests.language_models import VOCABULARY
from tests.unit.conftest import Export

SLOTS = 16
BLOCK = 16
TIER_PAGES = 200
SAMPLING = {"greedy": {}, "seeded": {"temperature": 0.8, "top_p": 0.95}}
PAGES = {"off": 0, "tiny": 5, "roomy": 400}
Rng = np.random.Generator


class Models(NamedTuple):
    """A target with room for many, one alone for the expected answers, and a draft that is often right."""

    target: LanguageModel
    alone: LanguageModel
    draft: LanguageModel


@pytest.fixture(scope="module")
def models(exported: Callable[[str], Export], tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = exported("llama-row-int8").folder
    noisy = language_models.perturb(folder, tmp_path_factory.mktemp("drafts") / "noisy", noise=0.05)
    load = partial(LanguageModel, threads=1, spinning=False)
    return Models(load(folder, SLOTS), load(folder, 1), load(noisy, SLOTS))


def cache_of(models: Models, pages: int, int8: bool = False, tier: Path | None = None) -> KVCache | None:
    """Return a cache with room for so many blocks, None for 0, and for TIER_PAGES more in a file in `tier`."""
    layout = BlockLayout(models.target.shape.key_values, models.draft.shape.key_values, BLOCK)
    size, tracking = page_bytes(layout, int8), bookkeeping_bytes(4 if int8 else 1)
    tier_bytes = OFFSET + TIER_PAGES * size if tier else 0
    budget = OFFSET + pages * (size + tracking) + bool(tier) * TIER_PAGES * tracking
    return KVCache(layout, KVCacheSettings(budget, int8, tier_bytes, tier)) if pages else None


@contextmanager
def running(models: Models, cache: KVCache | None) -> Iterator[Engine]:
    """An engine that must leave its cache in order."""
    engine = Engine(models.target, ModelDrafter(models.draft, loops=[4]), 4, 1000, kv_cache=cache)
    try:
        yield engine
    finally:
        engine.stop()
    if cache:
        cache.check_integrity()
        assert cache.snapshot().blocks_in_use == 0


def start(engine: Engine, prompt: list[int], options: GenerationOptions) -> tuple[Sequence, Answer]:
    answer = Answer()
    sequence = Sequence(prompt, options, answer.listen, engine.end_tokens)
    engine.submit(sequence)
    return sequence, answer


def decode(engine: Engine, prompt: list[int], options: GenerationOptions) -> tuple[Sequence, list[int]]:
    sequence, answer = start(engine, prompt, options)
    assert answer.wait() in ("stop", "length")
    return sequence, answer.tokens


def random_tokens(rng: Rng, count: int) -> list[int]:
    return rng.integers(5, VOCABULARY, count).tolist()


def with_shared_prefix(count: int, shared: int = 70, own: int = 20) -> list[list[int]]:
    rng = np.random.default_rng(count)
    prefix = random_tokens(rng, shared)
    return [prefix + random_tokens(rng, 1 + number % own) for number in range(count)]


@pytest.mark.parametrize("drafter", ["model", "auto", "none"])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("pages", PAGES.values(), ids=PAGES)
def test_sixteen_at_once_with_one_prefix_get_their_plain_answers(
    models: Models, pages: int, sampling: str, drafter: DrafterName
) -> None:
    prompts = with_shared_prefix(SLOTS)
    options = [
        GenerationOptions(max_tokens=24, ignore_eos=True, seed=number, drafter=drafter, **SAMPLING[sampling])
        for number in range(SLOTS)
    ]
    cache = cache_of(models, pages)
    with running(models, cache) as engine:
        for _ in range(2):
            asked = [start(engine, prompt, one) for prompt, one in zip(prompts, options, strict=True)]
            for (sequence, answer), prompt, one in zip(asked, prompts, options, strict=True):
                reason = answer.wait()
                assert (answer.tokens, reason) == decode_plainly(models.alone, prompt, one)
                assert (sequence.reused > 0) <= (pages > 0)
    if pages == PAGES["roomy"]:
        assert all(sequence.reused >= 64 for sequence, _ in asked)
    if cache and pages == PAGES["tiny"]:
        assert cache.snapshot().counters.blocks_evicted > 0


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_was_asked_before_an_answer_is_the_plain_one(models: Models, data: st.DataObject) -> None:
    """Prompts branch off each other and off answers, as edited and continued conversations do; some are given up."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    known = [random_tokens(rng, 40)]
    with running(models, cache_of(models, data.draw(st.sampled_from([3, 6, 12, 400])))) as engine:
        for seed in range(data.draw(st.integers(2, 8))):
            base = known[data.draw(st.integers(0, len(known) - 1))]
            prompt = base[: data.draw(st.integers(1, len(base)))] + random_tokens(rng, data.draw(st.integers(0, 30)))
            drafter = data.draw(st.sampled_from(["model", "prompt_lookup", "none"]))
            sampling = SAMPLING[data.draw(st.sampled_from(list(SAMPLING)))]
            options = GenerationOptions(max_tokens=12, ignore_eos=True, seed=seed, drafter=drafter, **sampling)
            if data.draw(st.booleans()):
                gone, _ = start(engine, prompt[::-1] + prompt, options)
                engine.cancel(gone)
            _, tokens = decode(engine, prompt[:120], options)
            assert tokens == decode_plainly(models.alone, prompt[:120], options)[0]
            known.append(prompt[:120] + tokens)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_second_turn_computes_only_what_is_new(models: Models, sampling: str) -> None:
    rng = np.random.default_rng(1)
    options = GenerationOptions(max_tokens=30, ignore_eos=True, seed=1, drafter="model", **SAMPLING[sampling])
    with running(models, cache_of(models, PAGES["roomy"])) as engine:
        first = random_tokens(rng, 50)
        _, answer = decode(engine, first, options)
        second = [*first, *answer, *random_tokens(rng, 10)]
        sequence, tokens = decode(engine, second, options)
    assert tokens == decode_plainly(models.alone, second, options)[0]
    assert sequence.reused == 79 // BLOCK * BLOCK


def test_what_comes_back_from_the_tier_changes_no_token(models: Models, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    prompts = [random_tokens(rng, 70) for _ in range(6)]
    options = GenerationOptions(max_tokens=16, ignore_eos=True, drafter="model")
    cache = cache_of(models, PAGES["tiny"], tier=tmp_path)
    assert cache
    with running(models, cache) as engine:
        for prompt in prompts * 3:
            assert decode(engine, prompt, options)[1] == decode_plainly(models.alone, prompt, options)[0]
    assert cache.snapshot().counters.tier_hits > 0


def test_int8_blocks_are_reused_and_nearly_the_same(models: Models) -> None:
    rng = np.random.default_rng(5)
    prompts = [random_tokens(rng, 80) for _ in range(12)]
    options = GenerationOptions(max_tokens=8, ignore_eos=True)
    cache = cache_of(models, 20, int8=True)
    assert cache
    with running(models, cache) as engine:
        answers = [decode(engine, prompt, options) for prompt in prompts * 2]
    expected = [decode_plainly(models.alone, prompt, options)[0][0] for prompt in prompts]
    assert cache.snapshot().counters.blocks_quantized > 0
    assert any(sequence.reused for sequence, _ in answers[len(prompts) :])
    assert np.mean([tokens[0] == first for (_, tokens), first in zip(answers, expected * 2, strict=True)]) >= 0.8


def test_no_tenant_finds_what_another_has_asked(models: Models) -> None:
    [prompt] = with_shared_prefix(1)
    with running(models, cache_of(models, PAGES["roomy"])) as engine:
        reused = [
            decode(engine, prompt, GenerationOptions(max_tokens=2, tenant=tenant))[0].reused
            for tenant in ("ada", "ada", "bob", "bob")
        ]
    assert reused == [0, 64, 0, 64]


def test_a_rejected_draft_leaves_nothing_in_the_cache(models: Models) -> None:
    """Answers end at every place in a block and in a draft; what they leave is what computing anew gives."""
    rng = np.random.default_rng(2)
    cache = cache_of(models, PAGES["roomy"])
    assert cache
    with running(models, cache) as engine:
        for length in range(1, 36):
            prompt = random_tokens(rng, 13)
            options = GenerationOptions(max_tokens=length, ignore_eos=True, drafter="model")
            tokens = prompt + decode(engine, prompt, options)[1]
            prefix = cache.match("default", [*tokens, 5])
            found = [np.zeros_like(model.slot(0)) for model in (models.target, models.draft)]
            cache.copy_into(prefix, *found)
            cache.release(prefix)
            assert prefix.tokens == (len(tokens) - 1) // BLOCK * BLOCK
            assert prefix.tokens - BLOCK <= prefix.draft_tokens <= prefix.tokens  # after a full acceptance it lacks one
            counts = (prefix.tokens, prefix.draft_tokens)
            for model, slot, count in zip((models.target, models.draft), found, counts, strict=True):
                model.truncate(0, 0)  # the engine is idle: its slots are free
                model.forward(0, np.array([tokens], np.int64), np.array([len(tokens)], np.int32))
                np.testing.assert_array_equal(slot[:, :, :count], model.slot(0)[:, :, :count])
        assert prefix.draft_tokens > 0


def test_a_prompt_given_up_halfway_leaves_what_was_computed(exported: Callable[[str], Export]) -> None:
    folder = exported("llama2k-row-int8").folder
    target, alone, draft = (LanguageModel(folder, slots, threads=1, spinning=False) for slots in (2, 1, 2))
    models = Models(target, alone, draft)
    prompt = random_tokens(np.random.default_rng(3), 2200)
    options = GenerationOptions(max_tokens=8, ignore_eos=True)
    with running(models, cache_of(models, 200)) as engine:
        gone, answer = start(engine, prompt, options)
        deadline = time.monotonic() + TIMEOUT_S
        while target.lengths[0] == 0:
            assert time.monotonic() < deadline
        engine.cancel(gone)
        assert answer.wait() == "cancelled"
        sequence, tokens = decode(engine, prompt, options)
    assert tokens == decode_plainly(alone, prompt, options)[0]
    assert 0 < sequence.reused < len(prompt) - BLOCK
