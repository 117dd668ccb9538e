"""Decoding on an NVIDIA GPU, in one run: `python -m perf.gpu --pair FOLDER [--shape NAME ...]`.

FOLDER has 1/target and 1/draft, made by scripts.export_model --device cuda. Steps of Llama shapes with random weights
are timed against the time that reading the weights takes, at the bandwidth measured here, and against the same call
bare. The pair decodes plainly and speculatively, as it is and with a target made larger (feed-forward units added whose
output projections are zero: the answers stay). The last line of output is the JSON for perf/results/gpu.json.
"""

import argparse
import importlib
import json
import pkgutil
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console

from perf.gpu_models import widen
from perf.paged_shapes import SHAPES, write_llama
from scripts.demo_models.phrasings import UNSEEN
from scripts.machine import describe_machine
from scripts.serving.installation import PYTHON_BACKENDS

sys.path.append(str(PYTHON_BACKENDS))

from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.engine import Engine
from speculative_decoding.execution_provider import execution_provider
from speculative_decoding.options import GenerationOptions
from speculative_decoding.paged_model import PagedModel
from speculative_decoding.row_independence import rows_are_independent
from speculative_decoding.sequence import FinishReason
from speculative_decoding.sequence import Sequence as Answer
from speculative_decoding.tokenizer import Tokenizer
from speculative_decoding.warm_up import measure_costs

CONTEXT, PAST = 2048, 512
STEPS = tuple((batch, width) for batch in (1, 8, 32, 64) for width in (1, 5, 8))
AT_ONCE = (1, 8, 32, 64)
SPECULATION_LENGTH = 4
ANSWER_TOKENS = 96
PROMPTS_CHECKED = 1000
WIDER = 48  # how many times the larger target's feed-forward layers are wider
COPY_BYTES = 1 << 30
REPEATS = 20
MODULES = ("os", "re", "json", "asyncio", "logging", "socket", "email", "http", "ast", "string", "random", "decimal")
console = Console(stderr=True)


def measure_bandwidth() -> float:
    """Return bytes read and written a second by a large copy on the device, in units of 10^12."""
    cupy = importlib.import_module("cupy")
    source, target = cupy.ones(COPY_BYTES, cupy.uint8), cupy.empty(COPY_BYTES, cupy.uint8)
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    for _ in range(2):  # the first time warms up
        begin.record()
        for _ in range(REPEATS):
            cupy.copyto(target, source)
        end.record()
        end.synchronize()
    return 2 * REPEATS * COPY_BYTES / cupy.cuda.get_elapsed_time(begin, end) / 1e9


def measure_steps(folder: Path) -> dict[str, dict[str, float]]:
    """Return milliseconds of a step by batch x width: everything included, and of the bare call."""
    model = PagedModel(folder, 64, 0, False, execution_provider("GPU", 0))
    engine_ms, bare_ms = {}, {}
    for batch, width in STEPS:
        tokens, counts = np.ones((batch, width), np.int64), np.full(batch, width, np.int32)

        def step(batch: int = batch, tokens: Any = tokens, counts: Any = counts) -> None:
            model.lengths[:batch] = PAST
            model.forward(0, tokens, counts)

        engine_ms[f"{batch}x{width}"] = median_ms(step)
        bare_ms[f"{batch}x{width}"] = median_ms(model.rehearsal(batch, width))
    return {"step_ms": engine_ms, "bare_ms": bare_ms}


def median_ms(call: Callable[[], None]) -> float:
    """Return the median of a few calls, after some that do not count."""
    times = []
    for number in range(REPEATS + 4):
        began = time.perf_counter()
        call()
        if number >= 4:
            times.append(time.perf_counter() - began)
    return round(1e3 * statistics.median(times), 3)


def questions(count: int) -> list[str]:
    """Return questions about names of the standard library, in phrasings that the demo pair was not trained on."""
    names = list[str]()
    for root in MODULES:
        module = importlib.import_module(root)
        names += [f"{root}.{name}" for name in dir(module) if not name.startswith("_")]
        names += [f"{root}.{found.name}" for found in pkgutil.iter_modules(getattr(module, "__path__", []))]
    return [UNSEEN[number % len(UNSEEN)].format(n=names[number % len(names)]) for number in range(count)]


class Pair:
    """A target with a draft, decoding so many sequences at once."""

    def __init__(self, target: Path, draft: Path) -> None:
        provider, slots = execution_provider("GPU", 0), max(AT_ONCE)
        self.target = PagedModel(target, slots, 0, False, provider)
        self.independent = rows_are_independent(self.target)
        drafter = ModelDrafter(PagedModel(draft, slots, 0, False, provider))
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

    def close(self) -> None:
        """End the engine."""
        self._engine.stop()


def measure_pair(pair: Pair, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Return plain and speculative tokens/s by sequences at once, greedily, and what else is seen of them."""
    wish = GenerationOptions(max_tokens=ANSWER_TOKENS)
    found: dict[str, Any] = {"plain": {}, "speculative": {}, "acceptance_rate": {}, "first_token_ms": {}}
    for at_once in AT_ONCE:
        some = prompts[: max(8, 3 * at_once)]
        for kind, length in (("plain", 0), ("speculative", None)) * 2:  # the first turn warms up
            _, speed = pair.answer(some, [replace(wish, speculation_length=length)] * len(some), at_once)
            found[kind][str(at_once)] = round(speed["tokens_per_s"], 1)
        found["acceptance_rate"][str(at_once)] = round(speed["acceptance_rate"], 3)
        found["first_token_ms"][str(at_once)] = round(speed["first_token_ms"], 2)
        console.print(f"{at_once} at once: {found['plain'][str(at_once)]} plain, {found['speculative'][str(at_once)]}")
    return found


def count_differences(pair: Pair, prompts: Sequence[list[int]]) -> dict[str, int]:
    """Return, by way of decoding, how many answers differ from plain decoding one at a time or eight at once."""
    differences = {}
    for name, sampling in (("greedy", {"temperature": 0.0}), ("seeded", {"temperature": 0.8, "top_p": 0.95})):
        options = [GenerationOptions(max_tokens=40, seed=number, **sampling) for number in range(len(prompts))]
        plain = [replace(wish, speculation_length=0) for wish in options]
        expected, _ = pair.answer(prompts, plain, 8)
        for kind, wishes, at_once in (
            ("plain", plain, 1),
            ("plain", plain, 32),
            ("speculative", options, 1),
            ("speculative", options, 8),
            ("speculative", options, 32),
        ):
            some = prompts if at_once > 1 else prompts[: len(prompts) // 5]
            got, _ = pair.answer(some, wishes[: len(some)], at_once)
            wrong = sum(one != other for one, other in zip(got, expected, strict=False))
            differences[f"{name} {kind} at {at_once}"] = wrong
            console.print(f"{name}, {kind}, {at_once} at once: {wrong} of {len(some)} differ")
    return differences


def main() -> None:
    """Measure, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, action="append", default=[])
    arguments = parser.parse_args()
    target, draft = (arguments.pair / "1" / role for role in ("target", "draft"))
    cupy = importlib.import_module("cupy")
    gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    bandwidth = measure_bandwidth()
    results: dict[str, Any] = {"bandwidth_tb_s": round(bandwidth, 3), "step_ms": {}, "bare_ms": {}, "bound_ms": {}}
    tokenizer = Tokenizer(target, "chat")
    prompts = [tokenizer.encode_prompt(question) for question in questions(PROMPTS_CHECKED)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        widen(target, Path(scratch) / "wide", WIDER)
        for name, folder, checked in (
            ("demo", target, PROMPTS_CHECKED),
            ("demo, widened", Path(scratch) / "wide", PROMPTS_CHECKED // 5),
        ):
            pair = Pair(folder, draft)
            results[name] = {"rows_independent": pair.independent, **measure_pair(pair, prompts)}
            results[name]["prompts_checked"] = checked
            results[name]["differences"] = count_differences(pair, prompts[:checked])
            pair.close()
        shutil.rmtree(Path(scratch) / "wide")
        for name in arguments.shape:
            shape = SHAPES[name]
            write_llama(shape, Path(scratch) / name, CONTEXT)
            for key, times in measure_steps(Path(scratch) / name).items():
                results[key][name] = times
            results["bound_ms"][name] = round(shape.weight_bytes / bandwidth / 1e9, 3)
            console.print(name, results["step_ms"][name], results["bare_ms"][name], results["bound_ms"][name])
            shutil.rmtree(Path(scratch) / name)
    wide = results["demo, widened"]
    results["tokens_per_s"] = {kind: wide[kind] for kind in ("plain", "speculative")}
    results["acceptance_rate"] = wide["acceptance_rate"]
    differences = [sum(results[name]["differences"].values()) for name in ("demo", "demo, widened")]
    results["identical_outputs"] = not any(differences)
    results["machine"] = {**describe_machine(), "gpu": gpu, "onnxruntime": onnxruntime.__version__}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
