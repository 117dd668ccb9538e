"""Triton's perf_analyzer, as `make tools` installs it, run against a server of ours.

`python -m perf.perf_analyzer OPTIONS` serves the project's repository, passes the options on, and stops the server.
"""

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytriton

from scripts.serving.installation import PROJECT
from scripts.serving.server import TritonServer

BINARY = Path(sys.prefix) / "perf_analyzer" / "bin" / "perf_analyzer"
# It is linked against CUDA's runtime, and calls none of it; the wheel of the embedded server has both libraries.
LIBRARIES = {"libcudart.so.12": "libcudart-*.so.12*", "libb64.so.0d": "libb64-*.so.0d"}
WINDOWS = 3  # it judges the last three
ANY = "1000"  # per cent of difference between windows: how noisy a machine is, is not for it to judge
TIMEOUT_S = 300


class PerfAnalyzerError(Exception):
    """perf_analyzer is not installed or failed."""


@dataclass(frozen=True)
class Load:
    """What so many clients saw, each sending its next request when it has its answer; times in milliseconds.

    batch: requests that the server ran together on average.
    """

    clients: int
    per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    batch: float


def measure(server: TritonServer, model: str, data: Path, clients: int, window_ms: int) -> Load:
    """Return what `clients` see who send the inputs in `data` (perf_analyzer's JSON) in turn over gRPC.

    Raises PerfAnalyzerError with perf_analyzer's own words.
    """
    with tempfile.TemporaryDirectory(prefix="perf-analyzer-") as scratch:
        report = Path(scratch) / "report.csv"
        options = [*windows(clients, window_ms), "--concurrency-range", str(clients), "-f", str(report)]
        output = run(server, ["-m", model, "--input-data", str(data), "--percentile", "99", *options])
        with report.open(encoding="utf-8") as lines:
            row = next(csv.DictReader(lines))
    inferences, executions = (
        int(re.findall(rf"{kind} count: (\d+)", output)[-1]) for kind in ("Inference", "Execution")
    )
    p50, p95, p99 = (float(row[f"p{share} latency"]) / 1e3 for share in (50, 95, 99))
    return Load(clients, float(row["Inferences/Second"]), p50, p95, p99, inferences / max(executions, 1))


def run(server: TritonServer, options: Sequence[str]) -> str:
    """Run perf_analyzer against the gRPC port of `server` and return what it printed. Raises PerfAnalyzerError."""
    if not BINARY.exists():
        raise PerfAnalyzerError(f"{BINARY} is missing: `make tools` installs it")
    with tempfile.TemporaryDirectory(prefix="perf-analyzer-") as libraries:
        _link_libraries(Path(libraries))
        path = os.pathsep.join(filter(None, [libraries, os.environ.get("LD_LIBRARY_PATH", "")]))
        done = subprocess.run(
            [BINARY, *connection(server.grpc_url, server.admin_key), *options],
            env=os.environ | {"LD_LIBRARY_PATH": path},
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise PerfAnalyzerError(f"perf_analyzer exited with {done.returncode}: {' | '.join(said[-5:])}")
    return done.stdout


def connection(url: str, admin_key: str) -> list[str]:
    """Return the options that reach a server; it reads the statistics API, which needs the server's key."""
    return ["-i", "grpc", "-u", url, "-H", f"triton-grpc-protocol-admin-key:{admin_key}"]


def windows(clients: int, window_ms: int) -> list[str]:
    """Return the options that make it take three windows, each of two answers a client or more, and be content."""
    count = ["--measurement-mode", "count_windows", "--measurement-request-count", str(2 * clients)]
    count += ["--measurement-interval", str(window_ms)]
    return [*count, "--max-trials", str(WINDOWS), "--stability-percentage", ANY]


def _link_libraries(folder: Path) -> None:
    wheel = Path(pytriton.__file__).parents[1] / "nvidia_pytriton.libs"
    for name, pattern in LIBRARIES.items():
        found = next(wheel.glob(pattern), None)
        if found is None:
            raise PerfAnalyzerError(f"{wheel} has no {pattern}, which perf_analyzer is linked against")
        (folder / name).symlink_to(found)


def main() -> None:
    """Run perf_analyzer once with the arguments of the command line."""
    with tempfile.TemporaryDirectory(prefix="perf-analyzer-") as state, TritonServer(state_dir=Path(state)) as server:
        try:
            print(run(server, sys.argv[1:]))
        except PerfAnalyzerError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
