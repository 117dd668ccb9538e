"""What each precision costs and buys, beside ONNX Runtime's own quantizers: `python -m perf.quantization`.

The embedder is measured on the project's graded sentence pairs; the demo target on answers to phrasings that it was not
trained on. The target's fp32 form is that of its shipped weights, which are INT8: what rounding them had cost is not
counted (`--language-model FOLDER` takes another source, such as what scripts.train_demo_models makes). All models of a
kind are timed in turns. The last line of output is the JSON that goes to perf/results/quantization.json.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnx
from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from rich.console import Console

from scripts.build_repository import ENCODER
from scripts.demo_models.corpus import collect_facts
from scripts.demo_models.questions import Question, sample_questions
from scripts.machine import describe_machine
from scripts.quantization import report
from scripts.quantization.dequantize import dequantize_rows
from scripts.quantization.graph import Feeds, declare_values
from scripts.quantization.integers import quiet
from scripts.quantization.model_file import save_model
from scripts.quantization.precision import PRECISIONS, Options
from scripts.quantization.study import FP32, Result, Study
from scripts.quantization.subject import CalibrationData, Subject, open_subject
from scripts.sentence_encoder import sentence_encoder
from scripts.serving.installation import MODEL_REPOSITORY

RESULTS = Path(__file__).parent / "results"
TARGET = MODEL_REPOSITORY / "language_model" / "1" / "target"
CALIBRATION_TEXTS, HELD_OUT_TEXTS = 64, 150
MOST_LOSS = {"embedder": 0.01, "language_model": 0.03}
console = Console(stderr=True)

Make = Callable[[Path, Path], None]


def study_embedder(work: Path) -> Study:
    """Measure the sentence encoder; it is calibrated on docstrings."""
    folder = work / "all-MiniLM-L6-v2"
    folder.mkdir()
    save_model(sentence_encoder(ENCODER), folder)
    shutil.copy(ENCODER / "tokenizer.json", folder)
    texts = [question.answer for question in sample_questions(collect_facts(), CALIBRATION_TEXTS, False, seed=1)]
    calibration = _jsonl(work / "docstrings.jsonl", [{"text": text} for text in texts])
    return _study(work, folder / "model.onnx", calibration, None, MOST_LOSS["embedder"])


def study_language_model(work: Path, folder: Path | None) -> Study:
    """Measure the demo target, or the language model in `folder`, on answers about the standard library."""
    if folder is None:
        folder = work / "demo target"
        shutil.copytree(TARGET, folder, ignore=shutil.ignore_patterns("model.onnx*"))
        save_model(dequantize_rows(onnx.load(TARGET / "model.onnx")), folder)
    facts = collect_facts()
    calibration = _jsonl(work / "trained.jsonl", _pairs(sample_questions(facts, CALIBRATION_TEXTS, False, seed=1)))
    held_out = _jsonl(work / "unseen.jsonl", _pairs(sample_questions(facts, HELD_OUT_TEXTS, True, seed=2)))
    return _study(work, folder, calibration, held_out, MOST_LOSS["language_model"])


def _study(work: Path, model: Path, calibration: Path, evaluation: Path | None, most_loss: float) -> Study:
    made = work / "made"
    made.mkdir()
    subject = open_subject(model, made, None, upgrade_opset=False)
    study = Study(subject, subject.source(calibration, Options()), made, "cpu", evaluation, console.log)
    for precision in PRECISIONS:
        study.add(precision, most_loss)
    for name, make in _peers(subject, calibration).items():
        try:
            study.include(name, make)
        except Exception as error:  # a peer that fails is a result too
            console.log(f"{name} failed: {error}")
    study.measure_speed()
    output = Console() if sys.stdout.isatty() else Console(width=190)
    output.print(report.table(subject.name, study.results, None), *report.notes(study.results), sep="\n")
    return study


def _peers(subject: Subject, calibration: Path) -> dict[str, Make]:
    """ONNX Runtime's quantizers as they come, on a graph that says what its tensors are."""

    def typed(source: Path) -> Path:
        save_model(declare_values(onnx.load(source)), source.parent)
        return source

    def dynamic(source: Path, destination: Path) -> None:
        with quiet():
            quantize_dynamic(typed(source), destination)

    def static(source: Path, destination: Path) -> None:
        with quiet():
            quantize_static(typed(source), destination, _Reader(CalibrationData(subject, calibration)))

    def four_bits(source: Path, destination: Path) -> None:
        quantizer = MatMulNBitsQuantizer(onnx.load(source))
        quantizer.process()
        onnx.save(quantizer.model.model, destination)

    return {"quantize_dynamic": dynamic, "quantize_static": static, "MatMulNBitsQuantizer": four_bits}


class _Reader(CalibrationDataReader):
    def __init__(self, batches: Iterable[Feeds]) -> None:
        self._batches: Iterator[Feeds] = iter(batches)

    def get_next(self) -> Feeds | None:
        return next(self._batches, None)


def embedder_figures(study: Study) -> dict[str, Any]:
    """Return the figures of each precision of an embedder; ratios are to fp32."""
    return {name: _common(study, result) | _embedding(result) for name, result in study.results.items()}


def language_model_figures(study: Study) -> dict[str, Any]:
    """Return the figures of each precision of a language model; ratios are to fp32."""
    figures = {}
    for name, result in study.results.items():
        common = _common(study, result)
        figures[name] = {
            "size_ratio": common["size_ratio"],
            "step_ratio": round(result.latency[1].p50_ms / study.results[FP32].latency[1].p50_ms, 4),
            "perplexity_ratio": round(result.quality.get("perplexity_ratio", 1.0), 5),
            "greedy_agreement": round(result.quality.get("greedy_agreement", 1.0), 5),
            "rows_independent": result.rows_independent,
            "latency_ms_p50": common["latency_ms_p50"],
            "excluded": result.excluded,
        }
    return figures


def _common(study: Study, result: Result) -> dict[str, Any]:
    base = study.results[FP32]
    return {
        "size_ratio": round(result.size_bytes / base.size_bytes, 4),
        "throughput_ratio": round(result.latency[8].rows_per_s / base.latency[8].rows_per_s, 3),
        "latency_ms_p50": {str(batch): round(latency.p50_ms, 3) for batch, latency in result.latency.items()},
    }


def _embedding(result: Result) -> dict[str, Any]:
    figures = {name: round(result.quality[name], 5) for name in ("cosine_mean", "spearman_loss", "recall_at_1_loss")}
    return figures | {"rows_independent": result.rows_independent, "excluded": result.excluded}


def _pairs(questions: list[Question]) -> list[dict[str, str]]:
    return [{"prompt": question.prompt, "completion": question.answer} for question in questions]


def _jsonl(path: Path, items: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def main() -> None:
    """Measure both models, write the results and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", type=Path, help="a Hugging Face or GenAI folder instead of the demo target")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        embedder = study_embedder(Path(first))
        language_model = study_language_model(Path(second), arguments.language_model)
    result = json.dumps(
        {
            "embedder": embedder_figures(embedder),
            "language_model": language_model_figures(language_model),
            "machine": describe_machine(),
        }
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quantization.json").write_text(result + "\n", encoding="utf-8")
    studies = {"all-MiniLM-L6-v2": embedder, "demo target": language_model}
    points = {
        name: {precision: report.point(made) for precision, made in study.results.items()}
        for name, study in studies.items()
    }
    report.plot(RESULTS / "quantization.png", points)
    print(result)


if __name__ == "__main__":
    main()
