"""The flow of the cache: the same bytes, then the same meaning, else a miss to be stored later."""

import json
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from semantic_cache.embedder import Vector
from semantic_cache.index import Indexes
from semantic_cache.pending import Pending, PendingLookups
from semantic_cache.policy import Policy
from semantic_cache.request import Answer, Lookup
from semantic_cache.store import Candidate, Entry, Found, Store

CANDIDATES = 5  # taken from the int8 index and judged in fp32
EXPIRE_INTERVAL_S = 60.0

Embed = Callable[[Sequence[str]], list[Vector | None]]
Report = Callable[[str, Exception], None]


class Outcome(NamedTuple):
    """What a lookup came to.

    source: exact, semantic, miss or off. answer: empty unless a hit. entry: handle to store an answer under, empty
    unless there is something to store. similarity: cosine to the nearest stored prompt, None when none was compared.
    info: JSON object stored with the answer.
    """

    source: str
    lookup_ms: float
    embed_ms: float = 0.0
    answer: str = ""
    entry: str = ""
    similarity: float | None = None
    info: str = "{}"

    def to_json(self) -> str:
        """Return the outcome, less answer and entry, as the model's output `cache_info`."""
        own = {
            "source": self.source,
            "similarity": None if self.similarity is None else round(self.similarity, 4),
            "milliseconds": {"lookup": round(self.lookup_ms, 3), "embed": round(self.embed_ms, 3)},
        }
        return json.dumps({**json.loads(self.info), **own})


class SemanticCache:
    """Answers lookups in two steps, exact() and, where that cannot tell, search(); put() stores what was missed.

    Each of the three may run on a thread of its own, but each on one only. `embed` maps prompts to unit vectors, None
    for a prompt that it cannot represent. Errors in finding an answer are misses: `report` gets their stage and text.
    """

    def __init__(
        self, policy: Policy, store: Store, embed: Embed, report: Report, clock: Callable[[], float] = time.time
    ) -> None:
        self._policy = policy
        self._store = store
        self._embed = embed
        self._report = report
        self._clock = clock
        self._indexes = Indexes(store)
        self._pending = PendingLookups()
        self._next_expiry = 0.0

    def exact(self, lookup: Lookup) -> Outcome | None:
        """Find the same prompt without embedding it; None: search() must decide."""
        if lookup.mode == "off":
            return Outcome("off", _elapsed_ms(lookup))
        if lookup.mode == "refresh":
            return None
        try:
            found = self._store.get(lookup.key.exact, self._clock())
        except Exception as error:  # whatever fails in here, the client still gets an answer
            self._report("exact", error)
            return None
        return found and Outcome("exact", _elapsed_ms(lookup), answer=found.answer, info=found.info)

    def search(self, lookups: Sequence[Lookup]) -> list[Outcome]:
        """Find prompts that mean the same, embedding all of `lookups` at once. Never raises."""
        self._expire_indexes()
        started = time.perf_counter()
        vectors = self._vectors(lookups)
        embed_ms = (time.perf_counter() - started) * 1e3
        return [self._decide(lookup, vector, embed_ms) for lookup, vector in zip(lookups, vectors, strict=True)]

    def put(self, answers: Sequence[Answer]) -> list[str]:
        """Store answers durably; return for each "stored", "unknown_entry" or "empty_answer". Raises sqlite3.Error."""
        results, entries = [], []
        for answer in answers:
            pending = self._pending.take(answer.entry)
            if pending is None:
                results.append("unknown_entry")
            elif not answer.text:
                results.append("empty_answer")
            else:
                results.append("stored")
                entries.append(self._entry(pending, answer))
        if entries:
            self._store.put(entries)
        return results

    def purge(self) -> None:
        """Delete expired entries; on any thread. Raises sqlite3.Error."""
        self._store.purge(self._clock())

    def _decide(self, lookup: Lookup, vector: Vector | None, embed_ms: float) -> Outcome:
        similarity = None
        if vector is not None and lookup.mode == "on":
            found, similarity = self._similar(lookup, vector)
            if found:
                lookup_ms = _elapsed_ms(lookup) - embed_ms
                return Outcome("semantic", lookup_ms, embed_ms, found.answer, "", similarity, found.info)
        entry = self._pending.add(Pending(lookup, vector))
        return Outcome("miss", _elapsed_ms(lookup) - embed_ms, embed_ms, entry=entry, similarity=similarity)

    def _similar(self, lookup: Lookup, vector: Vector) -> tuple[Found | None, float | None]:
        """Return the answer to serve, if any, and the similarity of the nearest prompt, if there is one."""
        try:
            candidates = self._candidates(lookup.key.partition, vector)
        except Exception as error:  # a miss, not the client's problem
            self._report("search", error)
            return None, None
        if not candidates:
            return None, None
        similarities = [float(np.dot(vector, candidate.vector)) for candidate in candidates]
        best = int(np.argmax(similarities))
        is_hit = similarities[best] >= self._policy.similarity_threshold
        return candidates[best].found if is_hit else None, similarities[best]

    def _candidates(self, partition: bytes, vector: Vector) -> list[Candidate]:
        """Return the nearest entries that live; dead ones that the index still had make room for others."""
        now = self._clock()
        while ids := self._indexes.nearest(partition, vector, CANDIDATES, now):
            candidates = self._store.candidates(ids, now)
            dead = set(ids) - {candidate.id for candidate in candidates}
            if not dead:
                return candidates
            self._indexes.remove(partition, dead)
        return []

    def _vectors(self, lookups: Sequence[Lookup]) -> list[Vector | None]:
        try:
            return self._embed([lookup.prompt for lookup in lookups])
        except Exception as error:  # the embedder is down: exact lookups and decoding go on
            self._report("embed", error)
            return [None] * len(lookups)

    def _entry(self, pending: Pending, answer: Answer) -> Entry:
        lookup, now = pending.lookup, self._clock()
        return Entry(*lookup.key, lookup.prompt, answer.text, answer.info, pending.vector, now, now + lookup.ttl_s)

    def _expire_indexes(self) -> None:
        now = self._clock()
        if now >= self._next_expiry:
            self._indexes.expire(now)
            self._next_expiry = now + EXPIRE_INTERVAL_S


def _elapsed_ms(lookup: Lookup) -> float:
    return (time.perf_counter() - lookup.received) * 1e3
