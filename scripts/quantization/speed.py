"""Latency, throughput and memory, of several models in turns, so that a noisy machine is noisy for all of them."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts.quantization.graph import Feeds
from scripts.quantization.runner import Runner
from scripts.serving.installation import PROJECT

BATCHES = (1, 8, 32)
ROUNDS = 30
CALLS = 2  # timed in each round, after one that is not
SETTLE_S = 0.003  # until the threads of the model before have stopped spinning


@dataclass(frozen=True)
class Latency:
    """Milliseconds a call, and rows a second at the median call."""

    p50_ms: float
    p95_ms: float
    rows_per_s: float


def measure_latency(
    runners: Mapping[str, Runner], batches: Sequence[int] = BATCHES, rounds: int = ROUNDS
) -> dict[str, dict[int, Latency]]:
    """Time one call of each runner at each batch size, in turns."""
    measured: dict[str, dict[int, Latency]] = {name: {} for name in runners}
    for batch in batches:
        steps = {name: runner.step(batch) for name, runner in runners.items()}
        times: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(rounds):
            for name, step in steps.items():
                time.sleep(SETTLE_S)
                step()
                for _ in range(CALLS):
                    start = time.perf_counter()
                    step()
                    times[name].append(time.perf_counter() - start)
        for name, seconds in times.items():
            p50, p95 = np.percentile(seconds, (50, 95))
            measured[name][batch] = Latency(float(p50 * 1e3), float(p95 * 1e3), float(batch / p50))
    return measured


def peak_memory_mib(folder: Path, provider: str, feeds: Feeds | None) -> float:
    """Return how much memory loading `folder` and running it takes at its peak, in a process of its own.

    feeds: an encoder's inputs; None for a decoder, which decodes a few rows.
    """
    with tempfile.NamedTemporaryFile(suffix=".npz") as inputs:
        if feeds is not None:
            np.savez(inputs, **feeds)
            inputs.flush()
        command = [sys.executable, "-m", "scripts.quantization.memory", str(folder), provider]
        command += [inputs.name] if feeds is not None else []
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT)
    return float(done.stdout)


def as_json(latencies: Mapping[int, Latency]) -> dict[str, Any]:
    """Return the latencies by batch size, as JSON takes them."""
    return {str(batch): asdict(latency) for batch, latency in latencies.items()}
