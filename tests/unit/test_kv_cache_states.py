"""The key/value cache against a plain model: whatever happens, what it finds is what was stored."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from speculative_decoding.kv_cache import Prefix

from tests.key_values import CONTEXT, DRAFT, TARGET, Clock, empty_slot, filled_slot, found, make_cache, values

BLOCK = 4
SYSTEM_PROMPTS = ([], [1] * 8, [1] * 8 + [2] * 9, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
TENANTS = ("ada", "bob")
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=10)
INT8_TOLERANCE = 0.1  # the largest number drawn is near 10, and a scale a 127th of it


@dataclass(eq=False)
class Running:
    """A sequence in a slot of its own, as the engine has it."""

    tenant: str
    prefix: Prefix
    tokens: list[int]
    drafted: bool
    slots: tuple[np.ndarray, np.ndarray] = field(default_factory=lambda: (empty_slot(TARGET), empty_slot(DRAFT)))
    counts: list[int] = field(default_factory=lambda: [0, 0])

    def __post_init__(self) -> None:
        self.places = [node.place for node in self.prefix.nodes]

    def compute(self) -> None:
        """Have both models compute what their slots lack."""
        for model, slot in enumerate(self.slots[: 1 + self.drafted]):
            for position in range(self.counts[model], len(self.tokens)):
                slot[:, :, position] = values((TARGET, DRAFT)[model], self.tokens[: position + 1])
            self.counts[model] = len(self.tokens)


class KVCacheMachine(RuleBasedStateMachine):
    """Admits, commits, rewinds, forks, evicts, pins and closes; `stored` knows every prefix ever inserted."""

    @initialize(
        pages=st.integers(1, 40), int8=st.booleans(), tier_pages=st.sampled_from([0, 1, 3, 20]), draft=st.booleans()
    )
    def start(self, pages: int, int8: bool, tier_pages: int, draft: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        tier = Path(self.folder.name) if tier_pages else None
        self.cache = make_cache(pages, draft, int8, tier_pages, tier, BLOCK, self.clock)
        self.draft = draft
        self.tolerance = INT8_TOLERANCE if int8 else 0.0
        self.stored: set[tuple[str, tuple[int, ...]]] = set()
        self.running: list[Running] = []
        self.junk = 100

    @rule(tenant=st.sampled_from(TENANTS), system=st.sampled_from(SYSTEM_PROMPTS), more=TOKENS, drafted=st.booleans())
    def admit(self, tenant: str, system: list[int], more: list[int], drafted: bool) -> None:
        self._admit(tenant, system + more, drafted)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=TOKENS)
    def commit(self, data: st.DataObject, more: list[int]) -> None:
        sequence = self._any(data)
        sequence.tokens = (sequence.tokens + more)[:CONTEXT]
        self._store(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), length=st.integers(1, CONTEXT))
    def rewind(self, data: st.DataObject, length: int) -> None:
        sequence = self._any(data)
        del sequence.tokens[length:]
        sequence.counts = [min(count, length) for count in sequence.counts]

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=TOKENS)
    def fork(self, data: st.DataObject, more: list[int]) -> None:
        sequence = self._any(data)
        self._admit(sequence.tenant, (sequence.tokens + more)[:CONTEXT], sequence.drafted)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ttl_s=st.integers(1, 20))
    def pin(self, data: st.DataObject, ttl_s: int) -> None:
        sequence = self._any(data)
        pinned = self.cache.pin(id(sequence), sequence.tenant, sequence.tokens, ttl_s)
        assert pinned <= len(sequence.tokens)

    @rule(seconds=st.integers(1, 10))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(blocks=st.integers(1, 12))
    def evict(self, blocks: int) -> None:
        """Another tenant fills the cache with what nobody asks for again."""
        self.junk += 1
        tokens = [self.junk] * (blocks * BLOCK)
        self.cache.insert("eve", tokens, filled_slot(TARGET, tokens))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        sequence = self._any(data)
        self.running.remove(sequence)
        self.cache.release(sequence.prefix)
        self.cache.unpin(id(sequence))

    @invariant()
    def everything_adds_up(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity()
            for sequence in self.running:
                assert [node.place for node in sequence.prefix.nodes] == sequence.places, "a block in use was moved"

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for sequence in self.running:
            self.cache.release(sequence.prefix)
            self.cache.unpin(id(sequence))
        self.cache.check_integrity()
        for tenant, tokens in self.stored:
            self._lookup(tenant, [*tokens, 0])
            self._lookup(tenant, list(tokens))
        metrics = self.cache.snapshot()
        assert (metrics.blocks_in_use, metrics.blocks_pinned) == (0, 0)
        self.folder.cleanup()

    def _admit(self, tenant: str, tokens: list[int], drafted: bool) -> None:
        self._lookup(tenant, tokens)
        sequence = Running(tenant, self.cache.match(tenant, tokens), list(tokens), drafted and self.draft)
        self.cache.copy_into(sequence.prefix, sequence.slots[0], sequence.slots[1] if self.draft else None)
        sequence.counts = [sequence.prefix.tokens, sequence.prefix.draft_tokens]
        self.running.append(sequence)
        self._store(sequence)

    def _store(self, sequence: Running) -> None:
        sequence.compute()
        draft = (sequence.slots[1], sequence.counts[1]) if self.draft else ()
        stored = self.cache.insert(sequence.tenant, sequence.tokens, sequence.slots[0], *draft)
        for length in range(BLOCK, stored + 1, BLOCK):
            self.stored.add((sequence.tenant, tuple(sequence.tokens[:length])))

    def _lookup(self, tenant: str, tokens: list[int]) -> None:
        """What is found is right, was stored by this tenant, and where nothing was evicted all of it is found."""
        tokens = tokens[:CONTEXT]
        length = found(self.cache, tenant, tokens, self.tolerance, self.draft)
        assert length < len(tokens) and length % BLOCK == 0
        known = [end for end in range(BLOCK, len(tokens), BLOCK) if (tenant, tuple(tokens[:end])) in self.stored]
        assert length in (0, *known)
        if not self.cache.snapshot().counters.blocks_evicted:
            assert length == max(known, default=0)

    def _any(self, data: st.DataObject) -> Running:
        return self.running[data.draw(st.integers(0, len(self.running) - 1))]


KVCacheMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestKVCacheStates = KVCacheMachine.TestCase
