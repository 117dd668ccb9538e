"""The flow: exact, then by meaning, else a miss; with a real store and index and made-up meanings."""

import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from semantic_cache.cache import Outcome, SemanticCache
from semantic_cache.embedder import Vector
from semantic_cache.key import Parameter
from semantic_cache.pending import LIFETIME_S, Pending, PendingLookups
from semantic_cache.policy import Policy
from semantic_cache.request import Answer, parse_lookup
from semantic_cache.store import Store

POLICY = Policy()
TABLE = np.random.default_rng(0).standard_normal((4096, 384)).astype(np.float32)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A cache, with everything around it within a test's reach. Prompts of the same words mean the same."""

    def __init__(self, path: Path, policy: Policy = POLICY) -> None:
        self.clock = Clock()
        self.store = Store(path)
        self.policy = policy
        self.embedded: list[list[str]] = []
        self.reports: list[tuple[str, str]] = []
        self.embed: Callable[[Sequence[str]], list[Vector | None]] = self.embed_words
        self.cache = SemanticCache(policy, self.store, lambda prompts: self.embed(prompts), self.report, self.clock)

    def embed_words(self, prompts: Sequence[str]) -> list[Vector | None]:
        self.embedded.append(list(prompts))
        return [None if "too-long" in prompt else direction(prompt) for prompt in prompts]

    def report(self, stage: str, error: Exception) -> None:
        self.reports.append((stage, str(error)))

    def look_up(self, prompt: str, **parameters: Parameter) -> Outcome:
        lookup = parse_lookup(prompt.encode(), parameters, self.policy)
        return self.cache.exact(lookup) or self.cache.search([lookup])[0]

    def put(self, outcome: Outcome, answer: str, info: str = "{}") -> str:
        return self.cache.put([Answer(outcome.entry, answer, info)])[0]

    def fill(self, prompt: str, answer: str, **parameters: Parameter) -> None:
        missed = self.look_up(prompt, **parameters, cache="refresh")
        assert self.put(missed, answer) == "stored"


def direction(prompt: str) -> Vector:
    total = sum(TABLE[hash_of(word)] for word in prompt.split())
    vector: Vector = (total / np.linalg.norm(total)).astype(np.float32)
    return vector


def hash_of(word: str) -> int:
    return int.from_bytes(word.encode(), "big") % 4093


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "store.sqlite")


def test_a_miss_then_exact_without_embedding_then_semantic(bench: Bench) -> None:
    bench.fill("how are you", "fine")
    assert bench.embedded == [["how are you"]]
    exact = bench.look_up("how are you")
    assert (exact.source, exact.answer, exact.entry) == ("exact", "fine", "")
    assert len(bench.embedded) == 1
    semantic = bench.look_up("are you how")
    assert (semantic.source, semantic.answer, semantic.entry) == ("semantic", "fine", "")
    assert semantic.similarity == pytest.approx(1.0)
    other = bench.look_up("where is everyone")
    assert (other.source, other.answer) == ("miss", "") and other.entry
    assert other.similarity is not None and other.similarity < 0.95


@pytest.mark.parametrize(("threshold", "source"), [(0.74, "semantic"), (0.76, "miss")])
def test_the_threshold_decides(tmp_path: Path, threshold: float, source: str) -> None:
    bench = Bench(tmp_path / "store.sqlite", Policy(similarity_threshold=threshold))
    a, b = (np.eye(384, dtype=np.float32)[row] for row in (0, 1))
    vectors = {"one": a, "two": (0.75 * a + np.sqrt(1 - 0.75**2) * b).astype(np.float32)}
    bench.embed = lambda prompts: [vectors[prompt] for prompt in prompts]
    bench.fill("one", "answer")
    outcome = bench.look_up("two")
    assert outcome.source == source
    assert outcome.similarity == pytest.approx(0.75, abs=1e-6)  # in fp32, whatever the index keeps


def test_info_is_what_was_stored_and_what_happened(bench: Bench) -> None:
    bench.put(bench.look_up("a b"), "x", '{"tokens": 3, "source": "decoded"}')
    info = json.loads(bench.look_up("a b").to_json())
    assert info["tokens"] == 3 and info["source"] == "exact" and info["similarity"] is None
    assert set(info["milliseconds"]) == {"lookup", "embed"}
    assert json.loads(bench.look_up("b a").to_json())["similarity"] == 1.0


def test_tenants_and_parameters_are_walls(bench: Bench) -> None:
    bench.fill("a b", "one", tenant="one")
    walls: list[dict[str, Parameter]] = [{"tenant": "two"}, {"tenant": "one", "max_tokens": 5}, {}]
    for parameters in walls:
        assert bench.look_up("a b", **parameters).source == "miss"
        assert bench.look_up("b a", **parameters).similarity is None  # nothing to compare with
    assert bench.look_up("b a", tenant="one", stream=True).answer == "one"


def test_an_answer_lives_as_long_as_asked(bench: Bench) -> None:
    bench.fill("a b", "short", cache_ttl_s=10)
    bench.fill("c d", "long")
    bench.clock.now += 9.9
    assert bench.look_up("a b").answer == bench.look_up("b a").answer == "short"
    bench.clock.now += 0.1
    assert [bench.look_up(prompt).source for prompt in ("a b", "b a")] == ["miss", "miss"]
    assert bench.look_up("d c").answer == "long"
    bench.clock.now += 86400
    assert bench.look_up("c d").source == "miss"
    bench.cache.purge()
    assert bench.store.count() == 0


def test_dead_neighbours_do_not_hide_a_live_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store.sqlite", Policy(similarity_threshold=0.9))
    words = ["a", "b", "c", "d", "e", "f", "g", "h"]
    for turn in range(len(words)):  # all nearer to what is asked than the one that lives
        bench.fill(" ".join(words[turn:] + words[:turn]), "dead", cache_ttl_s=5)
    bench.fill("a b c d e f g h i", "alive")
    bench.clock.now += 5
    found = bench.look_up("h g f e d c b a")
    assert (found.source, found.answer) == ("semantic", "alive")


def test_refresh_replaces_what_was_stored(bench: Bench) -> None:
    bench.fill("a b", "old")
    bench.fill("a b", "new")
    assert bench.look_up("a b").answer == bench.look_up("b a").answer == "new"
    assert bench.store.count() == 1


def test_off_reads_nothing_and_stores_nothing(bench: Bench) -> None:
    bench.fill("a b", "x")
    embedded = len(bench.embedded)
    off = bench.look_up("a b", cache="off")
    assert (off.source, off.answer, off.entry) == ("off", "", "")
    assert len(bench.embedded) == embedded


def test_a_batch_is_embedded_at_once_and_each_gets_its_own(bench: Bench) -> None:
    bench.fill("a b", "one")
    bench.fill("c d", "two", tenant="other")
    embedded = len(bench.embedded)
    asked = [("b a", "default"), ("d c", "default"), ("d c", "other"), ("b a", "other")]
    lookups = [parse_lookup(prompt.encode(), {"tenant": tenant}, POLICY) for prompt, tenant in asked]
    outcomes = bench.cache.search(lookups)
    assert [outcome.answer for outcome in outcomes] == ["one", "", "two", ""]
    assert bench.embedded[embedded:] == [[prompt for prompt, _ in asked]]


def test_without_the_embedder_lookups_miss_and_answers_are_stored_for_exact_hits(bench: Bench) -> None:
    def fail(prompts: Sequence[str]) -> list[Vector | None]:
        raise RuntimeError("embedder is down")

    bench.embed = fail
    bench.put(bench.look_up("a b"), "x")
    assert bench.reports == [("embed", "embedder is down")]
    assert bench.look_up("a b").answer == "x"
    bench.embed = bench.embed_words
    assert bench.look_up("b a").source == "miss"


def test_a_prompt_too_long_to_embed_is_cached_by_its_bytes_only(bench: Bench) -> None:
    bench.fill("too-long a b", "x")
    assert bench.look_up("too-long a b").source == "exact"
    assert bench.look_up("too-long b a").source == "miss"
    assert bench.reports == []


def test_a_broken_store_makes_misses_not_errors(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.fill("a b", "x")

    def fail(*arguments: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(bench.store, "get", fail)
    monkeypatch.setattr(bench.store, "candidates", fail)
    assert bench.look_up("a b").source == "miss"
    assert bench.reports == [("exact", "disk I/O error"), ("search", "disk I/O error")]
    monkeypatch.undo()
    assert bench.look_up("a b").answer == "x"


def test_a_restart_forgets_nothing_but_handles(bench: Bench, tmp_path: Path) -> None:
    bench.fill("a b", "x")
    waiting = bench.look_up("c d")
    after = Bench(tmp_path / "store.sqlite")
    assert after.look_up("a b").source == "exact"
    assert after.look_up("b a").source == "semantic"
    assert after.put(waiting, "y") == "unknown_entry"


def test_two_servers_on_one_file_see_each_others_entries(bench: Bench, tmp_path: Path) -> None:
    other = Bench(tmp_path / "store.sqlite")
    for number, (writer, reader) in enumerate([(bench, other), (other, bench)]):
        writer.fill(f"a {number} b", str(number))
        assert reader.look_up(f"a {number} b").answer == reader.look_up(f"b {number} a").answer == str(number)


def test_an_answer_is_stored_once_under_a_handle_that_was_given_out(bench: Bench) -> None:
    missed = bench.look_up("a b")
    forged = missed._replace(entry="guess")
    assert bench.put(forged, "forged") == "unknown_entry"
    assert bench.put(missed, "x") == "stored"
    assert bench.put(missed, "forged") == "unknown_entry"
    assert bench.look_up("a b").answer == "x"


def test_an_empty_answer_is_not_stored(bench: Bench) -> None:
    assert bench.put(bench.look_up("a b"), "") == "empty_answer"
    assert bench.look_up("a b").source == "miss"


def test_waiting_lookups_are_bounded_in_number_and_time() -> None:
    clock = Clock()
    waiting = PendingLookups(capacity=2, clock=clock)
    handles = [waiting.add(Pending(parse_lookup(prompt, {}, POLICY), None)) for prompt in (b"1", b"2", b"3")]
    assert len(set(handles)) == 3
    assert waiting.take(handles[0]) is None
    second = waiting.take(handles[1])
    assert second and second.lookup.prompt == "2"
    clock.now += LIFETIME_S
    assert waiting.take(handles[2]) is None
