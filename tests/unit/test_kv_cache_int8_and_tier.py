"""Cold blocks in int8, and blocks in a mapped file: how far off, how many more, and bit for bit the same."""

import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speculative_decoding.block_pool import BlockPool, pool_bytes
from speculative_decoding.kv_cache import KVCache
from speculative_decoding.kv_layout import CHUNK_FLOATS, BlockLayout, KeyValueShape, dequantize, quantize
from speculative_decoding.kv_memory import KVCacheSettings, anonymous_memory, tier_memory

from tests.key_values import TARGET, empty_slot, filled_slot, found, insert, make_cache

PLANES, HEADS, TOKENS, SIZE = 2, 3, 4, 5
FLOATS = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)


@given(st.lists(FLOATS, min_size=PLANES * HEADS * TOKENS * SIZE, max_size=PLANES * HEADS * TOKENS * SIZE))
@settings(max_examples=200)
def test_int8_is_off_by_half_a_scale_at_most_and_zero_stays_zero(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32).reshape(PLANES, HEADS, TOKENS, SIZE)
    codes, scales = np.zeros(values.shape, np.int8), np.zeros((PLANES, HEADS), np.float32)
    restored = np.empty_like(values)
    quantize(values, codes, scales)
    dequantize(codes, scales, restored)
    peak = np.abs(values).max(axis=(2, 3))
    np.testing.assert_allclose(scales, peak / 127, rtol=1e-6)
    bound = scales.astype(np.float64) * (0.5 + 1e-4)
    assert (np.abs(restored.astype(np.float64) - values) <= bound[:, :, None, None]).all()
    assert (restored[values == 0] == 0).all()


def test_a_block_larger_than_a_chunk_can_be_quantized_over_itself() -> None:
    model = KeyValueShape(layers=8, kv_heads=4, head_size=64)
    layout = BlockLayout(model, KeyValueShape(layers=3, kv_heads=2, head_size=64))
    pool = BlockPool(layout, 1, True, anonymous_memory(pool_bytes(layout, 1, True)))
    rng = np.random.default_rng(0)
    slots = [rng.standard_normal((m.planes, m.kv_heads, 16, m.head_size)).astype(np.float32) for m in layout.models]
    place = pool.take(int8=False)
    assert place and layout.floats > 2 * CHUNK_FLOATS
    for number, slot in enumerate(slots):
        pool.write(place, number, slot, 0)
    quarter = pool.quarter(place)
    pool.quantize(place, quarter, models=2)
    for number, slot in enumerate(slots):
        restored = np.empty_like(slot)
        pool.read(quarter, number, restored, 0)
        bound = np.abs(slot).max(axis=(2, 3), keepdims=True) / 127 * 0.5001
        assert (np.abs(restored - slot) <= bound).all()


def test_a_head_with_large_values_does_not_coarsen_another() -> None:
    values = np.ones((1, 2, 4, 4), np.float32)
    values[0, 1] = 1e6
    codes, scales = np.zeros(values.shape, np.int8), np.zeros((1, 2), np.float32)
    quantize(values, codes, scales)
    assert scales[0, 0] == pytest.approx(1 / 127)


def test_int8_blocks_hold_at_least_three_and_a_half_times_the_tokens() -> None:
    model = KeyValueShape(layers=2, kv_heads=4, head_size=64)
    slot = np.ones((model.planes, 4, 16, 64), np.float32)
    held = {}
    for int8 in (False, True):
        cache = KVCache(BlockLayout(model), KVCacheSettings(4 << 20, int8))
        for number in range(1000):
            cache.insert("ada", [number] * 16, slot)
        held[int8] = cache.snapshot().blocks
        assert cache.snapshot().counters.blocks_evicted
        cache.check_integrity()
    assert held[True] / held[False] >= 3.5


def test_only_cold_blocks_are_quantized_and_what_they_hold_is_near() -> None:
    cache = make_cache(16, int8=True)
    insert(cache, "ada", [1] * 33)
    hot = [2] * 9
    insert(cache, "ada", hot)
    for number in range(3, 13):
        assert found(cache, "ada", hot) == 8  # to the last bit
        insert(cache, "ada", [number] * 9)
        cache.check_integrity()
    metrics = cache.snapshot()
    assert metrics.blocks_int8 and metrics.counters.blocks_quantized and not metrics.counters.blocks_evicted
    assert found(cache, "ada", [1] * 33, tolerance=0.05) == 32
    with pytest.raises(AssertionError, match="off by"):
        found(cache, "ada", [1] * 33)


def test_blocks_in_use_are_not_quantized() -> None:
    cache = make_cache(4, int8=True)
    insert(cache, "ada", [1] * 17)
    prefix = cache.match("ada", [1] * 17)
    assert insert(cache, "ada", [2] * 9) == 0
    slot = empty_slot(TARGET)
    cache.copy_into(prefix, slot)
    assert (slot[:, :, :16] == filled_slot(TARGET, [1] * 16)[:, :, :16]).all()


def test_without_int8_nothing_is_ever_quantized() -> None:
    cache = make_cache(4)
    for number in range(20):
        insert(cache, "ada", [number] * 9)
    assert cache.snapshot().counters.blocks_quantized == cache.snapshot().blocks_int8 == 0


def test_what_is_pushed_out_comes_back_from_the_file_bit_for_bit(tmp_path: Path) -> None:
    cache = make_cache(4, tier_pages=30, tier_folder=tmp_path)
    prompts = [[number] * 17 for number in range(6)]
    for prompt in prompts:
        insert(cache, "ada", prompt)
    metrics = cache.snapshot()
    assert (metrics.blocks, metrics.tier_blocks, metrics.counters.blocks_evicted) == (4, 20, 20)
    for prompt in prompts * 2:
        assert found(cache, "ada", prompt) == 16
        cache.check_integrity()
    assert found(cache, "bob", prompts[0]) == 0
    assert cache.snapshot().counters.tier_hits > 40


def test_int8_blocks_come_back_from_the_file_with_the_same_codes(tmp_path: Path) -> None:
    cache = make_cache(4, int8=True, tier_pages=30, tier_folder=tmp_path)
    tokens = [1] * 17
    insert(cache, "ada", tokens)
    for number in range(2, 5):
        insert(cache, "ada", [number] * 17)

    def read() -> np.ndarray:
        prefix = cache.match("ada", tokens)
        slot = empty_slot(TARGET)
        cache.copy_into(prefix, slot)
        cache.release(prefix)
        assert prefix.tokens == 16
        return slot[:, :, :16].copy()

    before = read()
    hits = cache.snapshot().counters.tier_hits
    for number in range(5, 15):
        insert(cache, "ada", [number] * 17)
    assert (read() == before).all()
    assert cache.snapshot().counters.tier_hits == hits + 4


def test_the_file_has_a_budget_and_forgets_the_oldest_blocks(tmp_path: Path) -> None:
    cache = make_cache(2, tier_pages=4, tier_folder=tmp_path)
    for number in range(10):
        insert(cache, "ada", [number] * 9)
        cache.check_integrity()
    metrics = cache.snapshot()
    assert metrics.tier_bytes_used == metrics.tier_bytes_budget
    assert metrics.counters.tier_evicted == 14
    assert [found(cache, "ada", [number] * 9) for number in range(8)] == [0] * 7 + [8]


def test_a_prefix_that_does_not_fit_beside_blocks_in_use_is_found_in_part(tmp_path: Path) -> None:
    cache = make_cache(4, tier_pages=8, tier_folder=tmp_path)
    long, short = [1] * 17, [2] * 9
    insert(cache, "ada", long)
    insert(cache, "ada", short)
    prefix = cache.match("ada", short)
    assert found(cache, "ada", long) == 8
    cache.release(prefix)
    assert found(cache, "ada", long) == 16
    cache.check_integrity()


def test_the_file_has_no_name_that_others_could_open_and_its_space_is_reserved(tmp_path: Path) -> None:
    folder = tmp_path / "tier"
    memory = tier_memory(folder, 1 << 20)
    assert list(folder.iterdir()) == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    open_files = [path for path in Path("/proc/self/fd").iterdir() if path.exists()]
    mapped = [path.stat() for path in open_files if str(folder) in str(path.readlink())]
    assert [status.st_blocks * 512 >= 1 << 20 for status in mapped] == [True]
    memory.close()


def test_a_file_that_does_not_fit_on_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="tier_folder has no room for"):
        tier_memory(tmp_path, 1 << 62)
