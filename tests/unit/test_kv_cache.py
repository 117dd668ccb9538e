"""The key/value cache: prefixes found for their tenant alone, a budget, an order of eviction, pins, and threads."""

import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from speculative_decoding import kv_memory, prefix_tree
from speculative_decoding.kv_cache import KVCache
from speculative_decoding.kv_integrity import IntegrityError
from speculative_decoding.kv_layout import BlockLayout, KeyValueShape
from speculative_decoding.kv_memory import BOOKKEEPING_BYTES, KVCacheSettings, default_kv_cache_bytes
from speculative_decoding.prefix_tree import PrefixTree

from tests.key_values import CONTEXT, DRAFT, TARGET, Clock, empty_slot, filled_slot, found, insert, make_cache

ROOT = Path(__file__).parents[2]
PROMPT = list(range(1, 14))  # three blocks of four tokens and one token
FILLER = """
import re
from pathlib import Path
import numpy as np
from speculative_decoding.kv_cache import KVCache
from speculative_decoding.kv_layout import BlockLayout, KeyValueShape
from speculative_decoding.kv_memory import KVCacheSettings
import sys

def resident() -> int:
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

BUDGET, CONTEXT = 64 << 20, 512
int8, tier = sys.argv[1] == "int8", int(sys.argv[2])
models = KeyValueShape(4, 4, 64), KeyValueShape(1, 4, 64)
slots = [np.ones((model.planes, 4, CONTEXT, 64), np.float32) for model in models]
cache = KVCache(BlockLayout(*models), KVCacheSettings(BUDGET, int8, tier, Path(sys.argv[3]) if tier else None))
before = most = resident()
for number in range(60 if int8 else 20):
    tokens = [number] * CONTEXT
    prefix = cache.match("ada", tokens)
    cache.copy_into(prefix, *slots)
    cache.insert("ada", tokens, slots[0], slots[1], CONTEXT)
    cache.release(prefix)
    most = max(most, resident())
metrics = cache.snapshot()
assert metrics.counters.blocks_evicted > 0, "the budget was never reached"
print(BUDGET, most - before, metrics.bytes_used)
"""


def test_the_longest_stored_prefix_is_found_and_its_last_token_left_to_compute() -> None:
    cache = make_cache(8)
    assert insert(cache, "ada", PROMPT) == 12
    assert found(cache, "ada", PROMPT) == 12
    assert found(cache, "ada", PROMPT[:12]) == 8  # the logits of the twelfth token are wanted
    assert found(cache, "ada", [*PROMPT[:9], 99, 98, 97, 96]) == 8
    assert found(cache, "ada", [99, *PROMPT[1:]]) == 0
    assert found(cache, "ada", PROMPT[4:]) == 0, "keys depend on positions: only prefixes can be reused"
    assert found(cache, "ada", [1]) == found(cache, "ada", []) == 0


def test_a_tenant_finds_nothing_of_another() -> None:
    cache = make_cache(8)
    insert(cache, "ada", PROMPT)
    assert found(cache, "bob", PROMPT) == found(cache, "", PROMPT) == found(cache, "ada ", PROMPT) == 0
    insert(cache, "bob", PROMPT)
    assert cache.snapshot().blocks == 6, "what two tenants store is stored twice"
    cache.check_integrity()


def test_the_same_tokens_have_another_hash_for_every_tenant_and_in_every_process() -> None:
    trees = [PrefixTree(4), PrefixTree(4)]
    block = trees[0].split([1, 2, 3, 4])[0]
    nodes = [tree.add(tenant, None, block) for tree in trees for tenant in ("ada", "bob")]
    assert len({node.digest for node in nodes if node}) == 4


def test_blocks_whose_hashes_collide_are_told_apart_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "chain", lambda previous, tokens: tokens[:1])
    cache = make_cache(8)
    assert insert(cache, "ada", [1, 1, 1, 1, 2, 2, 2, 2, 0]) == 8
    assert found(cache, "ada", [1, 1, 1, 9, 2, 2, 2, 2, 0]) == 0
    assert found(cache, "ada", [2, 2, 2, 2, 0]) == 0
    assert found(cache, "bob", [1, 1, 1, 1, 0]) == 0
    assert insert(cache, "bob", [1, 1, 1, 1, 0]) == 0
    assert found(cache, "ada", [1, 1, 1, 1, 2, 2, 2, 2, 0]) == 8
    assert cache.snapshot().counters.hash_collisions == 1


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tier_bytes", [0, 32 << 20])
def test_the_process_never_takes_more_memory_than_the_budget(tmp_path: Path, int8: bool, tier_bytes: int) -> None:
    arguments = ["int8" if int8 else "fp32", str(tier_bytes), str(tmp_path)]
    process = subprocess.run(
        [sys.executable, "-c", FILLER, *arguments], cwd=ROOT / "python_backends", capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    budget, taken, claimed = map(int, process.stdout.split())
    assert claimed <= budget
    assert 0.9 * budget < taken <= budget + (1 << 20), "the interpreter's own allocations are within the megabyte"


def test_keeping_track_of_a_block_takes_no_more_than_is_set_aside_for_it() -> None:
    model = KeyValueShape(1, 1, 1)
    cache = KVCache(BlockLayout(model), KVCacheSettings(8 << 20))
    slot = np.zeros((2, 1, 16, 1), np.float32)
    blocks = 4000
    tracemalloc.start()
    for number in range(blocks):
        cache.insert("ada", [number] * 16, slot)
        cache.release(cache.match("ada", [number] * 17))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cache.snapshot().blocks == blocks
    assert taken <= blocks * BOOKKEEPING_BYTES


def test_the_least_recently_used_prefix_goes_first() -> None:
    cache = make_cache(4)
    old, new = [1] * 9, [2] * 9
    insert(cache, "ada", old)
    insert(cache, "ada", new)
    assert found(cache, "ada", old) == 8  # now the other is the older
    insert(cache, "ada", [3] * 5)
    insert(cache, "ada", [4] * 5)
    assert (found(cache, "ada", new), found(cache, "ada", old)) == (0, 8)


def test_of_the_least_recently_used_prefix_the_beginning_stays_longest() -> None:
    cache = make_cache(4)
    insert(cache, "ada", [1] * 13)
    insert(cache, "ada", [2] * 9)
    assert (found(cache, "ada", [1] * 13), found(cache, "ada", [2] * 9)) == (8, 8)


def test_a_shared_prefix_outlives_the_branches_that_follow_it() -> None:
    cache = make_cache(5)
    shared = [7] * 8
    for branch in range(20):
        assert insert(cache, "ada", [*shared, *[branch] * 4, 0]) == 12
        assert found(cache, "ada", [*shared, 99]) == 8
        cache.check_integrity()
    assert cache.snapshot().counters.blocks_evicted == 17


def test_blocks_in_use_are_never_evicted_and_a_full_cache_only_misses() -> None:
    cache = make_cache(3)
    insert(cache, "ada", PROMPT)
    prefix = cache.match("ada", PROMPT)
    other = [9] * 9
    assert insert(cache, "ada", other) == 0
    assert found(cache, "ada", other) == 0
    assert cache.snapshot().counters.blocks_refused == 2
    slot = empty_slot(TARGET)
    cache.copy_into(prefix, slot)
    assert (slot[:, :, :12] == filled_slot(TARGET, PROMPT)[:, :, :12]).all()
    cache.release(prefix)
    assert insert(cache, "ada", other) == 8


def test_a_prompt_larger_than_the_cache_keeps_its_beginning() -> None:
    cache = make_cache(3)
    tokens = list(range(40))
    assert insert(cache, "ada", tokens) == 12
    assert found(cache, "ada", tokens) == 12


def test_a_prefix_is_released_once_and_not_read_afterwards() -> None:
    cache = make_cache(3)
    insert(cache, "ada", PROMPT)
    prefix = cache.match("ada", PROMPT)
    cache.release(prefix)
    with pytest.raises(ValueError, match="released before"):
        cache.release(prefix)
    with pytest.raises(ValueError, match="its blocks may be gone"):
        cache.copy_into(prefix, empty_slot(TARGET))


def test_pinned_blocks_stay_until_their_time_is_over() -> None:
    clock = Clock()
    cache = make_cache(6, clock=clock)
    insert(cache, "ada", PROMPT)
    assert cache.pin("session", "ada", PROMPT, ttl_s=60.0) == 12
    insert(cache, "ada", [9] * CONTEXT)
    assert found(cache, "ada", PROMPT) == 12
    assert cache.snapshot().blocks_pinned == 3
    clock.now = 60.0
    insert(cache, "ada", [8] * CONTEXT)
    assert found(cache, "ada", PROMPT) == 0
    assert cache.snapshot().blocks_pinned == 0


def test_a_new_pin_replaces_the_owners_last_and_unpinning_lets_go() -> None:
    cache = make_cache(12)
    insert(cache, "ada", [1] * 9)
    insert(cache, "ada", [1] * 4 + [2] * 9)
    cache.pin("session", "ada", [1] * 9, 60.0)
    cache.pin("other", "ada", [1] * 9, 60.0)
    cache.pin("session", "ada", [1] * 4 + [2] * 9, 60.0)
    assert cache.snapshot().blocks_pinned == 4
    cache.unpin("other")
    assert cache.snapshot().blocks_pinned == 3
    cache.unpin("session")
    cache.unpin("session")
    assert cache.snapshot().blocks_pinned == 0
    cache.check_integrity()


def test_sessions_pin_half_of_the_pool_at_most() -> None:
    cache = make_cache(8)
    insert(cache, "ada", list(range(24)))
    assert cache.pin("session", "ada", list(range(24)), 60.0) == 16
    assert cache.snapshot().counters.pins_refused == 2
    insert(cache, "bob", [5] * 17)
    assert cache.pin("greedy", "bob", [5] * 17, 60.0) == 0
    assert cache.pin("session", "ada", list(range(24)), 60.0) == 16
    cache.check_integrity()


def test_blocks_stored_without_a_draft_serve_the_target_and_get_the_drafts_part_later() -> None:
    cache = make_cache(8)
    insert(cache, "ada", PROMPT, draft=False)
    prefix = cache.match("ada", PROMPT)
    assert (prefix.tokens, prefix.draft_tokens) == (12, 0)
    cache.release(prefix)
    cache.insert("ada", PROMPT, filled_slot(TARGET, PROMPT), filled_slot(DRAFT, PROMPT), draft_tokens=11)
    prefix = cache.match("ada", PROMPT)
    assert (prefix.tokens, prefix.draft_tokens) == (12, 8)
    cache.release(prefix)
    assert found(cache, "ada", PROMPT) == 12


def test_a_stored_block_is_never_written_again() -> None:
    cache = make_cache(8)
    insert(cache, "ada", PROMPT)
    wrong = np.zeros_like(filled_slot(TARGET, PROMPT))
    cache.insert("ada", PROMPT, wrong)
    assert found(cache, "ada", PROMPT) == 12


def test_metrics_count_what_happened() -> None:
    cache = make_cache(3)
    insert(cache, "ada", PROMPT)
    prefix = cache.match("ada", PROMPT)
    metrics = cache.snapshot()
    assert (metrics.counters.tokens_reused, metrics.counters.tokens_computed) == (12, 1)
    assert (metrics.blocks, metrics.blocks_in_use, metrics.blocks_int8) == (3, 3, 0)
    assert metrics.bytes_used == metrics.bytes_budget
    cache.release(prefix)
    insert(cache, "bob", PROMPT)
    assert cache.snapshot().counters.blocks_evicted == 3


@pytest.mark.parametrize("shape", [(1, 2, CONTEXT, 4), (4, 1, CONTEXT, 4), (4, 2, CONTEXT, 1)])
def test_a_slot_of_another_model_is_refused(shape: tuple[int, ...]) -> None:
    cache = make_cache(3)
    with pytest.raises(ValueError, match=r"the target's slot is float32 .* it must be float32 \[4, 2, context, 4\]"):
        cache.insert("ada", PROMPT, np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="this cache is for a target alone"):
        make_cache(3, draft=False).insert("ada", PROMPT, empty_slot(TARGET), empty_slot(DRAFT))


def test_budgets_that_hold_no_block_are_refused_with_what_one_takes() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_bytes is 1000; one block of this model needs \d+"):
        KVCache(BlockLayout(TARGET), KVCacheSettings(1000))
    with pytest.raises(ValueError, match="tier_bytes is 10, but tier_folder is not set"):
        KVCacheSettings(1 << 20, tier_bytes=10)
    with pytest.raises(ValueError, match=r"tier_bytes is 10; one block of this model needs"):
        KVCache(BlockLayout(TARGET), KVCacheSettings(1 << 20, tier_bytes=10, tier_folder=Path()))


def test_the_default_budget_is_a_quarter_of_what_is_free_to_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < default_kv_cache_bytes() < 1 << 50
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    monkeypatch.setattr(kv_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(kv_memory, "CGROUP", tmp_path)
    assert default_kv_cache_bytes() == 2000 * 1024
    (tmp_path / "memory.current").write_text("1048576\n")
    for limit, budget in (("max", 2000 * 1024), ("5242880", 1 << 20), ("1000", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert default_kv_cache_bytes() == budget


def test_integrity_is_checked_for_real() -> None:
    def damage(cache: KVCache, name: str) -> None:
        node = next(iter(cache._tree))
        setattr(node, name, {"tokens": b"other", "place": None}.get(name, 7))

    for name in ("refs", "pins", "tokens", "place", "children", "depth", "models"):
        cache = make_cache(4)
        insert(cache, "ada", PROMPT)
        cache.check_integrity()
        damage(cache, name)
        with pytest.raises(IntegrityError):
            cache.check_integrity()


@pytest.mark.parametrize("int8", [False, True])
def test_threads_that_evict_each_others_blocks_never_read_wrong_ones(tmp_path: Path, int8: bool) -> None:
    cache = make_cache(12, int8=int8, tier_pages=6, tier_folder=tmp_path, clock=None)
    deadline = time.monotonic() + 2.0
    failures: list[BaseException] = []
    rounds = [0] * 4

    def work(worker: int) -> None:
        rng = np.random.default_rng(worker)
        try:
            while time.monotonic() < deadline:
                tokens = [*[1] * 8, *rng.integers(0, 2, 12).tolist()]
                tenant = ("ada", "bob")[int(rng.integers(2))]
                found(cache, tenant, tokens, tolerance=0.1 if int8 else 0.0)
                insert(cache, tenant, tokens)
                cache.pin(worker, tenant, tokens, 60.0)
                rounds[worker] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(len(rounds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert min(rounds) > 3
    cache.check_integrity()
    assert cache.snapshot().blocks_in_use == 0
    assert cache.snapshot().counters.blocks_evicted > 0
