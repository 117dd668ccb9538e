"""What dynamic batching buys the embedder, by perf_analyzer: `python -m perf.batching`.

The limit is ONNX Runtime called directly, in this run, in the best way and at the best static batch. Measured against
it, at 1 to 64 clients: batching off, Triton's defaults, and what a guided sweep finds, which is what config.pbtxt
should say. Then real texts of mixed lengths, padded in several ways. The last line of output is the JSON that goes to
perf/results/batching.json.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from perf import batching_report
from perf.batching_bench import Cells, Plan, measure, serving, within
from perf.batching_sweep import MOST_LONE_LOSS, Sweep, lone_loss, sweep
from perf.direct_onnx import Direct, Way, ways
from perf.embedder_load import Padding, equal_sentences, real_sentences, write_requests
from perf.embedder_settings import EMBEDDER, Settings, shipped
from perf.perf_analyzer import Load
from scripts.machine import describe_machine
from scripts.serving.server import TritonServer

RESULTS = Path(__file__).parent / "results"
SHARE_OF_LIMIT = 0.8
PLAN = Plan(
    tokens=32,
    budget_ms=250.0,
    clients=(1, 2, 4, 8, 16, 32, 64),
    sweep_clients=(1, 16, 64),
    batches=(32, 64, 128),  # no less: the semantic cache embeds up to 32 prompts in one call
    delays_us=(0, 500, 2000),
    instances=(1, 2),
    turns=2,
    lone_turns=6,
    window_ms=500,
    direct_s=0.6,
    mixed_sentences=256,
    longest=128,
)
TRITON_DEFAULT_BATCH = 4
MIXED_CLIENTS = 32
PADDINGS = {
    "to 128, computed": Padding((128,), computed=True),
    "to 16, 32, 64 or 128, computed": Padding((16, 32, 64, 128), computed=True),
    "none": Padding(()),
    "to 16, 32, 64 or 128": Padding((16, 32, 64, 128)),
    "to 64 or 128": Padding((64, 128)),
    "to 128": Padding((128,)),
}
console = Console(stderr=True)


class Limit(NamedTuple):
    """Sentences a second of ONNX Runtime alone, and the way that gives them."""

    way: Way
    per_s: float


def run(plan: Plan) -> dict[str, Any]:
    """Measure everything in `plan`. Raises PerfAnalyzerError, ServeError."""
    started = time.monotonic()
    cores = os.cpu_count() or 1
    direct = Direct(EMBEDDER / "1" / "model.onnx")
    sentences = equal_sentences(max(plan.batches), plan.tokens)
    before = _limit(direct, plan, cores, sentences)
    console.log(f"limit: {before.per_s:.0f} sentences/s, {before.way}")
    with tempfile.TemporaryDirectory(prefix="batching-") as folder:
        data = write_requests(Path(folder, "equal.json"), sentences, Padding(()))
        found = sweep(plan, Settings(plan.batches[0], 0, 1, cores), data, console.log)
        curves = _curves(plan, found.chosen, data)
        after = direct.rows_per_s(before.way, sentences, 2 * plan.direct_s)
        limit = before._replace(per_s=statistics.mean([before.per_s, after]))
        mixed = _mixed(plan, found.chosen, direct, limit.way, Path(folder))
    return _result(plan, found, curves, limit, mixed) | {"seconds": round(time.monotonic() - started)}


def _limit(direct: Direct, plan: Plan, cores: int, sentences: Sequence[Sequence[int]]) -> Limit:
    tried = {
        way: direct.rows_per_s(way, sentences, plan.direct_s) for way in ways(cores, sorted({1, 8, 16, *plan.batches}))
    }
    best = max(tried, key=lambda way: tried[way])
    return Limit(best, tried[best])


def _curves(plan: Plan, chosen: Settings, data: Path) -> Cells:
    """Measure the three variants at every number of clients, a lone one more often."""
    defaults = replace(chosen, max_batch_size=TRITON_DEFAULT_BATCH, max_queue_delay_us=0, instances=1, threads=0)
    variants = {"off": replace(chosen, max_queue_delay_us=None), "defaults": defaults, "chosen": chosen}
    names = {name: name for name in variants}
    with serving(variants) as server:
        cells = measure(server, names, data, plan.clients, plan.turns, plan.window_ms)
        lone = measure(server, names, data, [1], plan.lone_turns, plan.window_ms)
    console.log("curves measured")
    return {name: loads | lone[name] for name, loads in cells.items()}


def _mixed(plan: Plan, chosen: Settings, direct: Direct, way: Way, folder: Path) -> dict[str, Any]:
    """Measure real texts under each padding, and the limit: sorted by length, padded to the longest of each batch."""
    sentences = real_sentences(plan.mixed_sentences, plan.longest)
    tokens = sum(map(len, sentences))
    figures: dict[str, list[Load]] = {name: [] for name in PADDINGS}
    with serving({"embedder": chosen}) as server:
        for _ in range(plan.turns):
            for number, (name, padding) in enumerate(PADDINGS.items()):
                data = write_requests(folder / f"mixed_{number}.json", sentences, padding)
                figures[name].append(_one(server, data, plan))
    static = way._replace(batch=min(way.batch, plan.mixed_sentences // 4))
    ways_to_pad = {
        name: {
            "sentences_per_s": statistics.median(load.per_s for load in loads),
            "p99_ms": statistics.median(load.p99_ms for load in loads),
            "batch": statistics.median(load.batch for load in loads),
            "padding": 1 - tokens / sum(PADDINGS[name].of(len(sentence)) for sentence in sentences),
        }
        for name, loads in figures.items()
    }
    return {
        "clients": MIXED_CLIENTS,
        "tokens_mean": tokens / len(sentences),
        "tokens_most": max(map(len, sentences)),
        "limit_per_s": direct.rows_per_s(static, sorted(sentences, key=len), 2 * plan.direct_s),
        "paddings": ways_to_pad,
    }


def _one(server: TritonServer, data: Path, plan: Plan) -> Load:
    """Measure for twice as long: computed padding makes answers rare, and a window without one is an error."""
    models = {"embedder": "embedder"}
    return measure(server, models, data, [MIXED_CLIENTS], 1, 2 * plan.window_ms)["embedder"][MIXED_CLIENTS]


def _result(plan: Plan, found: Sweep, curves: Cells, limit: Limit, mixed: Mapping[str, Any]) -> dict[str, Any]:
    best = max(curves["chosen"].values(), key=lambda load: load.per_s)
    kept = within(curves["chosen"], plan.budget_ms)
    loss = lone_loss(curves["chosen"], curves["off"])
    share = kept.per_s / limit.per_s if kept else 0.0
    return {
        "tokens": plan.tokens,
        "limit": {"sentences_per_s": limit.per_s, **limit.way._asdict()},
        "chosen": asdict(found.chosen),
        "shipped": asdict(shipped()),
        "budget_ms": plan.budget_ms,
        "best": asdict(best),
        "best_within_budget": asdict(kept) if kept else None,
        "share_of_limit": share,
        "lone_loss": loss,
        "targets": {
            "share_of_limit": {"at_least": SHARE_OF_LIMIT, "met": share >= SHARE_OF_LIMIT},
            "p99_within_budget": {"at_most_ms": plan.budget_ms, "met": kept is not None},
            "lone_loss": {"at_most": MOST_LONE_LOSS, "met": loss <= MOST_LONE_LOSS},
        },
        "curves": {name: [asdict(load) for load in loads.values()] for name, loads in curves.items()},
        "sweep": {
            "grid": found.grid,
            "measured": [
                {**asdict(settings), "points": [asdict(load) for load in loads.values()]}
                for settings, loads in found.measured.items()
            ],
        },
        "mixed": mixed,
        "machine": describe_machine(),
    }


def main() -> None:
    """Measure, write the results, print tables and the result."""
    result = json.loads(json.dumps(run(PLAN)), parse_float=lambda text: round(float(text), 4))
    RESULTS.mkdir(exist_ok=True)
    line = json.dumps(result)
    (RESULTS / "batching.json").write_text(line + "\n", encoding="utf-8")
    batching_report.plot(RESULTS / "batching.png", result)
    output = Console() if sys.stdout.isatty() else Console(width=150)
    output.print(*batching_report.tables(result), *batching_report.notes(result), sep="\n")
    print(line)


if __name__ == "__main__":
    main()
