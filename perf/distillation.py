"""What distilling the sentence encoder to three layers costs and buys: `python -m perf.distillation [STUDENT]`.

STUDENT is what scripts.distill_embedder makes. Quality is measured on the project's graded sentence pairs, which no
student learned from; teacher and student, in fp32 and in row-wise INT8, are timed in turns. The last line of output is
the JSON that goes to perf/results/distillation.json.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnx
from tokenizers import Tokenizer

from scripts.build_repository import ENCODER
from scripts.distill_embedder import OUTPUT
from scripts.machine import describe_machine
from scripts.quantization.graph import graph_inputs, random_feeds
from scripts.quantization.model_file import save_model
from scripts.quantization.precision import Options, Source
from scripts.quantization.runner import Encoder
from scripts.quantization.speed import measure_latency
from scripts.quantization.tasks import Embedding
from scripts.sentence_encoder import sentence_encoder

RESULTS = Path(__file__).parent / "results"
LENGTH = 32  # tokens of a timed sentence
BATCHES = (1, 8)
CPU_CALLS = 40


def measure(student: Path | None, work: Path) -> dict[str, Any]:
    """Return figures of the student, if there is one, beside its teacher: changes are fractions, negative for less."""
    graphs = {"teacher": sentence_encoder(ENCODER)}
    if student:
        graphs["student"] = sentence_encoder(student)
    for name, graph in list(graphs.items()):
        feeds = [random_feeds(graph, 16, 16, seed) for seed in range(4)]
        graphs[f"{name} row-int8"] = Source(graph, None, Options(), False, feeds).make("row-int8")
    runners = {name: _runner(graph, work / name) for name, graph in graphs.items()}
    tokenizer = Tokenizer.from_file(str(ENCODER / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    task = Embedding(runners["teacher"], tokenizer, graph_inputs(graphs["teacher"]))
    latency = measure_latency(runners, BATCHES)
    cost = {name: _cpu_seconds(runner) for name, runner in runners.items()}
    return {
        name: {
            **{figure: round(value, 4) for figure, value in task.evaluate(runner).items()},
            "latency_ms_p50": {str(batch): round(latency[name][batch].p50_ms, 3) for batch in BATCHES},
            "latency_change": round(latency[name][1].p50_ms / latency["teacher"][1].p50_ms - 1, 4),
            "cpu_s_per_1000": round(cost[name], 3),
            "cost_change": round(cost[name] / cost["teacher"] - 1, 4),
            "quality_change": round(
                task.evaluate(runner)["spearman"] / task.evaluate(runners["teacher"])["spearman"] - 1, 4
            ),
            "size_mb": round((work / name / "model.onnx").stat().st_size / 1e6, 1),
        }
        for name, runner in runners.items()
    }


def _runner(graph: onnx.ModelProto, folder: Path) -> Encoder:
    folder.mkdir()
    save_model(graph, folder)
    return Encoder(folder, "cpu", lambda batch: random_feeds(graph, batch, LENGTH))


def _cpu_seconds(runner: Encoder) -> float:
    """Return the CPU seconds of 1,000 sentences, one a call."""
    step = runner.step(1)
    step()
    started = time.process_time()
    for _ in range(CPU_CALLS):
        step()
    return (time.process_time() - started) / CPU_CALLS * 1000


def main() -> None:
    """Measure, write the result and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, nargs="?", default=OUTPUT)
    with tempfile.TemporaryDirectory() as work:
        figures = measure(parser.parse_args().student, Path(work))
    line = json.dumps({"embedder": figures, "machine": describe_machine()})
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "distillation.json").write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
