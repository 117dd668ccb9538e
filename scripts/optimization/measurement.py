"""Measuring ways to serve a model on real servers, in turns: a noisy machine is noisy for all of them."""

import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from scripts.optimization.plan import Plan
from scripts.optimization.setup import Setup
from scripts.optimization.subject import Ask, Request, Subject
from scripts.serving.server import TritonServer, response_cache

CACHE_BYTES = 256 << 20  # of Triton's response cache
Item = TypeVar("Item")


@dataclass(frozen=True)
class Measurement:
    """Milliseconds as clients see them, requests/s, CPU seconds of 1,000 requests, MiB, and quality (1: best)."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    per_s: float
    cpu_s_per_1000: float
    memory_mib: float
    quality: float

    def to_json(self) -> dict[str, float]:
        """Return all figures."""
        return asdict(self)


@dataclass
class _Tally:
    seconds: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    memory: float = 0.0
    answers: list[tuple[Request, Any]] = field(default_factory=list)


def measure(subject: Subject, setups: Sequence[Setup], plan: Plan) -> dict[Setup, Measurement]:
    """Serve each of `setups` by a server of its own and measure all in turns. Raises ServeError."""
    warm_up, *passes = [subject.workload(number, plan) for number in range(plan.passes + 1)]
    tallies = {setup: _Tally() for setup in setups}
    with ExitStack() as stack:
        servers = {setup: _serve(stack, subject, setup) for setup in setups}
        for number, requests in enumerate([warm_up[: len(warm_up) // 4], *passes]):
            for setup, server in servers.items():
                ask = subject.ask(setup, f"pass {number}")
                _run(server, ask, requests, plan.clients, tallies[setup] if number else _Tally())
    return {setup: _figures(subject, setup, tally) for setup, tally in tallies.items()}


def _serve(stack: ExitStack, subject: Subject, setup: Setup) -> TritonServer:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optimize-")))
    subject.write(setup, folder / "repository")
    caching = response_cache(CACHE_BYTES if setup.cached else 0)
    return stack.enter_context(TritonServer(folder / "repository", state_dir=folder / "state", options=caching))


def _run(
    server: TritonServer, ask: Callable[[str], Ask], requests: Sequence[Request], clients: int, tally: _Tally
) -> None:
    waiting = _Shared(requests)

    def act() -> list[tuple[Request, Any, float]]:
        answers = []
        with ask(server.grpc_url) as send:
            for request in iter(waiting.take, None):
                began = time.perf_counter()
                answer = send(request)
                answers.append((request, answer, time.perf_counter() - began))
        return answers

    before, began = server.usage(), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        done = list(itertools.chain.from_iterable(pool.map(lambda _: act(), range(clients))))
    tally.wall_s += time.perf_counter() - began
    after = server.usage()
    tally.cpu_s += after.cpu_s - before.cpu_s
    tally.memory = max(tally.memory, after.memory_bytes)
    tally.seconds += [seconds for _, _, seconds in done]
    tally.answers += [(request, answer) for request, answer, _ in done]


class _Shared(Generic[Item]):
    """Hands each item to one taker, None when there is no more. Thread-safe."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()

    def take(self) -> Item | None:
        with self._lock:
            return next(self._items, None)


def _figures(subject: Subject, setup: Setup, tally: _Tally) -> Measurement:
    p50, p95, p99 = np.percentile(tally.seconds, (50, 95, 99)) * 1e3
    return Measurement(
        mean_ms=float(np.mean(tally.seconds)) * 1e3,
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99),
        per_s=len(tally.seconds) / tally.wall_s,
        cpu_s_per_1000=1000 * tally.cpu_s / len(tally.seconds),
        memory_mib=tally.memory / 2**20,
        quality=subject.quality(setup, tally.answers),
    )
