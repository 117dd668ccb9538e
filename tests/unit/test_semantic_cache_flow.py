"""The flow: exact, then by meaning, else a miss; with a real store and index and made-up meanings."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from semantic_cache.cache import Outcome, SemanticCache
from semantic_cache.guard import GuardedReads
from semantic_cache.key import Keys, Parameter
from semantic_cache.pending import LIFETIME_S, Pending, PendingLookups
from semantic_cache.policy import Policy
from semantic_cache.records import Selector, Vector
from semantic_cache.request import Answer, Lookup, parse_lookup
from semantic_cache.store import StoreError
from semantic_cache.stores.sqlite import SqliteStore
from semantic_cache.verifier.verifier import Verdict

POLICY = Policy(verify=False, ttl_jitter=0.0)
KEYS = Keys(b"s" * 32, "language_model:1", ("embedder:1", "verifier"))
TABLE = np.random.default_rng(0).standard_normal((4096, 384)).astype(np.float32)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Refusing:
    """A verifier that refuses prompts with these words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def verdicts(self, prompt: str, candidates: Sequence[tuple[str, float]]) -> Iterator[Verdict]:
        if "broken" in prompt:
            raise ValueError("the verifier is broken")
        for stored, similarity in candidates:
            refused = any(word in (prompt + stored).split() for word in self.words)
            yield Verdict("word" if refused else None, similarity)


class Bench:
    """A cache, with everything around it within a test's reach. Prompts of the same words mean the same."""

    def __init__(self, path: Path, policy: Policy = POLICY, verifier: Refusing | None = None) -> None:
        self.clock = Clock()
        self.store = SqliteStore(path)
        self.policy = policy
        self.embedded: list[list[str]] = []
        self.reports: list[tuple[str, str]] = []
        self.embed: Callable[[Sequence[str]], list[Vector | None]] = self.embed_words
        self.cache = SemanticCache(
            policy,
            self.store,
            GuardedReads(self.store, is_remote=False, clock=self.clock),
            lambda prompts: self.embed(prompts),
            verifier,
            self.report,
            self.clock,
            seed=0,
        )

    def embed_words(self, prompts: Sequence[str]) -> list[Vector | None]:
        self.embedded.append(list(prompts))
        return [None if "too-long" in prompt else direction(prompt) for prompt in prompts]

    def report(self, stage: str, error: Exception) -> None:
        self.reports.append((stage, str(error)))

    def parse(self, prompt: str, **parameters: Parameter) -> Lookup:
        return parse_lookup(prompt.encode(), parameters, self.policy, KEYS)

    def look_up(self, prompt: str, **parameters: Parameter) -> Outcome:
        lookup = self.parse(prompt, **parameters)
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
    bench = Bench(tmp_path / "store.sqlite", Policy(verify=False, ttl_jitter=0.0, similarity_threshold=threshold))
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
    bench.cache.tidy()
    assert bench.store.usage().entries == 0


def test_dead_neighbours_do_not_hide_a_live_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store.sqlite", Policy(verify=False, ttl_jitter=0.0, similarity_threshold=0.9))
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
    assert bench.store.usage().entries == 1


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
    lookups = [bench.parse(prompt, tenant=tenant) for prompt, tenant in asked]
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
        raise StoreError("disk I/O error")

    monkeypatch.setattr(bench.store, "get", fail)
    monkeypatch.setattr(bench.store, "nearest", fail)
    outcome = bench.look_up("a b")
    assert (outcome.source, outcome.reason) == ("miss", "store_error")
    assert bench.reports == [
        ("exact", "disk I/O error"),
        ("search", "the store is down"),
    ]  # asked once, then left alone
    monkeypatch.undo()
    bench.clock.now += 1.0
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
    handles = [waiting.add(Pending(parse_lookup(prompt, {}, POLICY, KEYS), None)) for prompt in (b"1", b"2", b"3")]
    assert len(set(handles)) == 3
    assert waiting.take(handles[0]) is None
    second = waiting.take(handles[1])
    assert second and second.lookup.prompt == "2"
    clock.now += LIFETIME_S
    assert waiting.take(handles[2]) is None


def test_only_what_the_verifier_lets_through_is_served(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store.sqlite", Policy(similarity_threshold=0.5), Refusing("not"))
    bench.fill("a b c not", "wrong")
    bench.fill("a b c d e", "right")
    found = bench.look_up("c b a")
    assert (found.source, found.answer, found.refusals) == ("semantic", "right", ("word",))
    refused = bench.look_up("not c b a")
    assert (refused.source, refused.reason, refused.refusals) == ("miss", "refused", ("word", "word"))


def test_a_verifier_that_fails_makes_a_miss(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store.sqlite", Policy(similarity_threshold=0.5), Refusing())
    bench.fill("a broken b", "x")
    outcome = bench.look_up("b a broken")
    assert (outcome.source, outcome.reason) == ("miss", "verify_error")
    assert bench.reports == [("verify", "the verifier is broken")]


def test_a_miss_says_why(bench: Bench) -> None:
    assert bench.look_up("a b").reason == "nothing_near"
    bench.fill("a b", "x")
    assert bench.look_up("c d").reason == "below_threshold"
    assert bench.look_up("too-long").reason == "too_long"
    assert bench.look_up("a b", cache="refresh").reason == "refresh"


def test_only_answers_from_the_cache_or_not_at_all(bench: Bench) -> None:
    missed = bench.look_up("a b", cache="only")
    assert (missed.source, missed.entry) == ("miss", "")
    bench.fill("a b", "x")
    assert bench.look_up("b a", cache="only").answer == "x"


def test_an_answer_older_than_asked_for_is_not_served(bench: Bench) -> None:
    bench.fill("a b", "x")
    bench.clock.now += 100
    for prompt in ("a b", "b a"):
        assert bench.look_up(prompt, cache_max_age_s=100).answer == "x"
        old = bench.look_up(prompt, cache_max_age_s=99)
        assert (old.source, old.reason) == ("miss", "too_old")


def test_a_sampled_answer_is_neither_looked_up_nor_stored_unless_asked(bench: Bench) -> None:
    assert bench.look_up("a b", temperature=0.7).source == "off"
    bench.fill("a b", "x", temperature=0.7, cache_sampled=True)
    assert bench.look_up("a b", temperature=0.7, cache_sampled=True).answer == "x"
    bench.fill("a b", "y", temperature=0.7, seed=1)
    assert bench.look_up("b a", temperature=0.7, seed=1).answer == "y"


def test_lives_are_spread_but_never_longer_than_asked(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store.sqlite", Policy(verify=False, ttl_jitter=0.5))
    for number in range(50):
        bench.fill(f"a {number}", "x", cache_ttl_s=1000)
    lives = [entry.expires - entry.created for entry in bench.store.export(b"", 50)]
    assert 500 <= min(lives) < 600 and 900 < max(lives) <= 1000


def test_the_store_is_kept_within_its_limit(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store.sqlite", Policy(verify=False, max_entries=5))
    for number in range(8):
        bench.clock.now += 1
        bench.fill(f"a {number}", "x")
        bench.look_up("a 0")  # used again and again
    assert bench.store.usage().entries == 5
    assert bench.look_up("a 0").source == "exact"
    assert bench.look_up("a 1", cache="only").source == "miss"
    assert bench.cache.tidy()[0] == 3


def test_a_full_store_makes_room_for_more_than_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store.sqlite", Policy(verify=False, max_entries=200))
    for number in range(201):
        bench.clock.now += 1
        bench.fill(f"a {number}", "x")
    assert bench.store.usage().entries == 198


def test_what_is_invalidated_is_gone_at_once(bench: Bench, tmp_path: Path) -> None:
    other = Bench(tmp_path / "store.sqlite")
    bench.fill("a b", "x", cache_tags="docs,v1")
    assert other.look_up("b a").answer == "x"
    assert bench.store.invalidate(Selector(tag="v1")) == 1
    for server in (bench, other):
        assert [server.look_up(prompt).source for prompt in ("a b", "b a")] == ["miss", "miss"]


def test_an_entry_that_explores_learns_from_the_answers(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store.sqlite", Policy(verify=False, error_target=0.05))
    bench.fill("a b c", "x")
    sources = []
    for _ in range(40):
        outcome = bench.look_up("c b a")
        sources.append(outcome.source)
        if outcome.source == "semantic":
            break
        assert outcome.reason == "exploring"
        bench.put(outcome, "x")
        bench.store.invalidate(Selector(exact=bench.parse("c b a").key.exact))
    assert sources[-1] == "semantic" and len(sources) > 6


def test_a_partition_over_its_budget_serves_no_hits_by_meaning(bench: Bench) -> None:
    bench.fill("a b", "x")
    bench.fill("a b", "y", tenant="other")
    for _ in range(20):
        lookup = bench.parse("b a")
        hit = bench.cache.search([lookup])[0].hit
        if hit is None:
            break
        assert not bench.cache.observe(lookup, hit, "something else")
    outcome = bench.look_up("b a")
    assert (outcome.source, outcome.reason) == ("miss", "over_budget")
    assert bench.look_up("a b").answer == "x"  # the same bytes are no guess
    assert bench.look_up("b a", tenant="other").answer == "y"


def test_what_is_known_of_false_hits_outlives_a_restart_and_reaches_other_servers(bench: Bench, tmp_path: Path) -> None:
    other = Bench(tmp_path / "store.sqlite")
    bench.fill("a b", "x")
    lookup = bench.parse("b a")
    hit = bench.cache.search([lookup])[0].hit
    assert hit
    for _ in range(20):
        bench.cache.observe(lookup, hit, "something else")
    assert other.look_up("b a").answer == "x"
    other.cache.tidy()
    after = Bench(tmp_path / "store.sqlite")
    for server in (other, after):
        assert server.look_up("b a").reason == "over_budget"
        assert server.cache.false_hits.bounds() == bench.cache.false_hits.bounds()


def test_an_answer_that_cannot_be_compared_is_stored_all_the_same(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store.sqlite", Policy(similarity_threshold=0.5, error_target=0.05), Refusing())
    bench.fill("a b c", "broken")
    outcome = bench.look_up("c b a")
    assert outcome.reason == "exploring"
    assert bench.put(outcome, "x") == "stored"
    assert bench.reports == [("compare", "the verifier is broken")]
    assert bench.look_up("c b a").answer == "x"


def test_a_store_that_breaks_while_a_hit_is_weighed_makes_a_miss(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path / "store.sqlite", Policy(verify=False, error_target=0.05))
    bench.fill("a b", "x")

    def fail(*arguments: object) -> None:
        raise StoreError("disk I/O error")

    monkeypatch.setattr(bench.store, "observations", fail)
    outcome = bench.look_up("b a")
    assert (outcome.source, outcome.reason) == ("miss", "store_error")
