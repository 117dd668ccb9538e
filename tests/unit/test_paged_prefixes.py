"""What a paged cache keeps: pinned blocks on the device, those pushed out on the host, and who finds what."""

import random

import numpy as np
import pytest
from speculative_decoding.device import HostDevice
from speculative_decoding.execution_provider import CPU
from speculative_decoding.host_tier import HostTier
from speculative_decoding.kv_integrity import IntegrityError
from speculative_decoding.paged_blocks import BlockAllocator
from speculative_decoding.paged_prefixes import PagedPrefixes

from tests.key_values import Clock

SIZE, PLANES = 4, 2


class Bench:
    """Prefixes over a memory in which each block holds the tokens that it is said to have."""

    def __init__(self, most: int, in_tier: int, slots: int = 8) -> None:
        blocks = 1 + most + slots
        self.memory = np.zeros((PLANES, blocks, SIZE), np.int32)
        tier = HostTier(HostDevice(CPU), self.memory, in_tier) if in_tier else None
        self.clock = Clock()
        self.prefixes = PagedPrefixes(SIZE, most, 100, tier, self.clock)
        self.allocator = self.prefixes.allocator = BlockAllocator(blocks, self.prefixes.evict)

    def compute(self, tenant: str, tokens: list[int]) -> int:
        """Do what a slot does with a prompt: look it up, compute the rest, keep it; return what was found."""
        hit = self.prefixes.match(tenant, tokens)
        for number, block in enumerate(hit.blocks):
            begin = number * SIZE
            found = min(SIZE, hit.tokens - begin)
            assert (self.memory[:, block, :found] == tokens[begin : begin + found]).all()
        table = list(hit.blocks)
        if table and self.allocator.is_shared(table[-1]) and hit.tokens % SIZE:
            own = self.allocator.take()
            self.memory[:, own] = self.memory[:, table[-1]]
            self.allocator.release([table[-1]])
            table[-1] = own
        while len(table) * SIZE < len(tokens):
            table.append(self.allocator.take())
        for place in range(hit.tokens, len(tokens)):
            self.memory[:, table[place // SIZE], place % SIZE] = tokens[place]
        self.prefixes.insert(tenant, tokens, table)
        self.prefixes.check_integrity()
        self.allocator.release(table)
        return hit.tokens

    def found(self, tenant: str, tokens: list[int]) -> int:
        hit = self.prefixes.match(tenant, tokens)
        self.allocator.release(hit.blocks)
        self.prefixes.check_integrity()
        return hit.tokens


def prompt(first: int, length: int = 8) -> list[int]:
    return list(range(100 * first, 100 * first + length))


def test_what_is_pushed_off_the_device_comes_back_from_the_host() -> None:
    bench = Bench(most=4, in_tier=2)
    for first in (1, 2, 3, 4):
        assert bench.compute("a", prompt(first)) == 0
    before = bench.prefixes.snapshot()
    assert (before.blocks, before.tier_blocks, before.tier_bytes_used, before.tier_bytes_budget) == (4, 2, 200, 200)
    assert bench.found("a", prompt(4, 9)) == bench.found("a", prompt(3, 9)) == 8
    assert bench.prefixes.snapshot().counters.tier_hits == 0
    assert bench.found("a", prompt(1, 9)) == 0  # the least recently used one is gone for good
    assert bench.found("a", prompt(2, 9)) == 8
    after = bench.prefixes.snapshot()
    assert (after.blocks, after.tier_blocks, after.counters.tier_hits) == (4, 2, 2)
    assert (after.counters.tier_evicted, after.counters.blocks_evicted) == (2, 6)
    assert bench.found("a", prompt(4, 9)) == 8  # pushed out by the second, and back


def test_without_a_tier_what_is_pushed_off_the_device_is_gone() -> None:
    bench = Bench(most=4, in_tier=0)
    for first in (1, 2, 3):
        bench.compute("a", prompt(first))
    assert [bench.found("a", prompt(first, 9)) for first in (1, 2, 3)] == [0, 8, 8]


def test_a_tier_of_one_block_never_loses_what_is_being_fetched() -> None:
    bench = Bench(most=2, in_tier=1)
    for first in (1, 2, 1, 2, 3, 1):
        bench.compute("a", prompt(first, 5))
    rng = random.Random(0)
    for _ in range(300):
        bench.compute("a", prompt(rng.randrange(3), rng.randrange(1, 8)))


def test_pinned_blocks_stay_on_the_device_half_of_it_at_most_and_until_their_time() -> None:
    bench = Bench(most=4, in_tier=0)
    bench.compute("a", prompt(1))
    assert bench.prefixes.pin("session", "b", prompt(1), 10) == 0  # another tenant's
    assert bench.prefixes.pin("session", "a", prompt(1), 10) == 8
    assert bench.prefixes.pin("other", "a", prompt(1), 10) == 8  # the same blocks
    bench.compute("a", prompt(2))
    assert bench.prefixes.pin("too many", "a", prompt(2), 10) == 0
    assert bench.prefixes.snapshot().counters.pins_refused == 2
    for first in range(3, 9):
        bench.compute("a", prompt(first))
    assert bench.prefixes.snapshot().blocks_pinned == 2
    assert bench.found("a", prompt(1, 9)) == 8
    bench.prefixes.unpin("other")
    assert bench.prefixes.snapshot().blocks_pinned == 2
    bench.clock.now += 10
    for first in range(3, 9):
        bench.compute("a", prompt(first))
    assert bench.prefixes.snapshot().blocks_pinned == 0
    assert bench.found("a", prompt(1, 9)) == 0


def test_blocks_that_find_no_room_are_not_kept_and_counted() -> None:
    bench = Bench(most=2, in_tier=2)
    bench.compute("a", prompt(1, 4))
    assert bench.prefixes.pin("session", "a", prompt(1, 4), 10) == 4
    assert bench.compute("a", prompt(2, 20)) == 0
    assert bench.prefixes.snapshot().counters.blocks_refused == 4  # one found room
    assert bench.found("a", prompt(2, 20)) == 4


@pytest.mark.parametrize("in_tier", [0, 1, 5])
def test_whatever_happens_what_is_found_is_right_and_all_adds_up(in_tier: int) -> None:
    rng = random.Random(in_tier)
    bench = Bench(most=6, in_tier=in_tier)
    for turn in range(2000):
        tenant, first = rng.choice("ab"), rng.randrange(3)
        tokens = prompt(first, rng.randrange(1, 17)) + [rng.randrange(3) for _ in range(rng.randrange(8))]
        if rng.random() < 0.15:
            bench.prefixes.pin(rng.randrange(4), tenant, tokens, rng.randrange(1, 30))
        elif rng.random() < 0.05:
            bench.prefixes.unpin(rng.randrange(4))
        else:
            bench.compute(tenant, tokens)
        bench.clock.now += 1
        bench.prefixes.check_integrity()
        if turn % 100 == 0:
            assert all(bench.allocator.references(block) == 1 for block in bench.prefixes.held())
    assert bench.prefixes.snapshot().counters.tokens_reused > 1000


def test_a_check_finds_what_does_not_add_up() -> None:
    bench = Bench(most=4, in_tier=2)
    bench.compute("a", prompt(1))
    next(iter(bench.prefixes._nodes)).pins += 1
    with pytest.raises(IntegrityError, match="counts other pins"):
        bench.prefixes.check_integrity()
    assert bench.prefixes.snapshot().counters.integrity_errors == 1
