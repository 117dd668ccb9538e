"""A guided sweep over the embedder's batching settings: one knob at a time, from the best so far.

The order is that of NVIDIA's advice for dynamic batching: the batch first, then the delay; what the cores are shared
out among comes last, because it changes least on a CPU.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from perf.batching_bench import Cells, Plan, measure, serving, within
from perf.embedder_settings import Settings
from perf.perf_analyzer import Load

MOST_LONE_LOSS = 0.05
WORTHWHILE = 1.02  # times the throughput: a setting further on is taken for no less
OFF = "off"


class Sweep(NamedTuple):
    """What the sweep chose, and everything that it measured; grid: settings that a full search would measure."""

    chosen: Settings
    measured: dict[Settings, dict[int, Load]]
    grid: int


def sweep(plan: Plan, start: Settings, data: Path, log: Callable[[str], None]) -> Sweep:
    """Return the best settings for `plan`, from `start`."""
    cores = start.threads
    shares = [(count, threads) for count in plan.instances for threads in {cores, max(1, cores // count)}]
    stages: list[Callable[[Settings], list[Settings]]] = [
        lambda best: [replace(best, max_batch_size=size) for size in plan.batches],
        lambda best: [replace(best, max_queue_delay_us=delay) for delay in plan.delays_us],
        lambda best: [replace(best, instances=count, threads=threads) for count, threads in shares],
    ]
    best, measured = start, {}
    for stage in stages:
        candidates = list(dict.fromkeys([best, *stage(best)]))
        if len(candidates) == 1:
            continue
        cells = _measure(plan, candidates, data)
        measured |= {settings: cells[_name(index)] for index, settings in enumerate(candidates)}
        best = choose({settings: measured[settings] for settings in candidates}, cells[OFF], plan.budget_ms)
        log(f"{len(candidates)} settings measured, best so far: {best.describe()}")
    return Sweep(best, measured, len(plan.batches) * len(plan.delays_us) * len(shares))


def choose(cells: Mapping[Settings, Mapping[int, Load]], off: Mapping[int, Load], budget_ms: float) -> Settings:
    """Return the settings of highest throughput within the budget, at which a lone client loses no more than 5%.

    The first wins unless another is worthwhile, and stays when none qualifies.
    """
    best, *others = cells
    best_rate = _rate(cells[best], off, budget_ms)
    for settings in others:
        rate = _rate(cells[settings], off, budget_ms)
        if rate > WORTHWHILE * best_rate:
            best, best_rate = settings, rate
    return best


def lone_loss(loads: Mapping[int, Load], off: Mapping[int, Load]) -> float:
    """Return which fraction of its latency with batching off a single client loses (negative: gains)."""
    return loads[1].p50_ms / off[1].p50_ms - 1


def _rate(loads: Mapping[int, Load], off: Mapping[int, Load], budget_ms: float) -> float:
    point = within(loads, budget_ms)
    return point.per_s if point and lone_loss(loads, off) <= MOST_LONE_LOSS else 0.0


def _measure(plan: Plan, candidates: Sequence[Settings], data: Path) -> Cells:
    variants = {_name(index): settings for index, settings in enumerate(candidates)}
    variants[OFF] = replace(candidates[0], max_queue_delay_us=None)
    names = {name: name for name in variants}
    with serving(variants) as server:
        lone = measure(server, names, data, [1], max(1, plan.lone_turns // 2), plan.window_ms)
        many = [count for count in plan.sweep_clients if count > 1]
        loaded = measure(server, {name: name for name in names if name != OFF}, data, many, 1, plan.window_ms)
    return {name: lone[name] | loaded.get(name, {}) for name in names}


def _name(index: int) -> str:
    return f"candidate_{index}"
