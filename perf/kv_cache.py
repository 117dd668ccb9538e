"""What not computing a prefix again saves: `python -m perf.kv_cache`.

On a Llama of 0.1 billion random parameters with a context of 4096 tokens: time to the first token after a prefix never
seen and one seen before, a chat of ten turns, many clients with one system prompt, and the price where nothing is
shared. Beside it, ONNX Runtime GenAI continuing its own sequence. The last line of output is JSON; the rest of it, and
the figures behind it, are in perf/results/kv_cache.json.
"""

import json
import os
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).parents[1] / "python_backends"))

import numpy as np
from speculative_decoding.engine import Engine
from speculative_decoding.kv_cache import KVCache
from speculative_decoding.kv_layout import BlockLayout
from speculative_decoding.kv_memory import KVCacheSettings
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.options import GenerationOptions
from speculative_decoding.sequence import Sequence
from speculative_decoding.step_costs import StepCosts
from speculative_decoding.warm_up import measure_costs

from perf import kv_genai, kv_int8
from perf.kv_models import TENTH_OF_A_BILLION, Size, export_random_llama, load
from scripts.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
PRINTED = (
    "ttft_ratio",
    "chat_computed_fraction",
    "no_reuse_overhead",
    "int8_capacity_ratio",
    "int8_perplexity_ratio",
    "machine",
)


@dataclass(frozen=True)
class Plan:
    """What is measured, in tokens where nothing else is said."""

    size: Size = TENTH_OF_A_BILLION
    slots: int = 8
    budget: int = 1 << 30  # bytes
    prefixes: tuple[int, ...] = (128, 512, 1024, 2048)
    blocks: tuple[int, ...] = (8, 16, 32, 64)
    block_prefix: int = 1000  # not a whole number of blocks, as real ones are
    question: int = 32
    answer: int = 64
    system: int = 256
    turns: int = 10
    clients: int = 100
    unshared: int = 512
    repeats: int = 5
    overhead_turns: int = 30
    conversations: int = 50  # for the perplexity


class Prompts:
    """Random tokens that never repeat."""

    def __init__(self, vocabulary: int) -> None:
        self._rng = np.random.default_rng(0)
        self._vocabulary = vocabulary

    def new(self, count: int) -> list[int]:
        """Return so many tokens."""
        tokens: list[int] = self._rng.integers(5, self._vocabulary, count).tolist()
        return tokens


@contextmanager
def running(model: LanguageModel, costs: StepCosts, cache: KVCache | None) -> Iterator[Engine]:
    """An engine over a model, with a cache or without."""
    engine = Engine(model, None, 0, 1000, costs, kv_cache=cache)
    try:
        yield engine
    finally:
        engine.stop()


def fill(cache: KVCache, model: LanguageModel, prompts: Prompts, tokens: int) -> None:
    """Store what stands in a slot, whatever it is, until a cache has to evict."""
    while not cache.snapshot().counters.blocks_evicted:
        cache.insert("filling", prompts.new(tokens), model.slot(0))


def decode(engine: Engine, prompts: list[list[int]], tokens: int) -> list[Sequence]:
    """Ask for all answers at once, of so many tokens, and return the sequences when they are done."""
    done: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen(_: Sequence, __: list[int], reason: str | None) -> None:
        if reason:
            done.put(reason)

    options = GenerationOptions(max_tokens=tokens, ignore_eos=True)
    sequences = [Sequence(prompt, options, listen, engine.end_tokens) for prompt in prompts]
    engine.submit(*sequences)
    ended = {done.get() for _ in sequences}
    assert ended == {"length"}, ended
    return sequences


def first_token_s(engine: Engine, prompt: list[int]) -> float:
    """Return the seconds from a request to its first token."""
    [sequence] = decode(engine, [prompt], 1)
    return sequence.first_token - sequence.arrived


def prefix_seconds(engine: Engine, prompts: Prompts, plan: Plan, prefix: int) -> tuple[float, float]:
    """Return the median seconds to the first token after a prefix never seen, and after one seen before."""
    cold, warm = [], []
    for _ in range(plan.repeats):
        shared = prompts.new(prefix)
        cold.append(first_token_s(engine, shared + prompts.new(plan.question)))
        warm.append(first_token_s(engine, shared + prompts.new(plan.question)))
    return statistics.median(cold), statistics.median(warm)


def genai_seconds(peer: kv_genai.Peer, prompts: Prompts, plan: Plan, prefix: int) -> tuple[float, float]:
    """Return the same of ONNX Runtime GenAI, whose sequence goes on where the prefix ended."""
    pairs = [peer.first_token_s(prompts.new(prefix), prompts.new(plan.question)) for _ in range(plan.repeats)]
    cold, warm = zip(*pairs, strict=True)
    return statistics.median(cold), statistics.median(warm)


def chat(engine: Engine, prompts: Prompts, plan: Plan) -> list[Sequence]:
    """Have a chat, in which each turn's prompt is all that was said before it, and return its turns."""
    said = prompts.new(plan.system)
    turns = []
    for _ in range(plan.turns):
        said += prompts.new(plan.question)
        [sequence] = decode(engine, [said], plan.answer)
        turns.append(sequence)
        said = list(sequence.tokens)
    return turns


def chat_computed_fraction(engine: Engine, prompts: Prompts, plan: Plan) -> float:
    """Return the share of its prompts' tokens that a chat computes."""
    turns = chat(engine, prompts, plan)
    return 1 - sum(turn.reused for turn in turns) / sum(len(turn.prompt) for turn in turns)


def clients_seconds(engine: Engine, prompts: Prompts, plan: Plan) -> float:
    """Return how long it takes to answer many clients who share a system prompt."""
    system = prompts.new(plan.system)
    asked = [system + prompts.new(plan.question) for _ in range(plan.clients)]
    began = time.perf_counter()
    decode(engine, asked, plan.answer)
    return time.perf_counter() - began


def no_reuse_overhead(with_cache: Engine, without: Engine, prompts: Prompts, plan: Plan) -> float:
    """Return by what share answers to prompts that share nothing take longer with a cache, taking turns.

    A full cache, as after the first minutes of serving, writes over memory; one that fills also has to get it.
    """

    def seconds(engine: Engine) -> float:
        began = time.perf_counter()
        decode(engine, [prompts.new(plan.unshared)], plan.answer)
        return time.perf_counter() - began

    shares = []
    for turn in range(plan.overhead_turns):  # who goes first changes: the machine is not the same for both
        first, second = (with_cache, without) if turn % 2 else (without, with_cache)
        pair = {first: seconds(first), second: seconds(second)}
        shares.append(pair[with_cache] / pair[without])
    return statistics.median(shares) - 1


def by_block_size(model: LanguageModel, costs: StepCosts, prompts: Prompts, plan: Plan) -> dict[str, dict[str, float]]:
    """Return what blocks of several sizes save: warm over cold time to the first token, and the chat's fraction."""
    figures = {}
    for block in plan.blocks:
        layout = BlockLayout(model.shape.key_values, block_tokens=block)
        with running(model, costs, KVCache(layout, KVCacheSettings(plan.budget))) as engine:
            cold, warm = prefix_seconds(engine, prompts, plan, plan.block_prefix)
            fraction = chat_computed_fraction(engine, prompts, plan)
        figures[str(block)] = {"ttft_ratio": round(warm / cold, 4), "chat_computed_fraction": round(fraction, 4)}
    return figures


def measure(plan: Plan) -> dict[str, Any]:
    """Return every figure."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        export_random_llama(plan.size, folder)
        prompts = Prompts(plan.size.vocabulary)
        # Both engines, which never run at the same time, share these: two models or two tables of costs differ by more
        # than what is measured.
        model = load(folder, plan.slots)
        costs = measure_costs(model, None, 0)
        cache = KVCache(BlockLayout(model.shape.key_values), KVCacheSettings(plan.budget))
        with running(model, costs, cache) as engine, running(model, costs, None) as without:
            filling = no_reuse_overhead(engine, without, prompts, plan)
            fill(cache, model, prompts, plan.unshared)
            seconds = {str(prefix): prefix_seconds(engine, prompts, plan, prefix) for prefix in plan.prefixes}
            fraction = chat_computed_fraction(engine, prompts, plan)
            overhead = no_reuse_overhead(engine, without, prompts, plan)
            clients = [clients_seconds(one, prompts, plan) for one in (engine, without)]
        sizes = by_block_size(model, costs, prompts, plan)
        peer = kv_genai.Peer(folder)
        genai = {str(prefix): genai_seconds(peer, prompts, plan, prefix) for prefix in plan.prefixes}
    return {
        "ttft_ratio": ratios(seconds),
        "chat_computed_fraction": round(fraction, 4),
        "no_reuse_overhead": round(overhead, 4),
        "no_reuse_overhead_while_filling": round(filling, 4),
        "int8_capacity_ratio": round(kv_int8.capacity_ratio(model.shape.key_values, plan.budget), 3),
        "int8_perplexity_ratio": round(kv_int8.perplexity_ratio(plan.conversations), 5),
        "by_block_size": sizes,
        "ttft_ms": {prefix: [round(one * 1e3, 2) for one in pair] for prefix, pair in seconds.items()},
        "genai_ttft_ratio": ratios(genai),
        "genai_ttft_ms": {prefix: [round(one * 1e3, 2) for one in pair] for prefix, pair in genai.items()},
        "clients_s": {"with": round(clients[0], 3), "without": round(clients[1], 3), "clients": plan.clients},
        "machine": describe_machine(),
    }


def ratios(seconds: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Return warm over cold, by prefix."""
    return {prefix: round(warm / cold, 4) for prefix, (cold, warm) in seconds.items()}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the times to the first token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    series = {"this cache": result["ttft_ms"], "ONNX Runtime GenAI, one sequence": result["genai_ttft_ms"]}
    for label, times in series.items():
        tokens = [int(prefix) for prefix in times]
        cold, warm = zip(*times.values(), strict=True)
        [line] = axis.plot(tokens, cold, "o--", label=f"{label}, cold")
        axis.plot(tokens, warm, "o-", color=line.get_color(), label=f"{label}, warm")
    axis.set(xlabel="tokens of prefix", ylabel="time to first token, ms", yscale="log")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def report(measured: Callable[[], dict[str, Any]], folder: Path) -> None:
    """Measure, write the result and its plot to `folder`, and print what matters of it last."""
    result = measured()
    folder.mkdir(exist_ok=True)
    (folder / "kv_cache.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    plot(result, folder / "kv_cache.png")
    for name in (name for name in result if name not in PRINTED):
        print(f"{name}: {json.dumps(result[name])}")
    print(json.dumps({name: result[name] for name in PRINTED}))


def main() -> None:
    """Measure what the project's README reports."""
    report(lambda: measure(Plan()), RESULTS)


if __name__ == "__main__":
    main()
