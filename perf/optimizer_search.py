"""How much of a full search the optimizer's guided one needs: `python -m perf.optimizer_search`.

The embedder's batching, instances and threads: what the guided search finds, and the best of the full grid, then both
once more in turns, since the best of many noisy figures is the luckiest too. The last line of output is the JSON that
goes to perf/results/optimizer_search.json.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from rich.console import Console

from scripts.machine import describe_machine
from scripts.optimization.batching import Settings
from scripts.optimization.measurement import measure
from scripts.optimization.optimizer import Targets, optimize
from scripts.optimization.plan import Plan
from scripts.optimization.resolution import Wanted, resolve
from scripts.optimization.setup import Setup
from scripts.optimization.subject import Subject
from scripts.optimization.techniques import BATCHES, DELAYS_US, Technique, encoder_batching

RESULTS = Path(__file__).parent / "results"
PLAN = Plan(clients=16, requests=200, passes=1)
FINAL = replace(PLAN, passes=4)
AT_ONCE = 8  # servers
OUT_OF_REACH = Targets(latency_ms=1e-9, quality=0.9, objective="throughput")
console = Console(stderr=True)


def grid(cores: int) -> list[Settings]:
    """Return every combination of what the guided search varies."""
    shares = list(itertools.product((1, 2), sorted({1, cores})))
    ways: list[tuple[int, int | None]] = [(1, None), *itertools.product(BATCHES, (0, *DELAYS_US))]
    return [Settings(batch, delay, *share) for (batch, delay), share in itertools.product(ways, shares)]


def guided(subject: Subject, cores: int) -> tuple[Setup, int]:
    """Return what the optimizer finds for throughput, and how many setups it has measured."""
    batching = Technique("batching", lambda subject, most_loss: encoder_batching(BATCHES, DELAYS_US, cores))
    search = optimize(subject, OUT_OF_REACH, partial(measure, subject, plan=PLAN), console.log, [batching])
    return search.best, len({trial.setup for trial in search.trials})


def _rates(subject: Subject, setups: Sequence[Setup]) -> dict[Setup, float]:
    return {setup: measured.per_s for setup, measured in measure(subject, setups, PLAN).items()}


def run(work: Path) -> dict[str, Any]:
    """Search both ways, and compare what is found."""
    subject = resolve(Wanted("embedder", None, None, None, None, 0.0, OUT_OF_REACH.quality, work), work, console.log)
    cores = os.cpu_count() or 1
    found, measured = guided(subject, cores)
    setups = [replace(subject.first(), batching=settings) for settings in grid(cores)]
    rates: dict[Setup, float] = {}
    for start in range(0, len(setups), AT_ONCE):
        rates |= _rates(subject, setups[start : start + AT_ONCE])
        console.log(f"{len(rates)} of {len(setups)} measured")
    best = max(rates, key=lambda setup: rates[setup])
    final = measure(subject, list(dict.fromkeys([found, best])), FINAL)
    return {
        "grid": len(setups),
        "guided_measured": measured,
        "guided_share": measured / len(setups),
        "guided": asdict(found.batching),
        "best": asdict(best.batching),
        "guided_to_best": final[found].per_s / final[best].per_s,
        "to_unbatched": final[found].per_s / rates[subject.first()],
        "machine": describe_machine(),
    }


def main() -> None:
    """Search, write the result and print it."""
    with tempfile.TemporaryDirectory(prefix="optimizer-search-") as work:
        result = json.loads(json.dumps(run(Path(work))), parse_float=lambda text: round(float(text), 4))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "optimizer_search.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
