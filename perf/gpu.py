"""Everything that runs on an NVIDIA GPU, in one run: `python -m perf.gpu PAIR`.

PAIR is a folder made by perf.gpu_pair: a target and a draft, trained, exported, and prompts that neither has seen. The
pair decodes plainly and speculatively, beside ONNX Runtime GenAI and transformers. Steps of Llama shapes with random
weights are timed against the time that reading the weights takes, at the bandwidth measured here, against the same call
bare, and against what it would take if answers might depend on the batch (perf.gpu_steps). --embedder takes an ONNX
sentence encoder, in fp16, --vllm the Python of an environment that has vLLM. The last line of output is the JSON for
perf/results/gpu.json.
"""

import argparse
import gc
import importlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console

from perf.gpu_plot import plot
from perf.gpu_steps import measure_steps, median_ms
from perf.paged_shapes import SHAPES, write_llama
from scripts.machine import describe_machine
from scripts.serving.installation import PYTHON_BACKENDS

sys.path.append(str(PYTHON_BACKENDS))

from semantic_cache.exact_index import ExactIndex
from semantic_cache.records import Vectors
from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.engine import Engine
from speculative_decoding.engine_statistics import Statistics
from speculative_decoding.execution_provider import execution_provider
from speculative_decoding.options import GenerationOptions
from speculative_decoding.paged_independence import limit_tokens
from speculative_decoding.paged_model import PagedModel
from speculative_decoding.sequence import FinishReason
from speculative_decoding.sequence import Sequence as Answer
from speculative_decoding.warm_up import measure_costs

RESULTS = Path(__file__).parent / "results"
CONTEXT = 2048
AT_ONCE = (1, 8, 32, 64)
SPECULATION_LENGTH = 8
ANSWER_TOKENS = 96
CHECKED_TOKENS, LONG_TOKENS = 40, 1024
CHECKED = (("plain", 1), ("plain", 32), ("speculative", 1), ("speculative", 8), ("speculative", 32))
CHECKED_LONG = (("plain", 32), ("speculative", 32))
PREFIX_TOKENS, QUESTION_TOKENS, PREFIXES = 1024, 32, 8
CACHED_BYTES, TIER_BYTES = 1 << 30, 1 << 32
OTHER_PREFIXES = 30  # as many as push those asked for before off the device
ENTRIES, DIMENSIONS, LOOKUPS = 1_000_000, 384, 200
EMBEDDED = (1, 8, 64)  # sentences of 32 tokens at once
EMBEDDED_TOKENS = 32
VLLM_SCRIPT, VLLM_DRAFT_TOKENS = Path(__file__).with_name("gpu_vllm.py"), 5
COPY_BYTES = 1 << 30
COPIES, TURNS = 20, 5
console = Console(stderr=True)


def measure_bandwidth() -> float:
    """Return bytes read and written a second by a large copy on the device, in units of 10^12."""
    cupy = importlib.import_module("cupy")
    source, target = cupy.ones(COPY_BYTES, cupy.uint8), cupy.empty(COPY_BYTES, cupy.uint8)
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    for _ in range(2):  # the first time warms up
        begin.record()
        for _ in range(COPIES):
            cupy.copyto(target, source)
        end.record()
        end.synchronize()
    return 2 * COPIES * COPY_BYTES / cupy.cuda.get_elapsed_time(begin, end) / 1e9


class Pair:
    """A target with a draft, decoding so many sequences at once."""

    def __init__(self, folder: Path) -> None:
        provider, slots = execution_provider("GPU", 0), max(AT_ONCE)
        target, draft = folder / "1" / "target", folder / "1" / "draft"
        self.target = PagedModel(target, slots, 0, False, provider, CACHED_BYTES, TIER_BYTES)
        self.independent = limit_tokens(self.target)
        drafter = ModelDrafter(PagedModel(draft, slots, 0, False, provider, CACHED_BYTES // 8, TIER_BYTES // 8))
        self.costs = measure_costs(self.target, drafter, SPECULATION_LENGTH)
        self._engine = Engine(self.target, drafter, SPECULATION_LENGTH, 10000, self.costs)

    def answer(
        self, prompts: Sequence[list[int]], options: Sequence[GenerationOptions], at_once: int
    ) -> tuple[list[list[int]], dict[str, float]]:
        """Return the answers, and tokens a second, the acceptance rate and the median time to the first token."""
        answers = [list[int]() for _ in prompts]
        ended, free, drafted, accepted = [0], threading.Semaphore(at_once), [0], [0]
        done = threading.Event()
        first_ms = list[float]()

        def listen(number: int, sequence: Answer, tokens: list[int], reason: FinishReason | None) -> None:
            answers[number] += tokens
            if reason:
                assert reason in ("stop", "length"), reason
                drafted[0] += sequence.drafted
                accepted[0] += sequence.accepted
                first_ms.append(1e3 * (sequence.first_token - sequence.admitted))
                ended[0] += 1
                free.release()
                if ended[0] == len(prompts):
                    done.set()

        began = time.perf_counter()
        for number, (prompt, wish) in enumerate(zip(prompts, options, strict=True)):
            free.acquire()
            self._engine.submit(
                Answer(prompt, wish, lambda *heard, number=number: listen(number, *heard), self._engine.end_tokens)
            )
        assert done.wait(300)
        seconds = time.perf_counter() - began
        rate = accepted[0] / drafted[0] if drafted[0] else 0.0
        speed = {"tokens_per_s": sum(map(len, answers)) / seconds, "acceptance_rate": rate}
        return answers, {**speed, "first_token_ms": statistics.median(first_ms)}

    def statistics(self) -> Statistics:
        """Return the engine's sums."""
        return self._engine.statistics.copy()

    def close(self) -> None:
        """End the engine."""
        self._engine.stop()


def measure_pair(pair: Pair, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Return plain and speculative tokens/s by sequences at once, and what else is seen of them.

    Each is the median of TURNS turns, in each of which every way has its own; `range` has the least and the most.
    """
    wish = GenerationOptions(max_tokens=ANSWER_TOKENS, ignore_eos=True)
    ways = {
        "plain": replace(wish, speculation_length=0),
        "speculative": wish,
        "draft model": replace(wish, drafter="model"),
        "sampled plain": replace(wish, speculation_length=0, temperature=0.8, top_p=0.95, seed=1),
        "sampled speculative": replace(wish, temperature=0.8, top_p=0.95, seed=1),
    }
    found: dict[str, Any] = {kind: {} for kind in (*ways, "acceptance_rate", "first_token_ms")}
    ranges: dict[str, dict[str, list[float]]] = {kind: {} for kind in ways}
    for at_once in AT_ONCE:
        some, rows = prompts[: max(8, 3 * at_once)], str(at_once)
        speeds: dict[str, list[dict[str, float]]] = {kind: [] for kind in ways}
        for turn, (kind, way) in product(range(1 + TURNS), ways.items()):  # the first turn warms up
            stranger = replace(way, tenant=f"{kind}, {at_once} at once, turn {turn}")  # finds nobody's prefixes
            _, speed = pair.answer(some, [stranger] * len(some), at_once)
            speeds[kind].append(speed)
        for kind, turns in speeds.items():
            each = sorted(round(speed["tokens_per_s"], 1) for speed in turns[1:])
            found[kind][rows], ranges[kind][rows] = statistics.median(each), [each[0], each[-1]]
        for name, digits in (("acceptance_rate", 3), ("first_token_ms", 2)):
            found[name][rows] = round(statistics.median(speed[name] for speed in speeds["speculative"][1:]), digits)
        console.print(at_once, "at once:", {kind: found[kind][rows] for kind in found})
    statistics_, overhead = pair.statistics(), {}
    overhead["round_ms"] = 1e3 * statistics_.step_s / statistics_.rounds
    overhead["device_ms"] = 1e3 * statistics_.model_s / statistics_.rounds
    return {**found, "range": ranges, "rounds": {name: round(value, 3) for name, value in overhead.items()}}


def measure_prefixes(pair: Pair, prompts: Sequence[list[int]]) -> dict[str, float]:
    """Return milliseconds to the first token of a question after a prefix never seen, seen before, and on the host.

    from_host: how many blocks came back from there.
    """
    text = [token for prompt in prompts for token in prompt]
    wish = [GenerationOptions(max_tokens=1)]
    found: dict[str, list[float]] = {"cold": [], "warm": [], "from_host": []}

    def ask(kind: str, number: int, question: int) -> None:
        begin = number * (PREFIX_TOKENS + 3 * QUESTION_TOKENS)
        prefix, rest = text[begin : begin + PREFIX_TOKENS], text[begin + PREFIX_TOKENS + question * QUESTION_TOKENS :]
        _, speed = pair.answer([prefix + rest[:QUESTION_TOKENS]], wish, 1)
        found[kind].append(speed["first_token_ms"])

    for number in range(PREFIXES):
        ask("cold", number, 0)
        ask("warm", number, 1)
    for number in range(PREFIXES, PREFIXES + OTHER_PREFIXES):
        ask("cold", number, 0)
    before = pair.target.prefixes.snapshot().counters.tier_hits
    for number in range(PREFIXES):
        ask("from_host", number, 2)
    blocks = pair.target.prefixes.snapshot().counters.tier_hits - before
    times = {f"{kind}_ms": round(statistics.median(times[2:]), 3) for kind, times in found.items()}
    return {**times, "blocks_from_host": blocks}


def count_differences(pair: Pair, prompts: Sequence[list[int]]) -> dict[str, int]:
    """Return, by way of decoding, how many answers differ from plain decoding eight at a time.

    The prompts are asked for as they are, and joined to prompts of LONG_TOKENS tokens.
    """
    joined = [token for prompt in prompts for token in prompt]
    long = [joined[begin : begin + LONG_TOKENS] for begin in range(0, len(joined) - LONG_TOKENS + 1, LONG_TOKENS)]
    differences = {}
    for name, sampling in (("greedy", {"temperature": 0.0}), ("seeded", {"temperature": 0.8, "top_p": 0.95})):
        for length, asked, ways in (("", prompts, CHECKED), (f", prompts of {LONG_TOKENS}", long, CHECKED_LONG)):
            for way, wrong in compare_answers(pair, asked, sampling, ways).items():
                differences[f"{name} {way}{length}"] = wrong
                console.print(f"{name} {way}{length}: {wrong} differ")
    return differences


def compare_answers(
    pair: Pair, prompts: Sequence[list[int]], sampling: dict[str, float], ways: Sequence[tuple[str, int]]
) -> dict[str, int]:
    """Return how many answers differ, by kind of decoding and prompts at once: one in five alone, for it takes long."""
    options = [GenerationOptions(max_tokens=CHECKED_TOKENS, seed=number, **sampling) for number in range(len(prompts))]
    wishes = {"speculative": options, "plain": [replace(wish, speculation_length=0) for wish in options]}
    expected, _ = pair.answer(prompts, wishes["plain"], 8)
    differences = {}
    for kind, at_once in ways:
        every = 5 if at_once == 1 else 1
        got, _ = pair.answer(prompts[::every], wishes[kind][::every], at_once)
        wrong = sum(one != other for one, other in zip(got, expected[::every], strict=True))
        differences[f"{kind} at {at_once}"] = wrong
    return differences


def measure_lookups() -> dict[str, float]:
    """Return milliseconds of a lookup among ENTRIES vectors by exact search, and how often the nearest was found."""
    cupy = importlib.import_module("cupy")
    index, rng = ExactIndex(DIMENSIONS), np.random.default_rng(0)
    matrix = rng.standard_normal((ENTRIES, DIMENSIONS), np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    for begin in range(0, ENTRIES, 100_000):
        part = matrix[begin : begin + 100_000]
        index.add(Vectors(np.arange(begin, begin + len(part), dtype=np.uint64), [1.0] * len(part), part))
    asked = matrix[:LOOKUPS] + rng.standard_normal((LOOKUPS, DIMENSIONS), np.float32) * DIMENSIONS**-0.5
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    nearest = (cupy.asarray(asked) @ cupy.asarray(matrix).T).argmax(1).get()
    times, right = [], 0
    for vector, expected in zip(asked, nearest.tolist(), strict=True):
        began = time.perf_counter()
        found = index.nearest(vector, 5)
        times.append(time.perf_counter() - began)
        right += found[0] == expected
    return {"ms": round(1e3 * statistics.median(times), 3), "recall_at_1": right / LOOKUPS}


def measure_embedder(path: Path) -> dict[str, float]:
    """Return sentences a second by sentences at once."""
    options = {"device_id": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    session = onnxruntime.InferenceSession(str(path), providers=[("CUDAExecutionProvider", options)])
    found = {}
    for rows in EMBEDDED:
        ids = np.random.default_rng(0).integers(1000, 20000, (rows, EMBEDDED_TOKENS))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        [run_ms] = median_ms(lambda feeds=feeds: session.run(None, feeds))
        found[str(rows)] = round(1e3 * rows / run_ms, 1)
    return found


def in_own_process(module: str, folder: Path) -> Any:
    """Return what a module of perf prints about a folder, in a process of its own; its exit status when it fails."""
    return last_line([sys.executable, "-m", module, str(folder)])


def vllm_peers(python: str, pair: Path) -> dict[str, Any]:
    """Return tokens a second of vLLM, plain and with the draft, in that Python's environment."""
    found: dict[str, Any] = {}
    for name, drafting in (("vLLM", []), ("vLLM, draft model", ["--draft-tokens", str(VLLM_DRAFT_TOKENS)])):
        command = [python, str(VLLM_SCRIPT), str(pair), "--new-tokens", str(ANSWER_TOKENS), *drafting]
        printed = last_line(command)
        found |= {name: printed} if "error" in printed else printed
    return found


def last_line(command: list[str]) -> Any:
    """Return the JSON in the last line that a command prints; its exit status when it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": f"exit {done.returncode}"}


def main() -> None:
    """Measure, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--shape", choices=SHAPES, action="append", default=[])
    parser.add_argument("--embedder", type=Path)
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment that has vLLM, to measure it too")
    parser.add_argument("--through-triton", action="store_true", help="serve the pair, too, as perf.gpu_triton does")
    arguments = parser.parse_args()
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError:
        parser.error("it needs an NVIDIA GPU, and onnxruntime-gpu and CuPy installed")
    if not (arguments.pair / "prompts.json").is_file():
        parser.error(f"PAIR {arguments.pair} has no prompts.json: make one with perf.gpu_pair")
    gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    bandwidth = measure_bandwidth()
    made = json.loads((arguments.pair / "prompts.json").read_text())
    prompts = made.pop("prompts")
    results: dict[str, Any] = {
        "machine": {**describe_machine(), "gpu": gpu},
        "bandwidth_tb_s": round(bandwidth, 3),
    }
    pair = Pair(arguments.pair)
    results["pair"] = {
        **made,
        "rows_independent": pair.independent,
        "most_tokens": pair.target.most_tokens,
        "prompts_checked": len(prompts),
    }
    results["tokens_per_s"] = measure_pair(pair, prompts)
    results["acceptance_rate"] = results["tokens_per_s"].pop("acceptance_rate")
    keep(results)
    results["prefix"] = measure_prefixes(pair, prompts)
    results["differences"] = count_differences(pair, prompts)
    results["identical_outputs"] = not any(results["differences"].values())
    keep(results)
    pair.close()
    del pair
    gc.collect()
    results |= {"step_ms": {}, "bare_ms": {}, "inexact_ms": {}, "bound_ms": {}}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        for name in arguments.shape:
            shape = SHAPES[name]
            write_llama(shape, Path(scratch) / name, CONTEXT)
            for key, times in measure_steps(Path(scratch) / name).items():
                results[key][name] = times
            gc.collect()
            cupy.get_default_memory_pool().free_all_blocks()
            results["inexact_ms"][name] = in_own_process("perf.gpu_steps", Path(scratch) / name)
            results["bound_ms"][name] = round(shape.weight_bytes / bandwidth / 1e9, 3)
            console.print(name, {key: results[key][name] for key in ("step_ms", "bare_ms", "inexact_ms", "bound_ms")})
            keep(results)
            shutil.rmtree(Path(scratch) / name)
    lookups = measure_lookups()
    results |= {"cache_lookup_ms_1m": lookups["ms"], "cache_recall_at_1": lookups["recall_at_1"]}
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    if arguments.embedder:
        results["embedder_sentences_per_s"] = measure_embedder(arguments.embedder)
    if arguments.through_triton:
        results["through_triton"] = in_own_process("perf.gpu_triton", arguments.pair)
        keep(results)
    results["peers"] = in_own_process("perf.gpu_peers", arguments.pair)
    keep(results)
    if arguments.vllm:
        results["peers"] |= vllm_peers(arguments.vllm, arguments.pair)
        keep(results)
    plot(RESULTS / "gpu.png", results)
    print(json.dumps(results))


def keep(results: dict[str, Any]) -> None:
    """Write the results there are, so that a run which is cut off leaves them."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu.json").write_text(json.dumps(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
