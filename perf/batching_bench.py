"""Variants of the embedder side by side on one server, measured in turns: a noisy machine is noisy for all of them."""

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perf import perf_analyzer
from perf.embedder_settings import Settings, write_repository
from perf.perf_analyzer import Load
from scripts.serving.server import TritonServer


@dataclass(frozen=True)
class Plan:
    """How much is measured. A cell is one variant at one number of clients, `turns` times."""

    tokens: int  # of each sentence where all are equally long
    budget_ms: float  # for p99
    clients: tuple[int, ...]
    sweep_clients: tuple[int, ...]  # the first is 1
    batches: tuple[int, ...]
    delays_us: tuple[int, ...]
    instances: tuple[int, ...]
    turns: int
    lone_turns: int
    window_ms: int
    direct_s: float
    mixed_sentences: int
    longest: int


Cells = dict[str, dict[int, Load]]


@contextmanager
def serving(variants: Mapping[str, Settings]) -> Iterator[TritonServer]:
    """Serve the embedder once under each name of `variants`."""
    with tempfile.TemporaryDirectory(prefix="batching-") as folder:
        repository, state = Path(folder, "repository"), Path(folder, "state")
        write_repository(repository, variants)
        with TritonServer(repository, state_dir=state) as server:
            yield server


def measure(
    server: TritonServer, models: Mapping[str, str], data: Path, clients: Sequence[int], turns: int, window_ms: int
) -> Cells:
    """Return for each key of `models` (its value is the model's name) and number of clients the median of all turns."""
    seen: dict[tuple[str, int], list[Load]] = {}
    for _ in range(turns):
        for count in clients:
            for key, model in models.items():
                load = perf_analyzer.measure(server, model, data, count, window_ms)
                seen.setdefault((key, count), []).append(load)
    return {key: {count: median(seen[key, count]) for count in clients} for key in models}


def median(loads: Sequence[Load]) -> Load:
    """Return the median of each figure."""
    figures: list[dict[str, Any]] = [asdict(load) for load in loads]
    values = {name: statistics.median(figure[name] for figure in figures) for name in figures[0]}
    return Load(**(values | {"clients": loads[0].clients}))


def within(loads: Mapping[int, Load], budget_ms: float) -> Load | None:
    """Return the point of highest throughput among those whose p99 keeps the budget."""
    kept = [load for load in loads.values() if load.p99_ms <= budget_ms]
    return max(kept, key=lambda load: load.per_s, default=None)
