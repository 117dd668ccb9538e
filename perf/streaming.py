"""perf_analyzer against the streaming models: `python -m perf.streaming`.

Times to the first response and between responses come from the time stamps that perf_analyzer exports. Prompts are in
phrasings that the shipped models were not trained on, and are decoded each time. The last line of output is JSON.
"""

import itertools
import json
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from perf import perf_analyzer
from scripts.demo import unseen_prompts
from scripts.machine import describe_machine
from scripts.serving.installation import PROJECT
from scripts.serving.server import TritonServer

INPUTS = Path(".build") / "perf_analyzer"  # within the project; named so in README
MODELS = ("generate", "language_model")
MOST_TOKENS = 96
CLIENTS = (1, 8)
WINDOW_MS = 4000
console = Console(stderr=True, soft_wrap=True)


def write_inputs(folder: Path) -> None:
    """Write the prompts for both models in perf_analyzer's format."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = unseen_prompts()
    generate = [{"text_input": [prompt]} for prompt in prompts]
    sampling = json.dumps({"max_tokens": MOST_TOKENS})
    decode = [{"text_input": [prompt], "stream": [True], "sampling_parameters": [sampling]} for prompt in prompts]
    for model, data in zip(MODELS, (generate, decode), strict=True):
        (folder / f"{model}.json").write_text(json.dumps({"data": data}), encoding="utf-8")


def options(model: str, clients: int) -> list[str]:
    """Return perf_analyzer's options; paths are relative to the project."""
    parameters = {"stream": "true:bool", "cache": "off:string", "max_tokens": f"{MOST_TOKENS}:int"}
    if model != "generate":
        parameters = {}
    asked = [word for name, value in parameters.items() for word in ("--request-parameter", f"{name}:{value}")]
    source = ["--input-data", str(INPUTS / f"{model}.json")]
    return ["-m", model, "--streaming", "--async", *source, *asked, "--concurrency-range", str(clients)]


def measure(server: TritonServer, model: str, clients: int, window_ms: int = WINDOW_MS) -> dict[str, float]:
    """Return answers a second, and milliseconds to the first response and between responses."""
    asked = options(model, clients)
    console.log(f".venv/bin/python -m perf.perf_analyzer {shlex.join(asked)}", highlight=False)
    with tempfile.TemporaryDirectory(prefix="perf-analyzer-") as scratch:
        export = Path(scratch) / "export.json"
        windows = perf_analyzer.windows(clients, window_ms)
        perf_analyzer.run(server, [*asked, *windows, "--profile-export-file", str(export)])
        requests = json.loads(export.read_text(encoding="utf-8"))["experiments"][0]["requests"]
    return summary(requests)


def summary(requests: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the figures of perf_analyzer's exported requests, whose time stamps are in nanoseconds.

    Raises PerfAnalyzerError when none was answered.
    """
    answered = [request for request in requests if request["response_timestamps"]]
    if not answered:
        raise perf_analyzer.PerfAnalyzerError("perf_analyzer exported no answered request: measure for longer")
    first = [(request["response_timestamps"][0] - request["timestamp"]) / 1e6 for request in answered]
    gaps = [
        (late - early) / 1e6
        for request in answered
        for early, late in itertools.pairwise(request["response_timestamps"])
    ]
    ends = [request["response_timestamps"][-1] for request in answered]
    seconds = (max(ends) - min(request["timestamp"] for request in answered)) / 1e9
    return {
        "answers_per_s": len(answered) / seconds,
        "ttft_ms_p50": _percentile(first, 50),
        "ttft_ms_p99": _percentile(first, 99),
        "itl_ms_p50": _percentile(gaps, 50),
        "itl_ms_p99": _percentile(gaps, 99),
    }


def _percentile(values: Sequence[float], share: int) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return round(statistics.quantiles(values, n=100, method="inclusive")[share - 1], 3)


def main() -> None:
    """Measure both models at each number of clients and print the figures."""
    write_inputs(PROJECT / INPUTS)
    with tempfile.TemporaryDirectory(prefix="streaming-") as state, TritonServer(state_dir=Path(state)) as server:
        figures = {model: {str(count): measure(server, model, count) for count in CLIENTS} for model in MODELS}
    print(json.dumps(figures | {"machine": describe_machine()}))


if __name__ == "__main__":
    main()
