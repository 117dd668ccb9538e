"""GPTCache on prepared vectors, in a process of its own: `python gptcache_peer.py VECTORS.npz TASK.json`, JSON out.

It runs with its defaults: SQLite, faiss, SearchDistanceEvaluation, similarity_threshold 0.8. Its own embedding model
and its ONNX evaluator have to be downloaded from a model hub, so the vectors are those of our embedder.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gptcache import Cache
from gptcache.adapter.api import get, put
from gptcache.manager import CacheBase, VectorBase, get_data_manager
from gptcache.processor.pre import get_prompt
from gptcache.similarity_evaluation import SearchDistanceEvaluation

LOOKUPS = 200


def make(folder: str, vectors: dict[str, np.ndarray]) -> Cache:
    """Return an empty cache in `folder`."""
    dimension = len(next(iter(vectors.values())))
    store = CacheBase("sqlite", sql_url=f"sqlite:///{folder}/cache.db")
    index = VectorBase("faiss", dimension=dimension, index_path=f"{folder}/faiss.index")
    cache = Cache()
    cache.init(
        pre_embedding_func=get_prompt,
        embedding_func=lambda prompt, **_: vectors[prompt],
        data_manager=get_data_manager(store, index),
        similarity_evaluation=SearchDistanceEvaluation(),
    )
    return cache


def judge(pairs: list[list[str]], vectors: dict[str, np.ndarray]) -> list[bool]:
    """Return for each pair whether the second prompt finds the first, alone in its cache."""
    found = []
    for first, second in pairs:
        with tempfile.TemporaryDirectory() as folder:
            cache = make(folder, vectors)
            put(first, "answer", cache_obj=cache)
            found.append(get(second, cache_obj=cache) is not None)
    return found


def measure(entries: int, vectors: dict[str, np.ndarray]) -> dict[str, float]:
    """Return median milliseconds of a lookup of a stored prompt, and of another's vector, and inserts per second."""
    random = np.random.default_rng(0)
    dimension = len(next(iter(vectors.values())))
    table = random.standard_normal((entries, dimension)).astype(np.float32)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    known = {f"prompt {number}": vector for number, vector in enumerate(table)}
    near = {f"reworded {number}": vector for number, vector in enumerate(table[:LOOKUPS])}
    with tempfile.TemporaryDirectory() as folder:
        cache = make(folder, {**known, **near})
        started = time.perf_counter()
        for prompt in known:
            put(prompt, "answer", cache_obj=cache)
        inserts = entries / (time.perf_counter() - started)
        return {
            "exact": median(cache, list(known)[:LOOKUPS]),
            "semantic": median(cache, list(near)),
            "inserts_per_s": inserts,
        }


def median(cache: Cache, prompts: list[str]) -> float:
    times = []
    for prompt in prompts:
        started = time.perf_counter()
        answer = get(prompt, cache_obj=cache)
        times.append((time.perf_counter() - started) * 1e3)
        assert answer == "answer"
    return statistics.median(times)


def main() -> None:
    archive = np.load(sys.argv[1])
    task = json.loads(Path(sys.argv[2]).read_text())
    vectors = dict(zip(task["prompts"], archive["vectors"], strict=True))
    found = judge(task["pairs"], vectors)
    print(json.dumps({"found": found, "latency": measure(task["entries"], vectors)}))


if __name__ == "__main__":
    main()
