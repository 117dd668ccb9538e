"""The flow of the cache: the same bytes, then the same question, else a miss to be stored later."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from semantic_cache.bound import FalseHits, exploration_probability
from semantic_cache.guard import GuardedReads
from semantic_cache.pending import Pending, PendingLookups
from semantic_cache.policy import Policy
from semantic_cache.records import Entry, Found, Hit, Observation, Usage, Vector
from semantic_cache.request import Answer, Lookup
from semantic_cache.store import Loading, Store, StoreError
from semantic_cache.uses import Uses
from semantic_cache.verifier.verifier import Verdict

SLACK = 100  # once over its limit, this part of the store is emptied: so that not every answer has to evict another
CANDIDATES = 5  # taken from the int8 index and judged in fp32

Embed = Callable[[Sequence[str]], list[Vector | None]]
Report = Callable[[str, Exception], None]


class Judge(Protocol):
    """Says which of the stored prompts, given with their cosines, ask the same as a prompt, one after the other."""

    def verdicts(self, prompt: str, candidates: Sequence[tuple[str, float]]) -> Iterator[Verdict]: ...


class Outcome(NamedTuple):
    """What a lookup came to.

    source: exact, semantic, miss or off. answer: empty unless a hit. entry: handle to store an answer under, empty
    unless there is something to store. similarity: cosine to the nearest stored prompt, None when none was compared.
    info: JSON object stored with the answer. reason: why it is a miss. refusals: why the verifier refused candidates.
    flight: requests of the same flight may share one answer. asked: when the lookup came in, in seconds of the
    monotonic clock. hit: what was served by meaning.
    """

    source: str
    lookup_ms: float
    embed_ms: float = 0.0
    answer: str = ""
    entry: str = ""
    similarity: float | None = None
    info: str = "{}"
    reason: str = ""
    refusals: tuple[str, ...] = ()
    flight: str = ""
    asked: float = 0.0
    hit: Hit | None = None
    verify_ms: float = 0.0

    def to_json(self) -> str:
        """Return the outcome, less answer and entry, as the model's output `cache_info`."""
        own = {
            "source": self.source,
            "similarity": None if self.similarity is None else round(self.similarity, 4),
            "milliseconds": {"lookup": round(self.lookup_ms, 3), "embed": round(self.embed_ms, 3)},
        }
        shared = {"flight": self.flight, "asked": self.asked} if self.flight else {}
        return json.dumps({**json.loads(self.info), **own, **shared})


class _Search(NamedTuple):
    """What came of the candidates of one lookup."""

    hit: Hit | None
    reason: str
    similarity: float | None = None
    refusals: tuple[str, ...] = ()
    verify_ms: float = 0.0
    passed_over: Hit | None = None


class SemanticCache:
    """Answers lookups in two steps, exact() and, where that cannot tell, search(); put() stores what was missed.

    Each of the three may run on a thread of its own, but each on one only. `embed` maps prompts to unit vectors, None
    for a prompt that it cannot represent. `verifier` is None in plain mode. Errors in finding an answer are misses:
    `report` gets their stage and text.
    """

    def __init__(
        self,
        policy: Policy,
        store: Store,
        reads: GuardedReads,
        embed: Embed,
        verifier: Judge | None,
        report: Report,
        clock: Callable[[], float] = time.time,
        seed: int | None = None,
    ) -> None:
        self._policy = policy
        self._store = store
        self._reads = reads
        self._embed = embed
        self._verifier = verifier
        self._report = report
        self._clock = clock
        self._random = random.Random(seed)
        self._pending = PendingLookups()
        self._uses = Uses()
        self._limit = Usage(policy.max_entries, policy.max_bytes)
        self._room = Usage(*(most - most // SLACK for most in self._limit))
        self._usage = store.usage()
        self._evicted = 0
        self._lock = threading.Lock()
        self.false_hits = FalseHits(policy.false_hit_budget)
        self.false_hits.load(store.checks())

    def exact(self, lookup: Lookup) -> Outcome | None:
        """Find the same prompt without embedding it; None: search() must decide."""
        if lookup.mode == "off" or not lookup.stores:
            return Outcome("off", _elapsed_ms(lookup))
        if lookup.mode == "refresh":
            return None
        try:
            found = self._reads.get(lookup.key, self._clock())
        except StoreError as error:
            self._report("exact", error)
            return None
        if found is None or not self._is_young(found, lookup):
            return None
        self._uses.add(lookup.key)
        return Outcome("exact", _elapsed_ms(lookup), answer=found.answer, info=found.info)

    def search(self, lookups: Sequence[Lookup]) -> list[Outcome]:
        """Find prompts that ask the same, embedding all of `lookups` at once. Never raises."""
        started = time.perf_counter()
        vectors, failed = self._vectors(lookups)
        embed_ms = (time.perf_counter() - started) * 1e3
        return [
            self._decide(lookup, vector, embed_ms, "embed_error" if failed else "too_long")
            for lookup, vector in zip(lookups, vectors, strict=True)
        ]

    def put(self, answers: Sequence[Answer]) -> list[str]:
        """Store answers durably; return for each "stored", "unknown_entry" or "empty_answer". Raises StoreError."""
        results, entries, compared = [], [], []
        for answer in answers:
            pending = self._pending.take(answer.entry)
            if pending is None:
                results.append("unknown_entry")
            elif not answer.text:
                results.append("empty_answer")
            else:
                results.append("stored")
                entries.append(self._entry(pending, answer))
                compared.append((pending, answer.text))
        if entries:
            self.store(entries)
        for pending, text in compared:
            self._learn(pending, text)
        return results

    def store(self, entries: Sequence[Entry]) -> None:
        """Store entries, and evict others when the store is over its limit. Raises StoreError."""
        self._store.put(entries)
        added = sum(entry.bytes for entry in entries)
        self._usage = Usage(self._usage.entries + len(entries), self._usage.bytes + added)
        if self._is_over(self._usage):
            self._make_room()

    def tidy(self) -> tuple[int, Usage]:
        """Purge and evict; return how many were evicted since the last call, and what is left. Raises StoreError.

        Learns what other servers have found out about false hits, too. On any thread.
        """
        self._make_room()
        self.false_hits.load(self._store.checks())
        with self._lock:
            evicted, self._evicted = self._evicted, 0
        return evicted, self._usage

    def _make_room(self) -> None:
        now = self._clock()
        if uses := self._uses.take():
            self._store.touch(uses, now)
        self._store.purge(now)
        self._usage = self._store.usage()
        if self._is_over(self._usage):
            evicted = self._store.evict(self._policy.eviction, self._room)
            self._usage = self._store.usage()
            with self._lock:
                self._evicted += evicted

    def observe(self, lookup: Lookup, hit: Hit, decoded: str) -> bool:
        """Compare what was found with what was decoded for the same prompt, for all servers; return whether it fits.

        Raises StoreError, and what the embedder raises.
        """
        correct = self._is_same_answer(hit.candidate.found.answer, decoded)
        self._store.check(lookup.key.partition, correct)
        self.false_hits.add(lookup.key.partition, correct)
        self._store.observe([Observation(hit.candidate.key, hit.similarity, correct, self._clock())])
        return correct

    def _decide(self, lookup: Lookup, vector: Vector | None, embed_ms: float, without_vector: str) -> Outcome:
        search = _Search(None, without_vector if vector is None else "refresh")
        if vector is not None and lookup.mode != "refresh":
            search = self._search(lookup, vector)
        if search.hit:
            self._uses.add(search.hit.candidate.key)
            found = search.hit.candidate.found
            return Outcome(
                "semantic", _elapsed_ms(lookup) - embed_ms, embed_ms, found.answer, "", search.hit.similarity,
                found.info, hit=search.hit, verify_ms=search.verify_ms, refusals=search.refusals,
            )  # fmt: skip
        entry = "" if lookup.mode == "only" else self._pending.add(Pending(lookup, vector, search.passed_over))
        return Outcome(
            "miss", _elapsed_ms(lookup) - embed_ms, embed_ms, entry=entry, similarity=search.similarity,
            reason=search.reason, refusals=search.refusals, flight=lookup.flight, asked=lookup.received,
            verify_ms=search.verify_ms,
        )  # fmt: skip

    def _search(self, lookup: Lookup, vector: Vector) -> _Search:
        try:
            candidates = self._reads.nearest(lookup.key.partition, vector, CANDIDATES, self._clock())
        except Loading:
            return _Search(None, "loading")
        except StoreError as error:
            self._report("search", error)
            return _Search(None, "store_error")
        young = [candidate for candidate in candidates if self._is_young(candidate.found, lookup)]
        if not young:
            return _Search(None, "too_old" if candidates else "nothing_near")
        hits = [Hit(candidate, float(np.dot(vector, candidate.vector))) for candidate in young]
        try:
            return self._judge(lookup, sorted(hits, key=lambda hit: -hit.similarity))
        except StoreError as error:
            self._report("search", error)
            return _Search(None, "store_error")
        except Exception as error:  # whatever fails in judging, the client still gets an answer
            self._report("verify", error)
            return _Search(None, "verify_error")

    def _judge(self, lookup: Lookup, hits: Sequence[Hit]) -> _Search:
        """Take the first, most similar first, that is similar enough and the same question."""
        started = time.perf_counter()
        best = hits[0].similarity
        near = [hit for hit in hits if hit.similarity >= self._policy.similarity_threshold]
        refusals: list[str] = []
        for hit, refusal in zip(near, self._refusals(lookup.prompt, near), strict=False):
            if not refusal:
                verify_ms = (time.perf_counter() - started) * 1e3
                withheld = self._withhold(lookup, hit)
                kept = (None, withheld, best, tuple(refusals), verify_ms, hit) if withheld else None
                return _Search(*kept) if kept else _Search(hit, "", hit.similarity, tuple(refusals), verify_ms)
            refusals.append(refusal)
        reason = "refused" if refusals else "below_threshold"
        return _Search(None, reason, best, tuple(refusals), (time.perf_counter() - started) * 1e3)

    def _refusals(self, prompt: str, hits: Sequence[Hit]) -> Iterator[str | None]:
        """Yield why each is not the same question, None where it is."""
        if self._verifier is None:
            return iter([None] * len(hits))
        stored = [(hit.candidate.prompt, hit.similarity) for hit in hits]
        return (verdict.refusal for verdict in self._verifier.verdicts(prompt, stored))

    def _withhold(self, lookup: Lookup, hit: Hit) -> str:
        """Return why a hit must not be served after all, empty when it may."""
        if self.false_hits.is_over(lookup.key.partition):
            return "over_budget"
        if not self._policy.error_target:
            return ""
        seen = self._reads.observations(hit.candidate.key)
        explore = exploration_probability(seen, hit.similarity, self._policy.error_target)
        return "exploring" if self._random.random() < explore else ""

    def _learn(self, pending: Pending, decoded: str) -> None:
        """Keep what an answer says of the entry that was passed over for it."""
        try:
            if pending.passed_over:
                self.observe(pending.lookup, pending.passed_over, decoded)
        except Exception as error:  # nothing is learned; the answer is stored all the same
            self._report("compare", error)

    def _is_over(self, usage: Usage) -> bool:
        return usage.entries > self._limit.entries or usage.bytes > self._limit.bytes

    def _is_same_answer(self, one: str, other: str) -> bool:
        """Whether two answers say the same: the same words, or the verifier's word for it."""
        if one.split() == other.split():
            return True
        if self._verifier is None:
            return False
        first, second = self._embed([one, other])
        if first is None or second is None:
            return False
        return not next(self._verifier.verdicts(one, [(other, float(first @ second))])).refusal

    def _is_young(self, found: Found, lookup: Lookup) -> bool:
        return lookup.max_age_s is None or self._clock() - found.created <= lookup.max_age_s

    def _vectors(self, lookups: Sequence[Lookup]) -> tuple[list[Vector | None], bool]:
        try:
            return self._embed([lookup.prompt for lookup in lookups]), False
        except Exception as error:  # the embedder is down: exact lookups and decoding go on
            self._report("embed", error)
            return [None] * len(lookups), True

    def _entry(self, pending: Pending, answer: Answer) -> Entry:
        lookup, now = pending.lookup, self._clock()
        tokens = json.loads(answer.info).get("tokens", 0)
        return Entry(
            key=lookup.key,
            tenant=lookup.tenant,
            model=self._policy.fronted_model,
            prompt=lookup.prompt,
            answer=answer.text,
            info=answer.info,
            vector=pending.vector,
            tags=lookup.tags,
            tokens=tokens if isinstance(tokens, int) else 0,
            created=now,
            expires=now + lookup.ttl_s * (1 - self._policy.ttl_jitter * self._random.random()),
        )


def _elapsed_ms(lookup: Lookup) -> float:
    return (time.monotonic() - lookup.received) * 1e3
