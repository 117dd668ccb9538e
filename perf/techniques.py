"""The promise of each technique, measured on this machine: `python -m perf.techniques`.

Both sides of each comparison take turns in this run. Latency is a request's; cost is CPU seconds a request, of the
decoder in-process or of the server's processes; quality is the share of answers that are right, 0 where the answers are
the same token for token, which is checked. The last line of output is the JSON that goes to
perf/results/techniques.json; the table of README is techniques.md beside it.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from rich.console import Console

from perf import distillation, promise, techniques_decoding, techniques_serving
from perf.promise import Change, Measured
from scripts.demo_models.corpus import collect_facts
from scripts.demo_models.questions import sample_questions
from scripts.distill_embedder import OUTPUT as EMBEDDER_STUDENT
from scripts.machine import describe_machine

RESULTS = Path(__file__).parent / "results"
console = Console(stderr=True)


@dataclass(frozen=True)
class Plan:
    """How many questions are asked. timed: one at a time; large: of the 0.4B target; objects: that they are about."""

    questions: int = 300
    timed: int = 40
    large: int = 16
    objects: int = 40
    requests: int = 400


def measure(plan: Plan) -> dict[str, Any]:
    """Return a row for each technique."""
    facts = collect_facts()
    few = random.Random(0).sample(facts, plan.objects)
    workload = techniques_serving.zipf_workload(few, plan.requests)
    questions = sample_questions(facts, plan.questions, unseen=True, seed=5)
    with tempfile.TemporaryDirectory(prefix="techniques-") as folder:
        measured = techniques_decoding.decoding_rows(questions, Path(folder), plan.timed, plan.large)
        console.log("decoding measured")
        measured["all"] = techniques_serving.everything(Path(folder, "fp32"), workload)
        console.log("all together measured")
    measured["caching"] = techniques_serving.caching(few, workload)
    console.log("caching measured")
    measured["batching"].append(techniques_serving.embedder_batching())
    console.log("dynamic batching measured")
    with tempfile.TemporaryDirectory(prefix="techniques-") as folder:
        student = EMBEDDER_STUDENT if EMBEDDER_STUDENT.is_dir() else None
        for name, row in _embedder(distillation.measure(student, Path(folder))).items():
            measured[name].append(row)
    if student is None:
        console.log("the embedder of three layers is left out: scripts.distill_embedder makes it")
    return {name: promise.row(name, *_first(measured[name])) for name in promise.PROMISED}


def _first(measured: list[Measured]) -> tuple[Measured, list[Measured]]:
    held, *also = measured
    return held, also


def _embedder(figures: dict[str, Any]) -> dict[str, Measured]:
    whats = {
        "teacher row-int8": ("quantization", "embedder in row-int8 against fp32, one sentence at a time"),
        "student": ("distillation", "embedder in three layers against six, both fp32, one sentence at a time"),
    }
    rows = {}
    for model, (technique, what) in whats.items():
        if figure := figures.get(model):
            change = Change(figure["latency_change"], figure["cost_change"], figure["quality_change"])
            rows[technique] = Measured(what, "perf.distillation", change)
    return rows


def write(result: dict[str, Any], folder: Path) -> None:
    """Write JSON, table and plot to `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "techniques.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    (folder / "techniques.md").write_text(promise.markdown(result["rows"]), encoding="utf-8")
    promise.plot(result["rows"], folder / "techniques.png")


def main() -> None:
    """Measure, write the results and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    arguments = parser.parse_args()
    rows = json.loads(json.dumps(measure(Plan())), parse_float=lambda text: round(float(text), 4))
    result = {"rows": rows, "machine": describe_machine()}
    write(result, arguments.results)
    print((arguments.results / "techniques.md").read_text(encoding="utf-8"), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
