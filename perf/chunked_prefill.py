"""What running streams notice of a long prompt that arrives, on a Llama of 0.1 billion random parameters."""

import itertools
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from perf.kv_models import TENTH_OF_A_BILLION, Size, export_random_llama, load
from scripts.serving.installation import PYTHON_BACKENDS

sys.path.append(str(PYTHON_BACKENDS))

from speculative_decoding.engine import Engine
from speculative_decoding.options import GenerationOptions
from speculative_decoding.sequence import FinishReason, Sequence
from speculative_decoding.warm_up import measure_costs

QUESTION = [7, 8, 9]
ALONE = 200  # tokens of each stream before the prompt arrives


def gaps_during_prefill(prompt: int = 2048, streams: int = 4, size: Size = TENTH_OF_A_BILLION) -> dict[str, float]:
    """Return the milliseconds between the tokens of running streams, alone and while `prompt` tokens are taken in."""
    with tempfile.TemporaryDirectory() as folder:
        export_random_llama(size, Path(folder) / "model")
        model = load(Path(folder) / "model", streams + 1)
        engine = Engine(model, None, 0, 10, measure_costs(model, None, 0))
        try:
            arrivals, began, ended = _watch(engine, prompt, streams)
        finally:
            engine.stop()
    alone, during = [], []
    for times in arrivals:
        for early, late in itertools.pairwise(times):
            if late < began:
                alone.append((late - early) * 1e3)
            elif early < ended:
                during.append((late - early) * 1e3)
    return {
        "itl_ms_p50_alone": statistics.median(alone),
        "itl_ms_p99_alone": statistics.quantiles(alone, n=100)[-1],
        "itl_ms_p50": statistics.median(during),
        "itl_ms_p99": statistics.quantiles(during, n=100)[-1],
        "ttft_ms": (ended - began) * 1e3,
    }


def _watch(engine: Engine, prompt: int, streams: int) -> tuple[list[list[float]], float, float]:
    """Return when each stream's tokens came, when the prompt was sent, and when it had its first token."""
    arrivals: list[list[float]] = [[] for _ in range(streams)]
    running, first = threading.Semaphore(0), threading.Event()
    options = GenerationOptions(max_tokens=engine.context_length - len(QUESTION), ignore_eos=True)

    def listen(sequence: Sequence, _: list[int], __: FinishReason | None) -> None:
        times = arrivals[answers.index(sequence)]
        times.append(time.perf_counter())
        if len(times) == ALONE:
            running.release()

    answers = [Sequence(QUESTION, options, listen, engine.end_tokens) for _ in range(streams)]
    engine.submit(*answers)
    for _ in answers:
        running.acquire()
    began = time.perf_counter()
    long = list(range(5, 5 + prompt))
    engine.submit(Sequence(long, GenerationOptions(max_tokens=1), lambda *_: first.set(), engine.end_tokens))
    first.wait()
    ended = time.perf_counter()
    for answer in answers:
        engine.cancel(answer)
    return arrivals, began, ended
