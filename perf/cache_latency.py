"""How long lookups, inserts and starts take: in this process, and through the real server."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from tritonclient import grpc

from perf import cache_vectors
from perf.prompt_pairs import load_pairs, make_verifier  # puts python_backends on the path
from scripts.serving.installation import MODEL_REPOSITORY
from scripts.serving.server import TritonServer

from semantic_cache.cache import CANDIDATES, SemanticCache  # isort: skip
from semantic_cache.guard import GuardedReads  # isort: skip
from semantic_cache.key import Keys  # isort: skip
from semantic_cache.policy import Policy  # isort: skip
from semantic_cache.records import Entry, Vector  # isort: skip
from semantic_cache.request import Lookup, parse_lookup  # isort: skip
from semantic_cache.store import Store, StoreError  # isort: skip
from semantic_cache.stores.sqlite import SqliteStore  # isort: skip
from semantic_cache.verifier.verifier import Verifier  # isort: skip

EMPTY = Path(__file__).parent / "repositories" / "empty"
POLICY = Policy(max_entries=2_000_000, max_bytes=2**36)
LOOKUPS, ROUND_TRIPS = 1000, 2000
FAR = 1e12


class Bench:
    """A store with many made-up prompts and vectors, and a cache on it whose embedder only looks vectors up."""

    def __init__(self, store: Store, entries: int) -> None:
        self.store = store
        self.entries = entries
        self.keys = Keys(store.secret(), "m:1", ("e:1", "v"))
        self.late = 0  # lookups that the store did not answer within its deadline
        self._vectors: dict[str, Vector] = {}
        reads = GuardedReads(store, is_remote=not isinstance(store, SqliteStore))
        self.caches = {
            name: SemanticCache(POLICY, store, reads, self._embed, verifier, self._count_late)
            for name, verifier in (("as served", make_verifier()), ("words alone", Verifier.load()))
        }

    def fill(self) -> float:
        """Store all prompts, in few transactions, and read them into the index; return how long reading took, in s."""
        for start, matrix in cache_vectors.made_up(self.entries):
            numbers = range(start, start + len(matrix))
            self.store.put([self._entry(number, vector) for number, vector in zip(numbers, matrix, strict=True)])
        started = time.perf_counter()
        self.store.warm()
        return time.perf_counter() - started

    def exact_ms(self) -> float:
        """Return the median time of finding a prompt by its bytes."""
        lookups = [self._lookup(prompt(number)) for number in self._sample(LOOKUPS)]
        late, found = self.late, []
        cache = self.caches["as served"]
        median = median_ms(lookups, lambda lookup: found.append(cache.exact(lookup) is not None))
        assert sum(found) + self.late - late == len(lookups), "a stored prompt was not found"
        return median

    def semantic_ms(self) -> tuple[dict[str, float], float]:
        """Return the median time of finding a rewording, without embedding it, and how often the index has the nearest.

        The time is that of the whole lookup as it is served, and where words alone decide. The nearest of all, compared
        in fp32, must be the nearest of the candidates.
        """
        numbers = self._sample(LOOKUPS)
        vectors = cache_vectors.reworded(cache_vectors.some(self.entries, numbers))
        texts = [f"Please tell me {prompt(number).lower()}" for number in numbers]
        self._vectors.update(zip(texts, vectors, strict=True))
        lookups = [self._lookup(text) for text in texts]
        medians = {name: median_ms(lookups, partial(_search, cache)) for name, cache in self.caches.items()}
        found = 0
        for lookup, vector, number in zip(lookups, vectors, cache_vectors.nearest(self.entries, vectors), strict=True):
            candidates = self.store.nearest(lookup.key.partition, vector, CANDIDATES, time.time())
            best = max(candidates, key=lambda candidate, vector=vector: float(vector @ candidate.vector))
            found += best.prompt == prompt(number)
        return medians, found / len(lookups)

    def _sample(self, count: int) -> list[int]:
        chosen = np.random.default_rng(2).choice(self.entries, min(count, self.entries), replace=False)
        return [int(number) for number in chosen]

    def _entry(self, number: int, vector: Vector) -> Entry:
        lookup = self._lookup(prompt(number))
        answer = f"answer {number}"
        return Entry(lookup.key, lookup.tenant, "m:1", lookup.prompt, answer, "{}", vector, (), 9, time.time(), FAR)

    def _lookup(self, text: str) -> Lookup:
        return parse_lookup(text.encode(), {}, POLICY, self.keys)

    def _count_late(self, stage: str, error: Exception) -> None:
        if not isinstance(error, StoreError):
            raise RuntimeError(stage) from error
        self.late += 1

    def _embed(self, prompts: object) -> list[Vector | None]:
        return [self._vectors[text] for text in prompts]  # type: ignore[attr-defined]


def prompt(number: int) -> str:
    """Return a prompt that no other number has."""
    return f"What does the function module_{number % 997}.call_{number} return?"


def startup_s(open_store: Callable[[], Store]) -> float:
    """Return the time from opening a store to the answer of its first search by meaning."""
    started = time.perf_counter()
    store = open_store()
    store.warm()
    partition = store.export(b"", 1)[0].key.partition
    assert store.nearest(partition, next(cache_vectors.made_up(1))[1][0], 5, 0.0)
    taken = time.perf_counter() - started
    store.close()
    return taken


def inserts_per_s(store: Store, batch: int, entries: int = 2000) -> float:
    """Return how many entries are stored durably per second, `batch` at a time."""
    bench = Bench(store, entries)
    [(_, matrix)] = cache_vectors.made_up(entries)
    made = [bench._entry(number, vector) for number, vector in enumerate(matrix)]
    started = time.perf_counter()
    for at in range(0, entries, batch):
        store.put(made[at : at + batch])
    return entries / (time.perf_counter() - started)


def triton_ms() -> dict[str, float]:
    """Return median round trips over gRPC: an exact hit, a hit by meaning (embedding included), an empty model."""
    pairs = [pair for pair in load_pairs("tune") if pair.label == "paraphrase"]
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder, "repository")
        for model in ("embedder", "pair_model", "semantic_cache"):
            shutil.copytree(MODEL_REPOSITORY / model, repository / model)
        shutil.copytree(EMPTY, repository / "empty")
        with (
            TritonServer(repository, state_dir=Path(folder, "state")) as server,
            grpc.InferenceServerClient(server.grpc_url) as client,
        ):
            for pair in pairs:
                _store(client, pair.first)
            exact = [_tensors(text_input=pair.first) for pair in pairs]
            similar = [_tensors(text_input=pair.second) for pair in pairs]
            found = [tensors for tensors in similar if _ask(client, tensors)]
            rounds = {"exact": exact, "semantic": found, "empty": exact}
            times: dict[str, list[float]] = {name: [] for name in rounds}
            for at in range(ROUND_TRIPS):  # taking turns, so that a noisy moment is everyone's
                for name, asked in rounds.items():
                    model = "empty" if name == "empty" else "semantic_cache"
                    started = time.perf_counter()
                    client.infer(model, asked[at % len(asked)])
                    times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _search(cache: SemanticCache, lookup: Lookup) -> None:
    cache.search([lookup])


def median_ms(items: list[Lookup], act: Callable[[Lookup], object]) -> float:
    """Return the median time that `act` takes."""
    times = []
    for item in items:
        started = time.perf_counter()
        act(item)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def _store(client: grpc.InferenceServerClient, text: str) -> None:
    entry = client.infer("semantic_cache", _tensors(text_input=text), parameters={"cache": "refresh"})
    handle = entry.as_numpy("cache_entry").item().decode()
    client.infer("semantic_cache", _tensors(text_input="", cache_entry=handle, answer="an answer of a few words"))


def _ask(client: grpc.InferenceServerClient, tensors: list[grpc.InferInput]) -> bool:
    return bool(client.infer("semantic_cache", tensors).as_numpy("cached_output").item())


def _tensors(**texts: str) -> list[grpc.InferInput]:
    tensors = []
    for name, text in texts.items():
        tensor = grpc.InferInput(name, [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[text.encode()]], np.object_))
        tensors.append(tensor)
    return tensors
