"""Plain and speculative decoding, ours and others', in one run over the same prompts: `python -m perf.speculative`.

Two targets: the demo pair's, and the same made larger without changing what it computes (perf.expansion), because a
model that fits in the CPU's caches hides what speculation is for. Three workloads: answers to phrasings that neither
model was trained on, the same sampled at temperature 0.8, and copying: questions asked again later in a chat.
Contenders take turns. The last line of output is the JSON that goes to perf/results/speculative.json.
"""

import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import onnx
from rich.console import Console

from perf import decoding_peers
from perf.chunked_prefill import gaps_during_prefill
from perf.expansion import expanded
from scripts.demo import unseen_prompts
from scripts.demo_models import shipped
from scripts.export_model import export_fp32, replace_model
from scripts.machine import describe_machine
from scripts.quantization.precision import Source
from scripts.serving.client import GenerateClient
from scripts.serving.installation import MODEL_REPOSITORY, PYTHON_BACKENDS
from scripts.serving.server import TritonServer

sys.path.append(str(PYTHON_BACKENDS))

from speculative_decoding.drafter import ModelDrafter
from speculative_decoding.engine import Engine
from speculative_decoding.engine_statistics import Statistics
from speculative_decoding.language_model import LanguageModel
from speculative_decoding.messages import Message
from speculative_decoding.options import GenerationOptions
from speculative_decoding.sequence import FinishReason
from speculative_decoding.sequence import Sequence as Answer
from speculative_decoding.tokenizer import Tokenizer
from speculative_decoding.warm_up import measure_costs

RESULTS = Path(__file__).parent / "results"
PAIR = MODEL_REPOSITORY / "language_model" / "1"
SPECULATION_LENGTH = 8
MOST_TOKENS = 96
CLIENTS = (1, 4, 8, 16)
AT_ONCE = (4, 8)  # sequences, besides one
DRAFTERS = ("model", "prompt_lookup", "auto")
EXACT = "row-int8"  # the file that speculation runs on
console = Console(stderr=True)


class Work(NamedTuple):
    """A prompt and how to answer it."""

    prompt: list[int]
    options: GenerationOptions


@dataclass
class Tally:
    """What a contender did in all its turns."""

    tokens: int = 0
    seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    decode_s: float = 0.0  # of all answers, after their first tokens
    answers: dict[int, list[int]] = field(default_factory=dict)

    @property
    def tps(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def decode_tps(self) -> float:
        """Tokens a second after each answer's first, one sequence at a time."""
        return (self.tokens - len(self.answers)) / self.decode_s


class Decoder:
    """Our engine with one target; `decode` answers a workload, so many sequences at a time."""

    def __init__(self, target: Path, threads: int, slots: int, draft: Path | None = None) -> None:
        self._target = LanguageModel(target, slots, threads, spinning=True)
        drafter, length = None, 0
        if draft:
            length = SPECULATION_LENGTH
            drafter = ModelDrafter(LanguageModel(draft, slots, threads=1, spinning=False), (length // 2, length))
        costs = measure_costs(self._target, drafter, length)
        self.engine = Engine(self._target, drafter, length, 1000, costs)

    def decode(self, works: Sequence[Work], at_once: int, tally: Tally, drafter: str = "auto") -> None:
        """Answer all of `works` and add to `tally`."""
        waiting, ended = list(enumerate(works)), threading.Semaphore(0)
        lock = threading.Lock()

        def submit_next() -> None:
            with lock:
                if not waiting:
                    return
                number, work = waiting.pop(0)
            options = replace(work.options, drafter=drafter)
            self.engine.submit(Answer(work.prompt, options, listener(number), self.engine.end_tokens))

        def listener(number: int) -> Callable[[Answer, list[int], FinishReason | None], None]:
            def hear(answer: Answer, tokens: list[int], reason: FinishReason | None) -> None:
                if reason:
                    tally.tokens += answer.answered
                    tally.drafted += answer.drafted
                    tally.accepted += answer.accepted
                    tally.decode_s += answer.finished - answer.first_token
                    tally.answers[number] = answer.tokens[len(answer.prompt) :]
                    submit_next()
                    ended.release()

            return hear

        rounds, started = self.engine.statistics.rounds, time.perf_counter()
        for _ in range(at_once):
            submit_next()
        for _ in works:
            ended.acquire()
        tally.seconds += time.perf_counter() - started
        tally.rounds += self.engine.statistics.rounds - rounds

    def statistics(self) -> Statistics:
        """Return the engine's sums."""
        return self.engine.statistics.copy()


def workloads(tokenizer: Tokenizer, count: int) -> dict[str, list[Work]]:
    """Return so many pieces of each workload."""
    greedy = GenerationOptions(max_tokens=MOST_TOKENS)
    questions = unseen_prompts()[:count]
    unseen = [Work(tokenizer.encode_prompt(question), greedy) for question in questions]
    sampled = [
        Work(work.prompt, replace(greedy, temperature=0.8, top_p=0.95, seed=seed)) for seed, work in enumerate(unseen)
    ]
    return {"unseen": unseen, "sampled": sampled}


def copying(tokenizer: Tokenizer, questions: Sequence[str], answers: Sequence[list[int]]) -> list[Work]:
    """Return chats that ask for what was answered before, two turns later."""
    greedy = GenerationOptions(max_tokens=MOST_TOKENS)
    texts = [tokenizer.decode(answer) for answer in answers]
    works = []
    for index, (question, answer) in enumerate(zip(questions, texts, strict=True)):
        other = (index + 1) % len(questions)
        turns = [(question, answer), (questions[other], texts[other])]
        said = [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
        works.append(Work(tokenizer.encode_messages([*said, Message("user", question)]), greedy))
    return works


def make_precisions(fp32: Path, work: Path, precisions: Sequence[str]) -> dict[str, Path]:
    """Return folders of the model in `fp32` in each precision."""
    folders = {"fp32": fp32}
    for precision in precisions:
        console.log(f"{fp32.parent.name}: {precision}")
        folders[precision] = work / precision
        shutil.copytree(fp32, folders[precision], ignore=shutil.ignore_patterns("model*"))
        made = Source(onnx.load(fp32 / "model.onnx"), decoder=True).make(precision)  # type: ignore[arg-type]
        replace_model(made, folders[precision])
    return folders


def measure_target(name: str, larger: bool, work: Path, count: int, passes: int, peer_count: int) -> dict[str, Any]:
    """Measure one target in-process: every precision plain, every drafter, every peer."""
    work = work / name
    work.mkdir()
    tokenizer = Tokenizer(PAIR / "target", "chat")
    source, draft_source = shipped.load(PAIR / "target"), shipped.load(PAIR / "draft")
    model = expanded(source) if larger else source
    shipped.save(model, work / "source")
    console.log(f"{name}: exporting")
    export_fp32(work / "source", work / "fp32")
    folders = make_precisions(work / "fp32", work, ("int4", "dynamic-int8", EXACT))
    decoding_peers.build_int4(work / "source", work / "genai")
    plain = {precision: _best_threads(folder, tokenizer) for precision, folder in folders.items()}
    console.log(f"{name}: plain with { ({precision: threads for precision, (_, threads) in plain.items()}) } threads")
    speculative = Decoder(folders[EXACT], plain[EXACT][1], max(AT_ONCE), PAIR / "draft")
    works = workloads(tokenizer, count)
    tallies: dict[str, Tally] = {}

    def turn(key: str, decoder: Decoder, pieces: Sequence[Work], at_once: int = 1, drafter: str = "none") -> None:
        decoder.decode(pieces, at_once, tallies.setdefault(key, Tally()), drafter)

    peers = _peers(work, model, draft_source)
    turn("first", speculative, works["unseen"])
    works["copying"] = copying(tokenizer, unseen_prompts()[:count], list(_ordered(tallies["first"])))
    for pass_number in range(passes + 1):
        pieces_taken = count if pass_number else 2  # the first pass warms up
        if pass_number == 1:
            tallies.clear()
        for precision, (decoder, _) in plain.items():
            turn(f"plain {precision}", decoder, works["unseen"][:pieces_taken])
        for workload, pieces in works.items():
            for drafter in ("none", *DRAFTERS):
                turn(f"{workload} 1 {drafter}", speculative, pieces[:pieces_taken], 1, drafter)
            for at_once in AT_ONCE:
                for drafter in ("none", "auto"):
                    turn(f"{workload} {at_once} {drafter}", speculative, pieces[:pieces_taken], at_once, drafter)
        for peer, generate in peers.items():
            asked = works["unseen"][: min(peer_count, pieces_taken)]
            _take_turn(generate, asked, tallies.setdefault(f"peer {peer}", Tally()))
        console.log(f"{name}: pass {pass_number} of {passes}")
    _require_equal(tallies, works)
    overhead, plain_overhead = (
        {str(at_once): _overhead_ms(speculative, works["unseen"], at_once, drafter) for at_once in (1, 8)}
        for drafter in ("auto", "none")
    )
    before = speculative.statistics()
    speculative.decode(works["unseen"], 1, Tally(), "none")
    after = speculative.statistics()
    for decoder in (speculative, *(decoder for decoder, _ in plain.values())):
        decoder.engine.stop()
    return _figures(tallies, works) | {
        "threads": {precision: threads for precision, (_, threads) in plain.items()},
        "engine_overhead_ms": overhead,
        "plain_overhead_ms": plain_overhead,
        "step_vs_bare_call": (after.step_s - before.step_s) / (after.model_s - before.model_s),
    }


def _figures(tallies: dict[str, Tally], works: dict[str, list[Work]]) -> dict[str, Any]:
    plain = {key.split()[1]: tally.tps for key, tally in tallies.items() if key.startswith("plain ")}
    speculative = {drafter: tallies[f"unseen 1 {drafter}"].tps for drafter in DRAFTERS}
    peers = {key.removeprefix("peer "): tally.tps for key, tally in tallies.items() if key.startswith("peer ")}
    by_model = tallies["unseen 1 model"]
    same_file = tallies["unseen 1 none"].tps
    auto = {
        workload: {
            str(at_once): tallies[f"{workload} {at_once} auto"].tps / tallies[f"{workload} {at_once} none"].tps
            for at_once in (1, *AT_ONCE)
        }
        for workload in works
    }
    return {
        "plain_tps": plain,
        "speculative_tps": speculative,
        "ratio": speculative["auto"] / same_file,
        "ratio_to_best_plain": speculative["auto"] / max(*plain.values(), same_file),
        "ratio_to_best_peer": speculative["auto"] / max(peers.values()),
        "acceptance_rate": by_model.accepted / by_model.drafted,
        "tokens_per_round": by_model.tokens / by_model.rounds,
        # Prompts are chats of 80 to 170 tokens, answers 20 to 65: with prefill it is auto_to_plain's figure.
        "copy_heavy_ratio": tallies["copying 1 auto"].decode_tps / tallies["copying 1 none"].decode_tps,
        "auto_to_plain": auto,
        "peers": peers,
    }


def _best_threads(folder: Path, tokenizer: Tokenizer) -> tuple[Decoder, int]:
    """Return the decoder with as many threads as decode fastest, alone."""
    works = workloads(tokenizer, 2)["unseen"]
    tried: dict[int, tuple[float, Decoder]] = {}
    for threads in range(1, (os.cpu_count() or 1) + 1):
        decoder = Decoder(folder, threads, 1)
        decoder.decode(works, 1, Tally(), "none")
        tally = Tally()
        decoder.decode(works, 1, tally, "none")
        tried[threads] = (tally.tps, decoder)
    best = max(tried, key=lambda threads: tried[threads][0])
    for threads, (_, decoder) in tried.items():
        if threads != best:
            decoder.engine.stop()
    return tried[best][1], best


def _overhead_ms(decoder: Decoder, works: Sequence[Work], at_once: int, drafter: str) -> float:
    """Return the milliseconds of a round that are not ONNX Runtime's."""
    before = decoder.statistics()
    decoder.decode(works, at_once, Tally(), drafter)
    after = decoder.statistics()
    spent = (after.step_s - before.step_s) - (after.model_s - before.model_s)
    return 1e3 * spent / (after.rounds - before.rounds)


def _peers(work: Path, model: Any, draft: Any) -> dict[str, decoding_peers.Generate]:
    speculating = decoding_peers.with_draft(work / "genai", PAIR / "draft", work / "genai with draft")
    return {
        "onnxruntime-genai int4": decoding_peers.genai(work / "genai"),
        "onnxruntime-genai int4, n-gram": decoding_peers.genai(
            work / "genai", ngram_size=decoding_peers.NGRAM, max_draft_tokens=decoding_peers.DRAFT_TOKENS
        ),
        "onnxruntime-genai int4, draft": decoding_peers.genai(
            speculating, max_draft_tokens=decoding_peers.DRAFT_TOKENS
        ),
        "transformers": decoding_peers.transformers(model),
        "transformers, assisted": decoding_peers.transformers(model, draft),
    }


def _take_turn(generate: decoding_peers.Generate, works: Sequence[Work], tally: Tally) -> None:
    for work in works:
        started = time.perf_counter()
        tally.tokens += len(generate(work.prompt, MOST_TOKENS))
        tally.seconds += time.perf_counter() - started


def _require_equal(tallies: dict[str, Tally], works: dict[str, list[Work]]) -> None:
    """Stop when any drafter changed any answer."""
    for workload in works:
        plain = tallies[f"{workload} 1 none"].answers
        for key, tally in tallies.items():
            if key.startswith(f"{workload} ") and tally.answers != plain:
                sys.exit(f"error: {key} gave other answers than plain decoding")


def _ordered(tally: Tally) -> list[list[int]]:
    return [tally.answers[number] for number in sorted(tally.answers)]


class Streams(NamedTuple):
    """What clients saw: tokens a second together, and milliseconds to the first and between later responses."""

    tps: float
    first_ms: list[float]
    gaps_ms: list[float]


def through_triton(clients: Sequence[int], rounds: int) -> dict[str, Any]:
    """Measure the shipped pair through the server: clients that stream one answer after the other."""
    figures = {}
    with tempfile.TemporaryDirectory() as state, TritonServer(state_dir=Path(state)) as server:
        for count in clients:
            kinds: dict[str, list[Streams]] = {"none": [], "auto": []}
            for number in range(rounds + 1):
                for drafter, streams in kinds.items():
                    seen = _stream(server.grpc_url, count, drafter)
                    if number:
                        streams.append(seen)
            plain, auto = (statistics.median(one.tps for one in kinds[drafter]) for drafter in ("none", "auto"))
            first = [value for one in kinds["auto"] for value in one.first_ms]
            gaps = [value for one in kinds["auto"] for value in one.gaps_ms]
            figures[str(count)] = {
                "plain_tps": plain,
                "speculative_tps": auto,
                "ratio": auto / plain,
                "ttft_ms_p50": statistics.median(first),
                "itl_ms_p50": statistics.median(gaps),
                "itl_ms_p99": statistics.quantiles(gaps, n=100)[-1],
            }
            console.log(f"{count} clients: {plain:.0f} and {auto:.0f} tokens/s")
    return figures


def _stream(url: str, clients: int, drafter: str) -> Streams:
    prompts = unseen_prompts()
    results: list[Streams] = []
    gate = threading.Barrier(clients + 1)

    def client(number: int) -> None:
        with GenerateClient(url) as asking:
            gate.wait()
            for index in range(len(prompts) // 2):
                prompt = prompts[(index + number) % len(prompts)]
                answer = asking.ask(prompt, cache="off", drafter=drafter, stream=True, max_tokens=MOST_TOKENS)
                gaps = [late - early for early, late in itertools.pairwise(answer.arrivals_ms)]
                results.append(Streams(answer.info["tokens"], [answer.first_ms], gaps))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    gate.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    first = [value for result in results for value in result.first_ms]
    gaps = [value for result in results for value in result.gaps_ms]
    return Streams(sum(result.tps for result in results) / seconds, first, gaps)


def plot(path: Path, result: dict[str, Any]) -> None:
    """Draw tokens a second of all contenders, one panel a target."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for axis, name, title in zip(
        axes, ("demo", "expanded"), ("demo target, 27M", "the same, expanded to 0.4B"), strict=True
    ):
        bars = {f"plain, {precision}": tps for precision, tps in result[name]["plain_tps"].items()}
        bars |= {f"speculative, {drafter}": tps for drafter, tps in result[name]["speculative_tps"].items()}
        colours = ["tab:blue"] * len(result[name]["plain_tps"]) + ["tab:green"] * len(DRAFTERS)
        bars |= result[name]["peers"]
        colours += ["tab:grey"] * len(result[name]["peers"])
        drawn = axis.barh(list(bars), list(bars.values()), color=colours)
        axis.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.set(title=title, xlabel="tokens/s, one sequence, unseen phrasings")
        axis.margins(x=0.12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure everything, write the results and print them."""
    with tempfile.TemporaryDirectory() as folder:
        demo = measure_target("demo", False, Path(folder), count=24, passes=2, peer_count=24)
    with tempfile.TemporaryDirectory() as folder:
        large = measure_target("expanded", True, Path(folder), count=8, passes=2, peer_count=4)
    result: dict[str, Any] = {
        "demo": demo,
        "expanded": large,
        "copy_heavy_ratio": large["copy_heavy_ratio"],
        "through_triton": through_triton(CLIENTS, rounds=3),
        "while_2048_tokens_arrive": gaps_during_prefill(),
        "engine_overhead_ms": demo["engine_overhead_ms"],
        "step_vs_bare_call": large["step_vs_bare_call"],
        "machine": describe_machine(),
    }
    result = json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 4))
    RESULTS.mkdir(exist_ok=True)
    line = json.dumps(result)
    (RESULTS / "speculative.json").write_text(line + "\n", encoding="utf-8")
    plot(RESULTS / "speculative.png", result)
    print(line)


if __name__ == "__main__":
    main()
